"""Rebuild everything in `models/mini/` from its sources, part by part, and measure the result.

    python scripts/mini/rebuild.py                                               # two cores: overnight
    python scripts/mini/rebuild.py --device cuda --times_batch 8 --workers 12    # one GPU

Fetches sprites if any are missing. Trains the autoencoder, its decoder once more, both CLIPs, the text-to-image model,
the segmenter and the concept encoder with `main.py`, and exports them. Makes the covariance and the example concepts,
and measures everything with `evaluation/base_model.py`. After an interruption, run it again: it skips the parts that
are done and resumes the interrupted one at its last checkpoint. `training.json`, beside the weights, describes what was
done.

PART:KEY=VALUE after the flags overrides a key of that part's config, for example:
    text2img:lightning.trainer.precision=bf16-mixed clip:lightning.trainer.max_steps=5000
"""
from __future__ import annotations

import datetime
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ldm.common.threads import use_passive_waiting  # noqa: E402

use_passive_waiting()  # before torch is imported

from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import PROJECT_ROOT, check_folder, user_path  # noqa: E402
from ldm.data.mini.world import KIND_NAMES, sprite_sets  # noqa: E402
from ldm.training.run_record import read_records, trained_steps  # noqa: E402

log = logging.getLogger(__name__)

MINI = PROJECT_ROOT / "models" / "mini"
# In the order in which they need each other; see INPUTS.
TRAINED = ("autoencoder", "decoder", "clip", "evaluation_clip", "text2img", "segmenter", "encoder")
PARTS = ("sprites", "autoencoder", "decoder", "clip", "evaluation_clip", "text2img", "covariance", "segmenter",
         "encoder", "concepts", "evaluation")
OLD_NAMES = {"drawings": "sprites"}
INPUTS = {  # what a part is trained with: key of its config -> file in the models' folder
    "decoder": {"model.params.ckpt_path": "parts/autoencoder.safetensors"},
    "text2img": {"model.params.first_stage_config.params.ckpt_path": "parts/autoencoder.safetensors",
                 "model.params.cond_stage_config.params.version": "parts/text_encoder"},
    "segmenter": {"model.params.clip": "clip"},
    "encoder": {"model.params.ckpt_path": "model.safetensors", "model.params.tower": "clip"},
}
SCHEDULE = "model.params.scheduler_config.params.max_decay_steps"
STEPS = "lightning.trainer.max_steps"
ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}
ScriptRunner = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class RebuildSettings:
    """The settings of a rebuild.

    Attributes:
        folder: folder of the models.
        logdir: folder of all log folders.
        device: cpu, cuda or mps; None: the fastest available.
        steps_factor: multiplies the training steps of the configs.
        batch_factor: multiplies the batch sizes of the configs.
        workers: number of processes that compose scenes.
        overrides: (part, "key=value") pairs.
        quick: whether the evaluation is the quick one.
    """

    folder: Path
    logdir: Path
    device: str | None = None
    steps_factor: float = 1.0
    batch_factor: float = 1.0
    workers: int = 0
    overrides: Sequence[tuple[str, str]] = ()
    quick: bool = False

    def config_overrides(self, part: str) -> list[str]:
        """Return the key=value pairs for main.py with which a part is trained.

        The learning rate is scaled with the square root of the batch size, as suits Adam (Malladi et al., "On the SDEs
        and Scaling Rules for Adaptive Gradient Algorithms", 2022). main.py multiplies the base learning rate by the
        batch size, so the base is divided by the square root.
        """
        config, values = OmegaConf.load(config_path(part)), {"data.params.num_workers": self.workers}
        if self.steps_factor != 1:
            steps = max(1, round(OmegaConf.select(config, STEPS) * self.steps_factor))
            values |= {STEPS: steps, SCHEDULE: steps}
        if self.batch_factor != 1:
            batch = max(1, round(config.data.params.batch_size * self.batch_factor))
            factor = batch / config.data.params.batch_size
            values |= {"data.params.batch_size": batch,
                       "model.base_learning_rate": config.model.base_learning_rate / math.sqrt(factor)}
        values |= {key: self.folder / file for key, file in INPUTS.get(part, {}).items()}
        given = [override for name, override in self.overrides if name == part]
        return [*(f"{key}={value}" for key, value in values.items()), *given]

    def steps(self, part: str) -> int:
        """Return the number of training steps of a part."""
        merged = OmegaConf.merge(OmegaConf.load(config_path(part)), OmegaConf.from_dotlist(self.config_overrides(part)))
        return int(OmegaConf.select(merged, STEPS))


def config_path(part: str) -> Path:
    """Return the file of a part's config."""
    return PROJECT_ROOT / "configs" / "mini" / f"{part}.yaml"


def newest_run(logdir: Path, part: str) -> Path | None:
    """Return the newest log folder of a part's training that has a checkpoint to resume; None if there is none."""
    runs = [run for run in sorted(logdir.glob(f"*_{part}"))
            if (run / "checkpoints" / "last.ckpt").is_file() and run.name.partition("_")[2] == part]
    return runs[-1] if runs else None


def train_and_export(settings: RebuildSettings, part: str, run_script: ScriptRunner) -> None:
    """Train a part, or resume its training, and export it. Skips what is done already."""
    run = newest_run(settings.logdir, part)
    if run is None or trained_steps(run) < settings.steps(part):
        new_run = ["--base", str(config_path(part)), "-n", part, "-l", str(settings.logdir)]
        accelerator = ["--accelerator", ACCELERATORS[settings.device]] if settings.device else []
        log.info("%s: %s", part, f"resuming {run}" if run else "training")
        run_script(["main.py", *(["--resume", str(run)] if run else new_run), *accelerator,
                    *settings.config_overrides(part)])
    run = newest_run(settings.logdir, part)
    if run is None:
        raise UserError(f"{part}: training left no checkpoint in {settings.logdir}; see its messages")
    exported = read_records(settings.folder / "training.json").get(part, {})
    if (exported.get("run"), exported.get("steps")) != (run.name, trained_steps(run)):
        run_script(["scripts/mini/export.py", part, str(run), "--outdir", str(settings.folder)])
    else:
        log.info("%s: is exported already", part)


