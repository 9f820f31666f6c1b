"""Describe one run of a public script, run it in a child process, and compare its outcome with the original's.

To add runs: write a module with a tuple of `PublicRun` and name it in `run_public_scripts.py` (RUN_MODULES). A run
compares images (PNG) and numbers: a script of our own may write `numbers.json` ({"loss": [4.8, 4.7]}) into its folder.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from public_scripts.towers import clip_tower

TOOLS = Path(__file__).resolve().parents[1]
PROJECT = TOOLS.parents[1]
NUMBERS = "numbers.json"
SEED = 42
TIME_LIMIT = 600  # seconds per child process
Input = Callable[["Workplace", Path], None]  # writes a file, or a folder, that a script expects at this path


@dataclass(frozen=True)
class PublicRun:
    """One run of a script of a public repository.

    Attributes:
        name: unique name, without spaces.
        repository: OWNER--NAME of the repository of the script.
        script: the script's path in its repository, or the absolute path of a script of our own; `.ipynb` runs cells.
        arguments: its command line; paths are relative to the folder that it runs in.
        inputs: what must be in that folder: relative path -> function that writes it.
        ldm: the folder in the repository that holds its `ldm`; another repository's as OWNER--NAME/FOLDER.
        extra_path: further folders for Python's path, as OWNER--NAME/FOLDER.
        images: pattern of the images to compare, in the folder that the script runs in.
        whole_checkout: whether users put our checkout (main.py, evaluation, scripts) on the path, not `ldm` alone.
        original_fails: why the run cannot work on the original; empty if it can.
        original_differs: why the original's images are not the ones to reproduce; empty if they are.
        stand_ins: further functions to call before the script, as `module:function`.
        transformers4: whether the script itself, on any `ldm`, needs CLIPTextModel's attributes of transformers 4.
        clip_width: width of the tiny text tower that stands for CLIP's name on the hub; 0 if nothing is loaded by name.
        tolerance: greatest relative difference of numbers.
    """

    name: str
    repository: str
    script: str
    arguments: tuple[str, ...] = ()
    inputs: Mapping[str, Input] = field(default_factory=dict)
    ldm: str = ""
    extra_path: tuple[str, ...] = ()
    images: str = "**/*.png"
    whole_checkout: bool = False
    original_fails: str = ""
    original_differs: str = ""
    stand_ins: tuple[str, ...] = ()
    transformers4: bool = False
    clip_width: int = 32
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Outcome:
    """What a child process left: its folder, and its error in one line (empty if it succeeded)."""

    folder: Path
    error: str

    @property
    def succeeded(self) -> bool:
        return not self.error


class Workplace:
    """Folders of all runs of one call of the tool.

    Args:
        repositories: folder of public repositories, named OWNER--NAME or NAME.
        folder: where runs get their folders; what is there from an earlier call is used again, except our outcomes.
    """

    def __init__(self, repositories: Path, folder: Path) -> None:
        self.repositories, self.folder = repositories.resolve(), folder.resolve()

    def repository(self, name: str) -> Path | None:
        """Return the folder of the repository OWNER--NAME, or None if it is not there."""
        for candidate in (name, name.partition("--")[2]):
            if candidate and (self.repositories / candidate).is_dir():
                return self.repositories / candidate
        return None

    def path_in(self, place: str) -> Path:
        """Return the path that OWNER--NAME/PATH names.

        Raises:
            LookupError: if the repository is not there.
        """
        name, _, rest = place.partition("/")
        repository = self.repository(name)
        if repository is None:
            raise LookupError(f"needs {name}")
        return repository / rest

    def hub(self, clip_width: int) -> dict[str, str]:
        """Return the local folders that stand for names on the hub."""
        if not clip_width:
            return {}
        return {"openai/clip-vit-large-patch14": str(clip_tower(self.folder / "models", clip_width)),
                "bert-base-uncased": str(PROJECT / "models" / "bert_tokenizer")}

    def own_package(self) -> Path:
        """Return a folder with nothing but our `ldm`, as an installation puts it on Python's path."""
        folder = self.folder / "installed"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "ldm").is_symlink():
            (folder / "ldm").symlink_to(PROJECT / "ldm", target_is_directory=True)
        return folder


