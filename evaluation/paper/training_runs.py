"""Concepts taught by several methods, as a user teaches them: by `main.py`, a run for each, made when missing.

A concept file is named after everything that it depends on: the whole config of its run, the contents of the files that
the config names, photos and base model among them, and the code that learns. One that is there need not be made again,
whichever study asks for it; one that was made in another way has another name.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from evaluation.paper.source_digest import ROOT, TEACHING, code_of
from evaluation.paper.studies import Method
from ldm.common.errors import UserError
from ldm.common.files import write_atomically
from ldm.concepts.storage import load_concepts
from ldm.data.images import list_images
from ldm.training.config import get_parser, read_config

MAIN = ROOT / "main.py"
NO_PICTURES = "lightning.callbacks.pictures=null"  # the sheet of samples of a run
SEED = 23
KEY_LENGTH = 10


@dataclass(frozen=True)
class Example:
    """A thing to teach: a folder with photos of it, and what kind of thing it is."""

    name: str
    folder: Path
    super_category: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of all concepts in a picture of it."""
        return (self.name,)

    @property
    def placeholder(self) -> str:
        return f"<my-{self.name}>"


@dataclass(frozen=True)
class Cost:
    """What teaching one concept took, and what came out.

    Attributes:
        seconds: of the processor, all cores together; those of a clock would hang on what else is running.
        parameters: learned numbers.
        size: of the file, in bytes.
        where: the machine, and how many trainings shared it.
    """

    seconds: float
    parameters: int
    size: int
    where: str