def make(settings: RebuildSettings, part: str, run_script: ScriptRunner) -> None:
    """Make or measure a part that is not trained."""
    files = {"--ckpt": "model.safetensors", "--clip": "clip", "--segmenter": "segmenter",
             "--evaluation_clip": "evaluation_clip", "--weights": ""}
    models = [word for flag, file in files.items() for word in (flag, str(settings.folder / file))]
    device = ["--device", settings.device] if settings.device else []
    commands = {
        "sprites": ["scripts/mini/fetch_sprites.py"],
        "covariance": ["scripts/mini/export.py", "covariance", "--outdir", str(settings.folder)],
        "concepts": ["scripts/mini/make_example_concepts.py"],
        "evaluation": ["evaluation/base_model.py", *models, *device, *(["--quick"] if settings.quick else []),
                       "--outdir", str(settings.logdir / "evaluation")]}
    if part == "sprites" and all(map(sprite_sets, KIND_NAMES)):
        log.info("sprites: none are missing")
    else:
        run_script(commands[part])


def rebuild(settings: RebuildSettings, parts: Sequence[str], run_script: ScriptRunner) -> None:
    """Rebuild `parts` in the order of `PARTS`, without those that are done already.

    Args:
        parts: names in `PARTS`.
        run_script: runs a script with its arguments.

    Raises:
        UserError: a step failed. The parts before it stay done.
    """
    for part in PARTS:
        if part in TRAINED and part in parts:
            train_and_export(settings, part, run_script)
        elif part in parts:
            make(settings, part, run_script)


def run_in_project(command: Sequence[str]) -> None:
    """Run a script of the project in the project's folder.

    Raises:
        UserError: the script fails.
    """
    result = subprocess.run([sys.executable, *command], cwd=PROJECT_ROOT)
    if result.returncode:
        raise UserError(f"{command[0]} failed ({result.returncode}); fix what it says above and run this again: the "
                        "parts that are done are skipped")


def rename_earlier_runs(logdir: Path) -> None:
    """Rename the folder of earlier runs, so that everything is trained again."""
    if logdir.exists():
        renamed = logdir.with_name(f"{logdir.name}-until-{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}")
        try:
            logdir.rename(renamed)
        except OSError as error:
            raise UserError(f"--logdir {logdir}: cannot be renamed ({error.strerror}); move it, or name another folder"
                            ) from None
        log.info("earlier runs are now in %s", renamed)


@dataclass(frozen=True)
class RebuildOptions:
    """The command line: how and what to rebuild, and whether to repeat finished trainings."""

    settings: RebuildSettings
    parts: tuple[str, ...]
    fresh: bool


def parse_arguments(arguments: Sequence[str] | None = None) -> RebuildOptions:
    """Read the command line.

    Raises:
        UserError: a flag or an override is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("--parts", nargs="+", type=lambda name: OLD_NAMES.get(name, name), choices=PARTS,
                        default=list(PARTS), metavar="PART",
                        help=f"what to rebuild (default: all of {', '.join(PARTS)})")
    parser.add_argument("--fresh", action="store_true", help="train anew what earlier rebuilds in --logdir trained")
    parser.add_argument("--device", choices=ACCELERATORS, help="default: the fastest available")
    parser.add_argument("--times_steps", type=float_in_range(above=0), default=1.0, metavar="NUMBER",
                        help="multiplies the training steps of the configs (default: 1)")
    parser.add_argument("--times_batch", type=float_in_range(above=0), default=1.0, metavar="NUMBER",
                        help="multiplies the batch sizes; learning rates grow with the square root (default: 1)")
    parser.add_argument("--workers", type=int_in_range(0), default=0, metavar="N",
                        help="processes that compose scenes beside the training; a GPU needs many (default: 0)")
    parser.add_argument("--quick", action="store_true", help="measure the result only roughly")
    parser.add_argument("--outdir", type=user_path, default=MINI, metavar="FOLDER",
                        help="folder of the models (default: models/mini, which replaces the bundled ones)")
    parser.add_argument("--logdir", type=user_path, default=PROJECT_ROOT / "logs" / "mini", metavar="FOLDER",
                        help="folder of the training runs (default: logs/mini)")
    options, rest = parser.parse_known_args(arguments)
    overrides = tuple(_read_override(text) for text in rest)
    for flag in ("outdir", "logdir"):
        check_folder(f"--{flag}", getattr(options, flag))
    settings = RebuildSettings(
        options.outdir.resolve(), options.logdir.resolve(), options.device, steps_factor=options.times_steps,
        batch_factor=options.times_batch, workers=options.workers, overrides=overrides, quick=options.quick)
    return RebuildOptions(settings, tuple(options.parts), options.fresh)


def _read_override(text: str) -> tuple[str, str]:
    part, colon, override = text.partition(":")
    if part not in TRAINED or not colon or "=" not in override:
        raise UserError(f"{text}: neither a flag (see --help) nor PART:KEY=VALUE with a part of {', '.join(TRAINED)}")
    return part, override


@one_line_errors
def main(arguments: Sequence[str] | None = None, run_script: ScriptRunner = run_in_project) -> None:
    options = parse_arguments(arguments)
    if options.fresh:
        rename_earlier_runs(options.settings.logdir)
    rebuild(options.settings, options.parts, run_script)


if __name__ == "__main__":
    main()