def ldm_folder(run: PublicRun, place: Workplace) -> Path:
    """Return the folder that holds the original `ldm` of a run."""
    return place.path_in(run.ldm) if "--" in run.ldm else place.path_in(f"{run.repository}/{run.ldm}")


def order_for(run: PublicRun, place: Workplace, original: bool) -> dict[str, object]:
    """Return what `launcher.py` is to do: run the script on the original `ldm` or on ours.

    Raises:
        LookupError: if a repository is missing.
    """
    repository = place.path_in(run.repository)
    own_package = PROJECT if run.whole_checkout else place.own_package()
    package = ldm_folder(run, place) if original else own_package
    # The order of Python's path: the package under test, then the script's folder and its repository.
    script = repository / run.script
    path = [package, script.parent, repository, *(place.path_in(extra) for extra in run.extra_path)]
    return launch_order(script, run.arguments, path, original=original, transformers4=original or run.transformers4,
                        stand_ins=run.stand_ins, hub=place.hub(run.clip_width))


def launch_order(script: Path, arguments: Sequence[str], path: Sequence[Path], *, original: bool, transformers4: bool,
                 stand_ins: Sequence[str] = (), hub: Mapping[str, str] | None = None) -> dict[str, object]:
    """Return the content of the file that `launcher.py` reads."""
    return {"script": str(script), "arguments": list(arguments), "path": [str(entry) for entry in path], "seed": SEED,
            "original": original, "transformers4": transformers4, "stand_ins": list(stand_ins), "hub": hub or {}}


def run_script(run: PublicRun, place: Workplace, original: bool) -> Outcome:
    """Run a script in a child process, on the original `ldm` or on ours, in a folder of its own.

    Raises:
        LookupError: if a repository is missing.
    """
    folder = outcome_folder(run, place, original)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for relative, write in run.inputs.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        write(place, target)
    return launch(order_for(run, place, original), folder)


def outcome_folder(run: PublicRun, place: Workplace, original: bool) -> Path:
    """Return the folder in which a script runs."""
    return place.folder / run.name / ("original" if original else "ours")


def launch(order: Mapping[str, object], folder: Path) -> Outcome:
    """Run a script by `launcher.py`: as __main__, in `folder`."""
    (folder / "order.json").write_text(json.dumps(order, indent=1))
    log = folder / "log.txt"
    environment = {**os.environ, "PYTHONPATH": str(TOOLS), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "public_scripts.launcher", str(folder / "order.json")]
    with log.open("w") as output:
        try:
            code = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                  stdin=subprocess.DEVNULL, timeout=TIME_LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
            output.write(f"\ntook more than {TIME_LIMIT} s\n")
    error = "" if code == 0 else last_error(log.read_text(errors="replace"))
    (folder / "outcome.json").write_text(json.dumps({"error": error}))
    return Outcome(folder, error)


def last_error(log: str) -> str:
    """Return the last line of a log that says what went wrong, with the last file and line of no library."""
    lines = [line for line in log.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if not line.startswith(" ")), "no output")
    frames = [line.strip() for line in lines if line.strip().startswith("File ") and "-packages" not in line]
    if not frames:
        return message[:300]
    file, line = frames[-1].split('"')[1], frames[-1].split("line ")[1].split(",")[0]
    return f"{message[:300]} ({'/'.join(Path(file).parts[-3:])}:{line})"


def earlier_outcome(run: PublicRun, place: Workplace) -> Outcome | None:
    """Return the original's outcome of an earlier call of the tool, if it succeeded and did the same."""
    folder = outcome_folder(run, place, original=True)
    order, outcome = folder / "order.json", folder / "outcome.json"
    if not outcome.is_file() or json.loads(outcome.read_text())["error"]:
        return None
    same = json.loads(order.read_text()) == order_for(run, place, original=True)
    return Outcome(folder, "") if same else None
