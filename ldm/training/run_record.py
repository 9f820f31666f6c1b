"""Record machine, steps, time and losses of a finished training run from its log folder, beside its weights."""
from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.common.files import write_atomically

AVERAGED_VALUES = 10  # logged values that a final training loss is the mean of
SPLITS = ("train/", "val/")

Scalars = dict[str, list[tuple[int, float]]]  # name -> (step, value)


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the processor, its cores and the threads in use, the device, and versions of this machine."""
    kind = torch.device(device).type
    return {"processor": _processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
            "torch": str(torch.__version__), "python": platform.python_version()}


def describe_run(run: str | Path) -> dict[str, Any]:
    """Describe the run of a log folder: model, data, machine, steps, time and final losses.

    Seconds are those between the first and the last entry of each TensorBoard file; pauses between sessions do not
    count. If the folder does not describe its machine, this one is assumed.

    Raises:
        UserError: it is not such a folder, or holds no checkpoint.
    """
    run = Path(run)
    project, lightning = newest_config(run, "project"), newest_config(run, "lightning")
    scalars, seconds = _read_scalars(run)
    validation = {name: [[step, round(value, 4)] for step, value in entries]
                  for name, entries in scalars.items() if name.startswith("val/")}
    return {"run": run.name, "steps": trained_steps(run), "batch": OmegaConf.select(project, "data.params.batch_size"),
            "seed": OmegaConf.select(lightning, "lightning.seed"), "seconds": round(seconds),
            "machines": _machines(run) or [describe_machine()],
            "final": _final_values(scalars),
            "validation": validation,
            "model": OmegaConf.select(project, "model.target"),
            "learning_rate": OmegaConf.select(project, "model.base_learning_rate"),
            "data": OmegaConf.to_container(OmegaConf.select(project, "data.params.train.params"), resolve=True)}


def record_run(file: str | Path, part: str, run: str | Path) -> dict[str, Any]:
    """Add the description of a run to a JSON file, under the name of the part that it trained, and return it.

    Raises:
        UserError: as `describe_run`, or the file is not a JSON object.
    """
    entry = describe_run(run)
    text = json.dumps(read_records(file) | {part: entry}, indent=1) + "\n"
    write_atomically(file, lambda path: path.write_text(text))
    return entry


def read_records(file: str | Path) -> dict[str, Any]:
    """Return what `record_run` has written so far; an empty dict if there is no such file.

    Raises:
        UserError: the file is not a JSON object.
    """
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
    """Return the number of steps that the last checkpoint of a run has taken.

    Raises:
        UserError: there is no checkpoint.
    """
    last = run / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"{run}: holds no checkpoint; train it on, or name another log folder")
    return int(torch.load(last, map_location="meta", weights_only=True)["global_step"])


def newest_config(run: Path, name: str) -> Any:
    """Return the last config of this name, "project" or "lightning", that a run was started or resumed with.

    Raises:
        UserError: it is not the log folder of a training run.
    """
    configs = sorted((run / "configs").glob(f"*-{name}.yaml"))
    if not configs:
        raise UserError(f"{run}: no log folder of a training run (it has no configs/*-{name}.yaml)")
    return OmegaConf.load(configs[-1])


def _machines(run: Path) -> list[dict[str, Any]]:
    """Return the distinct machines of all sessions of a run, in order."""
    machines: list[dict[str, Any]] = []
    for path in sorted((run / "configs").glob("*-machine.json")):
        machine = json.loads(path.read_text())
        if machine not in machines:
            machines.append(machine)
    return machines


def _read_scalars(run: Path) -> tuple[Scalars, float]:
    """Return every number that the run logged, and for how many seconds it logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: Scalars = defaultdict(list)
    seconds = 0.0
    for path in sorted((run / "tensorboard").glob("events.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1}).Reload()
        times = []
        for name in events.Tags()["scalars"]:
            entries = events.Scalars(name)
            times += [entry.wall_time for entry in entries]
            if name.startswith(SPLITS):
                scalars[name] += [(entry.step, entry.value) for entry in entries]
        seconds += max(times) - events.FirstEventTimestamp() if times else 0.0
    return {name: entries for name, entries in scalars.items() if entries}, seconds


def _final_values(scalars: Scalars) -> dict[str, float]:
    """Return the last value of each number of a validation, and the mean of the last ones of each of training."""
    final = {}
    for name, entries in sorted(scalars.items()):
        count = AVERAGED_VALUES if name.startswith("train/") else 1
        last = [value for _, value in entries[-count:]]
        final[name] = round(sum(last) / len(last), 4)
    return final


def _processor_name() -> str:
    """Return the processor's name if the system provides it, or else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
