"""One training run: flags and YAML files to a config, a log folder, a model, its data and a Lightning trainer."""
from __future__ import annotations

import argparse
import datetime
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.errors import UserError
from ldm.training.callbacks import SetupCallback
from ldm.util import instantiate_from_config, refuse_unknown_params

log = logging.getLogger(__name__)

SECTIONS = {"": ("model", "data", "lightning"), "lightning": ("trainer", "callbacks", "modelcheckpoint")}
FLAG_PATHS = {  # flag: the keys of the config that it sets, those that are there
    "data_root": ("data.params.train.params.data_root", "data.params.validation.params.data_root"),
    "init_word": ("model.params.super_category",),
    "placeholder": ("model.params.placeholder",),
    "masks": ("model.params.mask_root",),
    "actual_resume": ("model.params.ckpt_path",),
}


def get_parser() -> argparse.ArgumentParser:
    """The flags of the LDM family that mean something here, and those of teaching a concept."""
    parser = argparse.ArgumentParser(
        prog="main.py", description="Train what a config describes. Anything of the form key=value after the flags "
        "overrides that key of the YAML, for example: lightning.trainer.max_steps=100")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="base.yaml", help="configs, later ones win")
    parser.add_argument("-n", "--name", default="", help="name of the run's log folder, after the date")
    parser.add_argument("-f", "--postfix", default="", help="text after that name")
    parser.add_argument("-l", "--logdir", default="logs", help="folder of all log folders (default: logs)")
    parser.add_argument("-r", "--resume", default="", help="go on with a run: its log folder or one of its checkpoints")
    parser.add_argument("-t", "--train", nargs="?", const=True, default=True, type=_flag,
                        help="train (the default); '-t false' builds everything, reports, and stops")
    parser.add_argument("--no-test", nargs="?", const=True, default=True, type=_flag,
                        help="kept from the LDM family: testing is done by evaluation/")
    parser.add_argument("-s", "--seed", type=int, default=23, help="seed of everything random (default: 23)")
    parser.add_argument("-d", "--debug", action="store_true", help="show full error traces")
    parser.add_argument("--scale_lr", nargs="?", const=True, default=True, type=_flag,
                        help="multiply base_learning_rate by devices x batch size x accumulation (default: true)")
    parser.add_argument("--data_root", help="folder of 1 to 20 photos of the thing to learn")
    parser.add_argument("--init_word", help='what kind of thing it is: its super-category, e.g. "teddy bear"')
    parser.add_argument("--placeholder", "--placeholder_string", help='its own word in prompts, e.g. "<my-teddy>"')
    parser.add_argument("--masks", help="folder of masks (one picture per photo, same name, white where the thing is), "
                        "or 'none'; by default masks are made automatically")
    parser.add_argument("--actual_resume", help="checkpoint of the base model to start from")
    parser.add_argument("--accelerator", help="cpu, gpu or mps (default: the best there is)")
    parser.add_argument("--devices", help="how many, or which ones")
    parser.add_argument("--max_steps", type=int, help="training steps")
    parser.add_argument("--precision", help="arithmetic, as Lightning names it: 32-true, bf16-mixed, 16-mixed")
    return parser


def _flag(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError("true or false")


def read_config(options: argparse.Namespace, overrides: Sequence[str]) -> DictConfig:
    """The merged config: YAML files in order, then flags, then key=value overrides.

    Raises:
        UserError: a file or an override cannot be read, or a section is not one that a run has.
    """
    if not options.base:
        raise UserError("no config: give one with --base, for example --base configs/perfusion.yaml")
    config = OmegaConf.create()
    for path in options.base:
        if not Path(path).is_file():
            raise UserError(f"--base {path}: no such file")
        config = OmegaConf.merge(config, _parsed(path, lambda path=path: OmegaConf.load(path)))
    for flag, paths in FLAG_PATHS.items():
        if (value := getattr(options, flag)) is not None:
            _set_flag(config, flag, paths, value)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override}: neither a flag (see --help) nor a key=value override")
    overriding = _parsed(" ".join(overrides), lambda: OmegaConf.from_dotlist(list(overrides)))
    config = OmegaConf.merge(config, overriding)
    for place, known in SECTIONS.items():
        unknown = sorted(set(OmegaConf.select(config, place) if place else config) - set(known)) if (
            not place or place in config) else []
        if unknown:
            raise UserError(f"config: unknown key {', '.join(unknown)} in {place or 'the top level'}; "
                            f"known: {', '.join(known)}")
    return config


def _parsed(name: str, read: Any) -> DictConfig:
    try:
        config = read()
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not readable as a config ({reason})") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{name}: a config has keys with values at its top level")
    return config


