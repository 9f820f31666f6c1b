"""One training run: a log folder, a model, its data and a Lightning trainer, as flags and configs describe them."""
from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.checkpoints.deferred_init import DeferredInit
from ldm.common.errors import MemoryShortage, UserError, is_out_of_memory
from ldm.common.paths import check_folder
from ldm.training.callbacks import AccelerateFrozenUNet, SetupCallback, StepProgress, StopAfterStep, WholeEpochs
from ldm.training.config import get_parser, read_config
from ldm.training.log_folder import folder_for, steps_taken
from ldm.util import check_param_names, check_param_types, instantiate_from_config, user_error_for

log = logging.getLogger(__name__)

TO_THE_SECOND = "%Y-%m-%dT%H-%M-%S"


def log_folder(options: argparse.Namespace, now: str) -> Path:
    """Where the run writes: a new folder, or that of the run to go on with."""
    if not options.resume:
        name = (options.name or Path(options.base[-1]).stem) + options.postfix
        if Path(name).name != name:
            raise UserError(f"--name {name}: names a folder in --logdir; leave out what is no name")
        check_folder("--logdir", Path(options.logdir))
        return Path(options.logdir) / f"{now}_{name}"
    given = Path(options.resume)
    if not given.exists():
        raise UserError(f"--resume {given}: no such log folder or checkpoint")
    folder = given if given.is_dir() else given.parent.parent
    options.checkpoint = folder / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not options.checkpoint.is_file():
        raise UserError(f"--resume {given}: there is no checkpoint {options.checkpoint} to go on from")
    options.steps_taken = steps_taken(options.checkpoint)
    options.base = [*map(str, sorted(folder.glob("configs/*.yaml"))), *options.base]
    if not options.base:
        raise UserError(f"--resume {given}: {folder} has no configs/*.yaml of its run; name its config with --base")
    return folder


def make_trainer(config: DictConfig, logdir: Path, now: str) -> pl.Trainer:
    """Lightning's trainer with the checkpoints, loggers and callbacks that the config asks for."""
    lightning = config.lightning
    settings = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "enable_model_summary": False,
                "num_sanity_val_steps": 0, "benchmark": True, "log_every_n_steps": 10}
    settings |= OmegaConf.to_container(lightning.trainer, resolve=True)
    _check_settings("lightning.trainer", pl.Trainer, settings)
    checkpoints = {"dirpath": logdir / "checkpoints", "filename": "{epoch:06}-{step:08}", "save_last": True,
                   "auto_insert_metric_name": False, "monitor": None, "save_top_k": 1,
                   "enable_version_counter": False}  # --resume looks for last.ckpt, not for last-v1.ckpt
    checkpoints |= OmegaConf.to_container(lightning.get("modelcheckpoint") or OmegaConf.create(), resolve=True)
    _check_settings("lightning.modelcheckpoint", ModelCheckpoint, checkpoints)
    plain = {"model": config.model, "data": config.data}
    named = (lightning.get("callbacks") or {}).values()
    own = [instantiate_from_config(entry) for entry in named if entry is not None]  # null leaves one out
    with user_error_for("lightning.modelcheckpoint cannot be used", MisconfigurationException):
        callbacks = [SetupCallback(now, logdir, OmegaConf.create(plain), lightning), ModelCheckpoint(**checkpoints),
                     LearningRateMonitor(logging_interval="step"), StepProgress(), WholeEpochs(), StopAfterStep(),
                     AccelerateFrozenUNet(), *own]
    logger = TensorBoardLogger(save_dir=logdir, name="", version="tensorboard")
    with user_error_for("lightning.trainer, --accelerator or --devices cannot be used", MisconfigurationException):
        return pl.Trainer(**settings, callbacks=callbacks, logger=logger, default_root_dir=logdir)


def _check_settings(name: str, target: type, settings: Mapping[str, Any]) -> None:
    """Raises a UserError for settings that the target does not have, or not in this range."""
    check_param_names(name, target, settings)
    check_param_types(name, target, settings)
    for key in ("max_steps", "accumulate_grad_batches"):
        if settings.get(key) == 0:
            raise UserError(f"{name}: {key} 0 trains nothing; give 1 or more")


