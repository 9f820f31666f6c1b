"""Concepts learned by several methods, as users train them: a run of `main.py` for each, if its result is missing.

The name of a concept file contains a key of everything that it depends on: the complete config of the run, the contents
of all files that the config names (photos and base model among them), and the code. A file with the right name need not
be made again, whichever study needs it.
"""
from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.paper.design import Method
from evaluation.paper.examples import ExampleConcept
from evaluation.paper.file_keys import content_digests, short_key
from evaluation.paper.processes import ProcessGroup
from evaluation.paper.results import TrainingCost
from evaluation.paper.source_digest import PRIOR_ENTRIES, TRAINING_ENTRIES, code_digest, config_targets
from ldm.cli.training import parse_training_options
from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.storage import load_concepts
from ldm.data.images import list_images
from ldm.training.config import read_config
from ldm.training.options import NO_MASKS

MAIN = PROJECT_ROOT / "main.py"
NO_PREVIEWS = "lightning.callbacks.previews=null"
SEED = 23


@dataclass(frozen=True)
class TrainingRuns:
    """Trains concepts, and finds those that are trained already.

    Attributes:
        config: Perfusion's config for the base model.
        folder: gets `concepts/<method>/<example>-<key>.safetensors`, each with a `.json` of its cost.
        checkpoint: weights of the base model; None: those that the config names.
        accelerator: as for `main.py`; None: the best one available.
        steps: training steps; None: as in the config.
        workers: number of trainings at a time, which share the processor's cores.
        machine: description of this machine.
    """

    config: str
    folder: Path
    checkpoint: str | None = None
    accelerator: str | None = None
    steps: int | None = None
    workers: int = 1
    machine: str = "this machine"

    def concept_file(self, method: Method, example: ExampleConcept) -> Path:
        """Return the path of a concept file, whether or not it exists."""
        return self.folder / "concepts" / method.key / f"{example.name}-{self.key(method, example)}.safetensors"

    def read_cost(self, method: Method, example: ExampleConcept) -> TrainingCost:
        """Read what a finished training cost."""
        return TrainingCost(**json.loads(self._cost_file(method, example).read_text(encoding="utf-8")))

    def is_finished(self, method: Method, example: ExampleConcept) -> bool:
        """Return whether a concept is trained. Its cost is written last."""
        return self._cost_file(method, example).is_file()

    def is_outdated(self, method: Method, example: ExampleConcept) -> bool:
        """Return whether there are only concept files with other keys, made by other code or settings."""
        file = self.concept_file(method, example)
        return not file.is_file() and any(file.parent.glob(f"{example.name}-*.safetensors"))

    @functools.cache  # noqa: B019 - there are few of them, and each is needed many times
    def key(self, method: Method, example: ExampleConcept) -> str:
        """Return the key of everything that a concept depends on.

        Raises:
            UserError: if a config cannot be read.
        """
        config = self._read_config(method, example)
        base_model = OmegaConf.select(OmegaConf.create(config), "model.params.ckpt_path")
        code = code_digest((*TRAINING_ENTRIES, *config_targets(config)))
        return short_key([config, content_digests(config, base_model), code])

    def train(self, runs: Sequence[tuple[Method, ExampleConcept]]
              ) -> Iterator[tuple[Method, ExampleConcept, TrainingCost]]:
        """Train what is missing, several concepts at a time, and yield each as soon as it is finished.

        If the iterator is closed early, trainings that have started are ended and no others start.

        Raises:
            UserError: if a training fails.
        """
        processes = ProcessGroup()
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._train_one, *run, processes): run for run in runs if not self.is_finished(*run)}
            try:
                for future in as_completed(futures):
                    yield *futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.stop()

    def _train_one(self, method: Method, example: ExampleConcept, processes: ProcessGroup) -> TrainingCost:
        name = f"{method.key}-{example.name}"
        runs = self._runs_folder()
        _remove_runs(runs, name)  # of an interrupted training
        seconds = self._run_main([*self._arguments(method, example), "--name", name, "--logdir", str(runs)], processes)

        # A terminated run exits without an error and leaves what it has learned so far, or nothing.
        made = next(runs.glob(f"*_{name}/concept.safetensors"), None)
        if made is None:
            raise UserError(f"training of {example.name} by {method.name} was stopped before it began; run this again")
        (concept,) = load_concepts(made)
        steps = self._read_config(method, example)["lightning"]["trainer"].get("max_steps")
        if steps not in (None, concept.steps):
            raise UserError(f"training of {example.name} by {method.name} stopped at step {concept.steps} of {steps}; "
                            "run this again")

        file = self.concept_file(method, example)
        content = made.read_bytes()
        write_atomically(file, lambda temporary: temporary.write_bytes(content))
        _remove_runs(runs, name)
        cost = TrainingCost(seconds, concept.parameter_count, file.stat().st_size,
                            f"{self.machine}, {self.workers} trainings at once")
        text = json.dumps(asdict(cost)) + "\n"
        write_atomically(self._cost_file(method, example), lambda temporary: temporary.write_text(text, "utf-8"))
        return cost

    def _run_main(self, arguments: Sequence[str], processes: ProcessGroup) -> float:
        """Run `main.py` on this training's share of the cores; return its processor time in seconds."""
        threads = {"OMP_NUM_THREADS": str(max(1, available_cores() // self.workers))}
        result = processes.run([sys.executable, str(MAIN), *arguments], {**threads, **os.environ})
        if result.returncode:
            reason = (result.errors.strip() or "no error message").splitlines()[-1].removeprefix("error: ")
            raise UserError(f"training failed: main.py {' '.join(arguments)}: {reason}")
        return result.seconds

    def _arguments(self, method: Method, example: ExampleConcept) -> list[str]:
        """Return the arguments for `main.py` that decide what is learned."""
        arguments = ["--base", *method.configs(self.config), "--data_root", str(self._photo_folder(method, example)),
                     "--init_word", example.super_category, "--placeholder_string", example.placeholder,
                     "--seed", str(SEED)]
        optional = {"--masks": None if method.masks else NO_MASKS, "--actual_resume": self.checkpoint,
                    "--accelerator": self.accelerator, "--max_steps": self.steps}
        for flag, value in optional.items():
            if value is not None:
                arguments += [flag, str(value)]
        return [*arguments, NO_PREVIEWS, *method.overrides]

    def _read_config(self, method: Method, example: ExampleConcept) -> dict[str, Any]:
        """Return the complete config of a run, as plain data."""
        config = read_config(parse_training_options(self._arguments(method, example)))
        return OmegaConf.to_container(config, resolve=True)

    def _photo_folder(self, method: Method, example: ExampleConcept) -> Path:
        """Return the folder with the photos that the method trains on; copy them if these are not all."""
        if method.photos is None:
            return example.folder
        folder = self.folder / "photos" / f"first-{method.photos}" / example.name
        expected = {path.name: path.read_bytes() for path in list_images(example.folder)[:method.photos]}
        present = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
        if present != expected:
            shutil.rmtree(folder, ignore_errors=True)
            for name, content in expected.items():
                write_atomically(folder / name, lambda temporary, content=content: temporary.write_bytes(content))
        return folder

    def _runs_folder(self) -> Path:
        """Return the folder of log folders. All methods share it, as they share images for prior preservation there."""
        return self.folder / "runs" / code_digest((*TRAINING_ENTRIES, *PRIOR_ENTRIES))

    def _cost_file(self, method: Method, example: ExampleConcept) -> Path:
        return self.concept_file(method, example).with_suffix(".json")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remove_runs(runs: Path, name: str) -> None:
    """Remove the log folders of runs with this name."""
    for folder in runs.glob(f"*_{name}"):
        shutil.rmtree(folder)
