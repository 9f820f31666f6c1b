"""What a training run really took: read from its log folder, kept beside the weights that it made."""
from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.common.files import write_atomically

LAST = 10  # logged values that a final training loss is the mean of
SPLITS = ("train/", "val/")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine at hand: its processor, how many cores torch uses of how many, the device, and versions."""
    kind = torch.device(device).type
    return {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
            "torch": str(torch.__version__), "python": platform.python_version()}


def describe_run(run: str | Path) -> dict[str, Any]:
    """What was trained in a log folder of main.py, on what, for how long, and what came out.

    Seconds are those between the first and the last entry of each of its TensorBoard files, pauses between them not
    counted; where a run does not say which machine it was on, the machine at hand is named.

    Raises:
        UserError: it is no such folder, or holds no checkpoint.
    """
    run = Path(run)
    project, lightning = (newest_config(run, name) for name in ("project", "lightning"))
    scalars, seconds = _logged(run)
    machines = [json.loads(path.read_text()) for path in sorted((run / "configs").glob("*-machine.json"))]
    steps, batch = trained_steps(run), OmegaConf.select(project, "data.params.batch_size")
    return {"run": run.name, "steps": steps, "batch": batch,
            "seed": OmegaConf.select(lightning, "lightning.seed"), "seconds": round(seconds),
            "machines": [machine for place, machine in enumerate(machines) if machine not in machines[:place]]
            or [describe_machine()],
            "final": dict(_final(scalars)),
            "validation": {name: [[step, round(value, 4)] for step, value in entries]
                           for name, entries in scalars.items() if name.startswith("val/")},
            "model": OmegaConf.select(project, "model.target"),
            "learning_rate": OmegaConf.select(project, "model.base_learning_rate"),
            "data": OmegaConf.to_container(OmegaConf.select(project, "data.params.train.params"), resolve=True)}


def record_run(file: str | Path, part: str, run: str | Path) -> dict[str, Any]:
    """Puts the description of a run into a JSON file under the name of the part it trained; returns it.

    Raises:
        UserError: as for `describe_run`, or the file is no JSON object.
    """
    entry = describe_run(run)
    whole = read_records(file) | {part: entry}
    write_atomically(file, lambda aside: aside.write_text(json.dumps(whole, indent=1) + "\n"))
    return entry


def read_records(file: str | Path) -> dict[str, Any]:
    """What `record_run` has written so far; empty where there is no such file."""
    path = Path(file)
    if not path.is_file():
        return {}
    try:
        records = json.loads(path.read_text())
    except ValueError:
        records = None
    if not isinstance(records, dict):
        raise UserError(f"{path}: not the JSON object that it should be; delete it")
    return records


def trained_steps(run: Path) -> int:
    """How many steps the last checkpoint of a run has behind it.

    Raises:
        UserError: there is none.
    """
    last = run / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"{run}: holds no checkpoint; train it on, or name another log folder")
    return int(torch.load(last, map_location="meta", weights_only=True)["global_step"])


def newest_config(run: Path, name: str) -> Any:
    """The last config of this name, "project" or "lightning", that a run was started or resumed with.

    Raises:
        UserError: it is no log folder of a training run.
    """
    configs = sorted((run / "configs").glob(f"*-{name}.yaml"))
    if not configs:
        raise UserError(f"{run}: no log folder of a training run (it has no configs/*-{name}.yaml)")
    return OmegaConf.load(configs[-1])


def _logged(run: Path) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Every number logged, as (step, value) by name, and the seconds that logging went on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars, seconds = defaultdict(list), 0.0
    for path in sorted((run / "tensorboard").glob("events.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1}).Reload()
        entries = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        for name, logged in entries.items():
            scalars[name] += [(entry.step, entry.value) for entry in logged if name.startswith(SPLITS)]
        times = [entry.wall_time for logged in entries.values() for entry in logged]
        seconds += max(times) - events.FirstEventTimestamp() if times else 0.0
    return {name: entries for name, entries in scalars.items() if entries}, seconds


def _final(scalars: dict[str, list[tuple[int, float]]]) -> Iterator[tuple[str, float]]:
    """The last value of each number of a validation, the mean of the last ones of each number of training."""
    for name, entries in sorted(scalars.items()):
        last = [value for _, value in entries[-LAST if name.startswith("train/") else -1:]]
        yield name, round(sum(last) / len(last), 4)


def _processor() -> str:
    """The processor's name where the system tells, or else its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