def scaled_learning_rate(config: DictConfig, trainer: pl.Trainer, scale: bool) -> float | None:
    """`model.base_learning_rate`, times devices, batch size and accumulation where `scale` (the LDM family's rule)."""
    rate = config.model.get("base_learning_rate")
    if rate is None or not scale:
        return rate
    return rate * trainer.num_devices * config.data.params.batch_size * trainer.accumulate_grad_batches


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `main.py` with these arguments, those of the command line by default."""
    options, overrides = get_parser().parse_known_args(arguments)
    try:
        _run(options, overrides)
    except UserError:
        if options.debug:
            traceback.print_exc()
        raise


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    quiet()
    started = datetime.datetime.now()
    logdir = log_folder(options, started.strftime(TO_THE_SECOND)) if options.base or options.resume else Path()
    config = read_config(options, overrides)
    most = config.lightning.trainer.get("max_steps", -1)
    if options.resume and 0 <= most <= options.steps_taken:
        raise UserError(f"--resume {options.resume}: has taken {options.steps_taken} steps of {most}; "
                        "to go on, give more with --max_steps")
    pl.seed_everything(config.lightning.seed, workers=True, verbose=False)
    now = started.strftime(f"{TO_THE_SECOND}.%f")  # of what a run keeps: it may be resumed within the second
    trainer: pl.Trainer | None = None
    with _place(options, logdir, lambda: trainer is not None and trainer.global_step > 0) as place, _short_of(config):
        trainer = make_trainer(config, Path(place), now)
        data, model = _parts(config, trainer)
        rate = scaled_learning_rate(config, trainer, options.scale_lr)
        if rate is not None:
            model.learning_rate = rate
            log.info("learning rate %.2e", rate)
        if not options.train:
            log.info("model and data are ready; with '-t false' that is all")
            return
        if options.resume:
            trainer.ckpt_path = str(options.checkpoint)  # known before the model prepares itself
        trainer.fit(model, data, weights_only=True)


def _place(options: argparse.Namespace, logdir: Path, begun: Callable[[], bool]
           ) -> contextlib.AbstractContextManager[str | Path]:
    """The folder that this process writes to."""
    if rank_zero_only.rank:  # of the other processes of a run nothing is kept
        return tempfile.TemporaryDirectory()
    return contextlib.nullcontext(logdir) if options.resume else folder_for(logdir, begun)


@contextlib.contextmanager
def _short_of(config: DictConfig) -> Iterator[None]:
    """Says what to do where memory or room on the disk does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortage(
            f"memory is too short for batches of {config.data.params.get('batch_size')}; lower data.params.batch_size "
            "(and raise lightning.trainer.accumulate_grad_batches as much, for the same steps), or set "
            "model.params.unet_config.params.use_checkpoint=true where it is not") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{error.filename or 'the log folder'}: no room is left on the disk; make some and go on with "
                        "--resume, or name another place with --logdir") from error


def _parts(config: DictConfig, trainer: pl.Trainer) -> tuple[pl.LightningDataModule, pl.LightningModule]:
    """What the config describes, ready to be trained; what is cheap comes first, to find mistakes."""
    data = instantiate_from_config(config.data)
    _refuse_other_kinds("data", data, pl.LightningDataModule)
    data.setup()
    with DeferredInit():
        model = instantiate_from_config({key: config.model[key] for key in ("target", "params") if key in config.model})
    _refuse_other_kinds("model", model, pl.LightningModule)
    most = getattr(model, "most_devices", trainer.world_size)
    if trainer.world_size > most:
        allowed = "one device" if most == 1 else f"at most {most} devices, one for each concept"
        raise UserError(f"{config.model.target} is trained on {allowed}; "
                        f"leave out --devices {config.lightning.trainer.devices}")
    device = trainer.strategy.root_device if trainer.num_devices == 1 else None  # which rearranges weights sooner
    return data, model.to(device, memory_format=torch.channels_last)


def _refuse_other_kinds(section: str, built: object, kind: type) -> None:
    if not isinstance(built, kind):
        raise UserError(f"config: {section}.target must name a {kind.__name__}, not a {type(built).__name__}")


def quiet() -> None:
    """Silences what libraries say at every start and what no user can act on."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line per attempt where there is no network
    transformers.utils.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*tensorboardX.*", ".*Checkpoint directory.*",
                    ".*isinstance.treespec.*", ".*`LeafSpec`.*", ".*in eval mode at the start of training.*",
                    ".*have no `val_dataloader`.*"):
        warnings.filterwarnings("ignore", message=message)