@dataclass(frozen=True)
class School:
    """Where and how concepts are taught.

    Attributes:
        config: that of Perfusion for the base model.
        folder: gets `concepts/<method>/<example>-<key>.safetensors`, each with a `.json` that says what it cost.
        checkpoint: the base model's weights; None: the config's.
        accelerator: as for main.py; None: the best there is.
        steps: of training; None: the config's.
        at_once: trainings side by side, which share the processor's cores.
        machine: what to call the one at hand.
    """

    config: str
    folder: Path
    checkpoint: str | None = None
    accelerator: str | None = None
    steps: int | None = None
    at_once: int = 1
    machine: str = "this machine"
    _running: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def file(self, method: Method, example: Example) -> Path:
        """The concept file; whether or not it is there yet."""
        return self.folder / "concepts" / method.slug / f"{example.name}-{self.key(method, example)}.safetensors"

    def cost(self, method: Method, example: Example) -> Cost:
        return Cost(**json.loads(self.file(method, example).with_suffix(".json").read_text()))

    def is_there(self, method: Method, example: Example) -> bool:
        """Whether the file and what it cost are; the latter is written last."""
        return self.file(method, example).with_suffix(".json").is_file()

    def outdated(self, method: Method, example: Example) -> bool:
        """Whether there is only a file that was made in another way."""
        file = self.file(method, example)
        return not file.is_file() and any(file.parent.glob(f"{example.name}-*.safetensors"))

    @functools.cache  # noqa: B019 - few, and asked for again and again
    def key(self, method: Method, example: Example) -> str:
        """Names all that the concept depends on; found out once in a run.

        Raises:
            UserError: a config cannot be read.
        """
        config = self._config(method, example)
        base = OmegaConf.select(OmegaConf.create(config), "model.params.ckpt_path")
        return key_of([config, contents(config, base), code_of(TEACHING)])

    def teach(self, wanted: Sequence[tuple[Method, Example]]) -> Iterator[tuple[Method, Example, Cost]]:
        """Teaches what is missing, several at once, and yields each as soon as it is done.

        Whatever ends this before all are done ends the trainings, too.

        Raises:
            UserError: a training fails.
        """
        with ThreadPoolExecutor(self.at_once) as pool:
            running = {pool.submit(self._taught, *pair): pair for pair in wanted if not self.is_there(*pair)}
            try:
                for done in as_completed(running):
                    yield *running[done], done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for training in tuple(self._running):
                    with contextlib.suppress(ProcessLookupError):  # it ended just now
                        os.kill(training, signal.SIGTERM)

    def _arguments(self, method: Method, example: Example) -> tuple[list[str], list[str]]:
        """Flags for main.py, and overrides."""
        flags = ["--base", *method.configs(self.config), "--data_root", str(self._photos(method, example)),
                 "--init_word", example.super_category, "--placeholder_string", example.placeholder,
                 "--seed", str(SEED), "--no-test"]
        given = {"--masks": None if method.masks else "none", "--actual_resume": self.checkpoint,
                 "--accelerator": self.accelerator, "--max_steps": self.steps}
        flags += [str(word) for pair in given.items() if pair[1] is not None for word in pair]
        return flags, [NO_PICTURES, *method.overrides]

    def _config(self, method: Method, example: Example) -> dict[str, Any]:
        """What main.py makes of these arguments."""
        flags, overrides = self._arguments(method, example)
        return OmegaConf.to_container(read_config(get_parser().parse_args(flags), overrides), resolve=True)

    def _photos(self, method: Method, example: Example) -> Path:
        """The folder of the photos that the method is given."""
        if method.photos is None:
            return example.folder
        folder = self.folder / "photos" / f"first-{method.photos}" / example.name
        wanted = {path.name: path.read_bytes() for path in list_images(example.folder)[:method.photos]}
        there = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
        if there != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            for name, content in wanted.items():
                write_atomically(folder / name, lambda aside, content=content: aside.write_bytes(content))
        return folder

    def _taught(self, method: Method, example: Example) -> Cost:
        flags, overrides = self._arguments(method, example)
        file, name = self.file(method, example), f"{method.slug}-{example.name}"
        runs = self.folder / "runs" / code_of(TEACHING)  # of all methods, which find each other's priors there
        self._clear(runs, name)  # what an interrupted one has left
        seconds = self._run([*flags, "--name", name, "--logdir", str(runs), *overrides])
        made = next(runs.glob(f"*_{name}/concept.safetensors"), None)
        if made is None:  # a run that is told to end does so, well or not
            raise UserError(f"teaching {example.name} by {method.name} was stopped before it began; run this again")
        (concept,), steps = load_concepts(made), self._config(method, example)["lightning"]["trainer"].get("max_steps")
        if steps not in (None, concept.steps):  # Ctrl-C stops a run, too, which then keeps what it has
            raise UserError(f"teaching {example.name} by {method.name} stopped at step {concept.steps} of {steps}; "
                            "run this again")
        write_atomically(file, lambda aside: aside.write_bytes(made.read_bytes()))
        self._clear(runs, name)
        cost = Cost(seconds, concept.parameter_count, file.stat().st_size, self._where)
        write_atomically(file.with_suffix(".json"), lambda aside: aside.write_text(json.dumps(asdict(cost)) + "\n"))
        return cost

    @property
    def _where(self) -> str:
        return f"{self.machine}, {self.at_once} trainings at once"

    @staticmethod
    def _clear(runs: Path, name: str) -> None:
        for folder in runs.glob(f"*_{name}"):
            shutil.rmtree(folder)

    def _run(self, arguments: Sequence[str]) -> float:
        """main.py with these arguments, on this training's share of the cores; its seconds of the processor."""
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // self.at_once))}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            running = subprocess.Popen([sys.executable, str(MAIN), *arguments], env={**threads, **os.environ},
                                       stdout=subprocess.DEVNULL, stderr=said)
            self._running.add(running.pid)
            _, status, used = os.wait4(running.pid, 0)  # of this one alone, unlike what `resource` says of children
            running.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(running.pid)
            said.seek(0)
            complaint = (said.read().strip() or "it said nothing").splitlines()[-1]
        if running.returncode:
            raise UserError(f"teaching failed: main.py {' '.join(arguments)}: {complaint.removeprefix('error: ')}")
        return used.ru_utime + used.ru_stime


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def key_of(value: Any) -> str:
    """A short name for what is plain data; for files of the project's it is the same wherever that lies."""
    text = json.dumps(value, sort_keys=True, default=str).replace(f"{ROOT}/", "")
    return hashlib.blake2b(text.encode()).hexdigest()[:KEY_LENGTH]


def contents(value: Any, *named: str | Path | None) -> dict[str, str]:
    """What plain data names that is a file or a folder, each with a digest of what is in it.

    Args:
        value: its texts are taken for paths where they have a "/"; others may be words that a folder is called, too.
        named: what is a path by whatever name, or the name of something to download, which is no file.
    """
    texts = {*_texts(value), *(str(one) for one in named if one is not None)}
    return {text: digest(text) for text in sorted(texts) if Path(text).exists()}


@functools.cache
def digest(path: str | Path) -> str:
    """Names the contents of a file, or of all files in a folder."""
    path, state = Path(path), hashlib.blake2b()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()[:KEY_LENGTH]


def _texts(value: Any) -> Iterator[str]:
    """All texts in plain data that could be paths."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str) and len(value) < 256 and "/" in value:
        yield value
