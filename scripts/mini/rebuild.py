"""Rebuilds everything in `models/mini/` from its sources, part after part, and measures what came out.

    python scripts/mini/rebuild.py                                               # two cores: overnight
    python scripts/mini/rebuild.py --device cuda --times_batch 8 --workers 12    # one GPU

Drawings are fetched where they are missing. The autoencoder, its decoder again, both CLIPs, the text-to-image model and
the segmenter are trained by `main.py` and exported, covariance and example concepts are made, and everything is
measured by `evaluation/base_model.py`. Run it again after an interruption: what is done is passed over, and a run
that was cut off goes on at its last checkpoint. `training.json` beside the weights says what was really done.

PART:KEY=VALUE after the flags overrides a key of that part's config, for example:
    text2img:lightning.trainer.precision=bf16-mixed clip:lightning.trainer.max_steps=5000
"""
from __future__ import annotations

import argparse
import datetime
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

from ldm.cli.parser import Parser, number, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder  # noqa: E402
from ldm.data.mini.world import KIND_NAMES, sprite_sets  # noqa: E402
from ldm.training.run_record import read_records, trained_steps  # noqa: E402

log = logging.getLogger(__name__)

MINI = ROOT / "models" / "mini"
# In this order: see INGREDIENTS.
TRAINED = ("autoencoder", "decoder", "clip", "evaluation_clip", "text2img", "segmenter")
PARTS = ("drawings", "autoencoder", "decoder", "clip", "evaluation_clip", "text2img", "covariance", "segmenter",
         "concepts", "evaluation")
INGREDIENTS = {  # what a part is trained with: a key of its config, and the file in the models' folder
    "decoder": {"model.params.ckpt_path": "parts/autoencoder.safetensors"},
    "text2img": {"model.params.first_stage_config.params.ckpt_path": "parts/autoencoder.safetensors",
                 "model.params.cond_stage_config.params.version": "parts/text_encoder"},
    "segmenter": {"model.params.clip": "clip"},
}
SCHEDULE = "model.params.scheduler_config.params.max_decay_steps"
STEPS = "lightning.trainer.max_steps"
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
Runner = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Plan:
    """How everything is rebuilt.

    Attributes:
        folder: where the models go.
        logdir: where the log folders of training go.
        device: cpu, cuda or mps; None: the best there is.
        times_steps, times_batch: so many times as many steps, and pictures in a batch, as the configs say.
        workers: processes that compose scenes.
        overrides: (part, key=value) from the command line.
        quick: whether the evaluation is.
    """

    folder: Path
    logdir: Path
    device: str | None = None
    times_steps: float = 1.0
    times_batch: float = 1.0
    workers: int = 0
    overrides: Sequence[tuple[str, str]] = ()
    quick: bool = False

    def settings(self, part: str) -> list[str]:
        """The key=value pairs for main.py with which a part is trained.

        The learning rate grows with the root of the batch, as suits Adam (Malladi et al., "On the SDEs and Scaling
        Rules for Adaptive Gradient Algorithms", 2022); main.py multiplies its base by the batch, so the base falls.
        """
        config, values = OmegaConf.load(config_of(part)), {"data.params.num_workers": self.workers}
        if self.times_steps != 1:
            steps = max(1, round(OmegaConf.select(config, STEPS) * self.times_steps))
            values |= {STEPS: steps, SCHEDULE: steps}
        if self.times_batch != 1:
            batch = max(1, round(config.data.params.batch_size * self.times_batch))
            grown = batch / config.data.params.batch_size
            values |= {"data.params.batch_size": batch,
                       "model.base_learning_rate": config.model.base_learning_rate / math.sqrt(grown)}
        values |= {key: self.folder / file for key, file in INGREDIENTS.get(part, {}).items()}
        own = [setting for name, setting in self.overrides if name == part]
        return [*(f"{key}={value}" for key, value in values.items()), *own]

    def steps(self, part: str) -> int:
        """How many steps a part is trained for."""
        merged = OmegaConf.merge(OmegaConf.load(config_of(part)), OmegaConf.from_dotlist(self.settings(part)))
        return int(OmegaConf.select(merged, STEPS))


def config_of(part: str) -> Path:
    return ROOT / "configs" / "mini" / f"{part}.yaml"


def newest_run(logdir: Path, part: str) -> Path | None:
    """The last log folder of a part's training that has a checkpoint to go on from."""
    runs = [run for run in sorted(logdir.glob(f"*_{part}")) if (run / "checkpoints" / "last.ckpt").is_file()
            and run.name.partition("_")[2] == part]
    return runs[-1] if runs else None