def _set_flag(config: DictConfig, flag: str, paths: Sequence[str], value: str) -> None:
    present = []
    for path in paths:
        parent = OmegaConf.select(config, path.rpartition(".")[0])
        if isinstance(parent, DictConfig) and path.rpartition(".")[2] in parent:
            present.append(path)
    if not present:
        raise UserError(f"--{flag}: this config has no {' or '.join(paths)} to set")
    for path in present:
        OmegaConf.update(config, path, value)


def log_folder(options: argparse.Namespace, now: str) -> Path:
    """Where the run writes: a new folder, or that of the run to go on with."""
    if not options.resume:
        name = options.name or Path(options.base[0]).stem
        return Path(options.logdir) / f"{now}_{name}{options.postfix}"
    given = Path(options.resume)
    if not given.exists():
        raise UserError(f"--resume {given}: no such log folder or checkpoint")
    folder = given if given.is_dir() else given.parent.parent
    options.checkpoint = folder / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not options.checkpoint.is_file():
        raise UserError(f"--resume {given}: there is no checkpoint {options.checkpoint} to go on from")
    options.base = [*map(str, sorted(folder.glob("configs/*-project.yaml"))), *options.base]
    return folder


def make_trainer(config: DictConfig, options: argparse.Namespace, logdir: Path, now: str,
                 monitor: str | None) -> pl.Trainer:
    """Lightning's trainer with the checkpoints, loggers and callbacks that the config asks for."""
    lightning = config.get("lightning") or OmegaConf.create()
    settings = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "enable_model_summary": False,
                "num_sanity_val_steps": 0, "benchmark": True, "log_every_n_steps": 10}
    settings |= OmegaConf.to_container(lightning.get("trainer") or {}, resolve=True)
    given = {key: getattr(options, key) for key in ("accelerator", "devices", "max_steps", "precision")}
    settings |= {key: value for key, value in given.items() if value is not None}
    refuse_unknown_params("lightning.trainer", pl.Trainer, settings)
    checkpoints = {"dirpath": logdir / "checkpoints", "filename": "{epoch:06}-{step:08}", "save_last": True,
                   "auto_insert_metric_name": False, "monitor": None, "save_top_k": 1}
    checkpoints |= OmegaConf.to_container(lightning.get("modelcheckpoint") or {}, resolve=True)
    refuse_unknown_params("lightning.modelcheckpoint", ModelCheckpoint, checkpoints)
    plain = {"model": config.model, "data": config.data}
    callbacks = [SetupCallback(now, logdir, OmegaConf.create(plain), lightning), ModelCheckpoint(**checkpoints),
                 LearningRateMonitor(logging_interval="step"),
                 *(instantiate_from_config(entry) for entry in (lightning.get("callbacks") or {}).values())]
    logger = TensorBoardLogger(save_dir=logdir, name="", version="tensorboard")
    return pl.Trainer(**settings, callbacks=callbacks, logger=logger, default_root_dir=logdir)


def scaled_learning_rate(config: DictConfig, trainer: pl.Trainer, scale: bool) -> float | None:
    """`model.base_learning_rate`, times devices, batch size and accumulation where `scale` (the LDM family's rule)."""
    rate = config.model.get("base_learning_rate")
    if rate is None or not scale:
        return rate
    return rate * trainer.num_devices * config.data.params.batch_size * trainer.accumulate_grad_batches


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `main.py` with these arguments, those of the command line by default."""
    options, overrides = get_parser().parse_known_args(arguments)
    quiet()
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    logdir = log_folder(options, now) if options.base or options.resume else Path()
    config = read_config(options, overrides)
    pl.seed_everything(options.seed, workers=True, verbose=False)
    known = {key: value for key, value in config.model.items() if key in ("target", "params")}
    model = instantiate_from_config(known).to(memory_format=torch.channels_last)
    data = instantiate_from_config(config.data)
    data.setup()
    trainer = make_trainer(config, options, logdir, now, getattr(model, "monitor", None))
    rate = scaled_learning_rate(config, trainer, options.scale_lr)
    if rate is not None:
        model.learning_rate = rate
        log.info("learning rate %.2e", rate)
    log.info("logs in %s", logdir)
    if options.train:
        trainer.fit(model, data, ckpt_path=str(options.checkpoint) if options.resume else None, weights_only=True)


def quiet() -> None:
    """Silences what libraries say at every start and what no user can act on."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*tensorboardX.*", ".*Checkpoint directory.*",
                    ".*isinstance.treespec.*", ".*`LeafSpec`.*"):
        warnings.filterwarnings("ignore", message=message)
