"""One training run: a log folder, a model, its data and a Lightning trainer, as flags and configs describe them."""
from __future__ import annotations

import argparse
import datetime
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.errors import UserError
from ldm.training.callbacks import SetupCallback, StepProgress, StopAfterStep
from ldm.training.options import get_parser, read_config
from ldm.util import instantiate_from_config, refuse_unknown_params

log = logging.getLogger(__name__)

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
    options.base = [*map(str, sorted(folder.glob("configs/*.yaml"))), *options.base]
    return folder


def make_trainer(config: DictConfig, logdir: Path, now: str) -> pl.Trainer:
    """Lightning's trainer with the checkpoints, loggers and callbacks that the config asks for."""
    lightning = config.lightning
    settings = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "enable_model_summary": False,
                "num_sanity_val_steps": 0, "benchmark": True, "log_every_n_steps": 10}
    settings |= OmegaConf.to_container(lightning.trainer, resolve=True)
    refuse_unknown_params("lightning.trainer", pl.Trainer, settings)
    checkpoints = {"dirpath": logdir / "checkpoints", "filename": "{epoch:06}-{step:08}", "save_last": True,
                   "auto_insert_metric_name": False, "monitor": None, "save_top_k": 1}
    checkpoints |= OmegaConf.to_container(lightning.get("modelcheckpoint") or {}, resolve=True)
    refuse_unknown_params("lightning.modelcheckpoint", ModelCheckpoint, checkpoints)
    plain = {"model": config.model, "data": config.data}
    callbacks = [SetupCallback(now, logdir, OmegaConf.create(plain), lightning), ModelCheckpoint(**checkpoints),
                 LearningRateMonitor(logging_interval="step"), StepProgress(), StopAfterStep(),
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
    pl.seed_everything(config.lightning.seed, workers=True, verbose=False)
    model = instantiate_from_config({key: config.model[key] for key in ("target", "params") if key in config.model})
    model.to(memory_format=torch.channels_last)
    data = instantiate_from_config(config.data)
    data.setup()
    trainer = make_trainer(config, logdir, now)
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
    transformers.utils.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*tensorboardX.*", ".*Checkpoint directory.*",
                    ".*isinstance.treespec.*", ".*`LeafSpec`.*", ".*in eval mode at the start of training.*",
                    ".*have no `val_dataloader`.*"):
        warnings.filterwarnings("ignore", message=message)