def train_and_export(plan: Plan, part: str, run: Runner) -> None:
    """Trains a part, or goes on with it where it was cut off, and exports it; passes over what is done already."""
    found = newest_run(plan.logdir, part)
    if found is None or trained_steps(found) < plan.steps(part):
        new = ["--base", str(config_of(part)), "-n", part, "-l", str(plan.logdir)]
        accelerator = ["--accelerator", ACCELERATORS[plan.device]] if plan.device else []
        log.info("%s: %s", part, f"going on with {found}" if found else "training")
        run(["main.py", *(["--resume", str(found)] if found else new), *accelerator, *plan.settings(part)])
    found = newest_run(plan.logdir, part)
    if found is None:
        raise UserError(f"{part}: training left no checkpoint in {plan.logdir}; see what it said")
    exported = read_records(plan.folder / "training.json").get(part, {})
    if (exported.get("run"), exported.get("steps")) != (found.name, trained_steps(found)):
        run(["scripts/mini/export.py", part, str(found), "--outdir", str(plan.folder)])
    else:
        log.info("%s: is there", part)


def make(plan: Plan, part: str, run: Runner) -> None:
    """Makes or measures what is not trained."""
    weights = {"--ckpt": "model.safetensors", "--clip": "clip", "--segmenter": "segmenter",
               "--evaluation_clip": "evaluation_clip", "--weights": ""}
    measured = [word for flag, file in weights.items() for word in (flag, str(plan.folder / file))]
    device = ["--device", plan.device] if plan.device else []
    commands = {
        "drawings": ["scripts/mini/fetch_drawings.py"],
        "covariance": ["scripts/mini/export.py", "covariance", "--outdir", str(plan.folder)],
        "concepts": ["scripts/mini/make_example_concepts.py"],
        "evaluation": ["evaluation/base_model.py", *measured, *device, *(["--quick"] if plan.quick else []),
                       "--outdir", str(plan.logdir / "evaluation")]}
    if part == "drawings" and all(map(sprite_sets, KIND_NAMES)):
        log.info("drawings: are there")
    else:
        run(commands[part])


def rebuild(plan: Plan, parts: Sequence[str], run: Runner) -> None:
    """Does what is still to be done for `parts`, in the order of `PARTS`; `run` starts a script with its arguments.

    Raises:
        UserError: a step of it failed; what is done by then is kept.
    """
    for part in PARTS:
        if part in parts:
            (train_and_export if part in TRAINED else make)(plan, part, run)


def start(command: Sequence[str]) -> None:
    """Runs a script of the project in its folder, to the end."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        raise UserError(f"{command[0]} failed ({done.returncode}); mend what it says above, then run this again: what "
                        "is done is kept")


def set_aside(logdir: Path) -> None:
    """Renames the folder of earlier runs, so that everything is trained anew."""
    if logdir.exists():
        kept = logdir.with_name(f"{logdir.name}-until-{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}")
        logdir.rename(kept)
        log.info("earlier runs are kept in %s", kept)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"what to rebuild (default: all of {', '.join(PARTS)})")
    parser.add_argument("--fresh", action="store_true", help="train anew what earlier rebuilds in --logdir trained")
    parser.add_argument("--device", choices=ACCELERATORS, help="default: the best there is")
    parser.add_argument("--times_steps", type=number(above=0), default=1.0, metavar="NUMBER",
                        help="times as many training steps as the configs say (default: 1)")
    parser.add_argument("--times_batch", type=number(above=0), default=1.0, metavar="NUMBER",
                        help="times as many pictures in a batch; learning rates grow with the root of it (default: 1)")
    parser.add_argument("--workers", type=whole(0), default=0, metavar="N",
                        help="processes that compose scenes beside the training; a GPU needs many (default: 0)")
    parser.add_argument("--quick", action="store_true", help="measure only roughly what came out")
    parser.add_argument("--outdir", type=Path, default=MINI, metavar="FOLDER",
                        help="where the models go (default: models/mini, in place of the bundled ones)")
    parser.add_argument("--logdir", type=Path, default=ROOT / "logs" / "mini", metavar="FOLDER",
                        help="where training writes (default: logs/mini)")
    options, rest = parser.parse_known_args(arguments)
    options.overrides = [_override(text) for text in rest]
    for flag in ("outdir", "logdir"):
        check_folder(f"--{flag}", getattr(options, flag))
    return options


def _override(text: str) -> tuple[str, str]:
    part, colon, setting = text.partition(":")
    if part not in TRAINED or not colon or "=" not in setting:
        raise UserError(f"{text}: neither a flag (see --help) nor PART:KEY=VALUE with a part of {', '.join(TRAINED)}")
    return part, setting


@one_line_errors
def main(arguments: Sequence[str] | None = None, run: Runner = start) -> None:
    options = parse_arguments(arguments)
    if options.fresh:
        set_aside(options.logdir)
    given: dict[str, Any] = {name: getattr(options, name) for name in
                             ("device", "times_steps", "times_batch", "workers", "overrides", "quick")}
    rebuild(Plan(options.outdir.resolve(), options.logdir.resolve(), **given), options.parts, run)


if __name__ == "__main__":
    main()
