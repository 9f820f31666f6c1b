"""Build Lightning's trainer from a run's config."""
from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.common.errors import UserError
from ldm.common.paths import expand_home
from ldm.personalization.base import PersonalizationMethod
from ldm.training.callbacks import AccelerateFrozenUNet, SetupCallback, StepProgress, StopAfterStep, WholeEpochs
from ldm.training.checkpoint_io import AtomicCheckpointIO
from ldm.training.concept_callbacks import BeforeDuringAfter, ConceptSaver
from ldm.util import check_param_names, check_param_types, get_obj_from_str, instantiate_from_config, user_error_for

MODEL_SECTIONS = ("model", "data", "inference")  # of a config that the log folder keeps with the model


def make_trainer(config: DictConfig, logdir: Path, now: str) -> pl.Trainer:
    """Return a trainer with the checkpoints, loggers and callbacks that the config asks for.

    Args:
        config: config of the run, from `read_config`.
        logdir: the run's log folder.
        now: date and time, for the file names of this session.

    Raises:
        UserError: a setting of the section `lightning` is unknown or cannot be used.
    """
    lightning = config.lightning
    settings = {"accelerator": "auto", "devices": 1, "max_epochs": -1, "enable_model_summary": False,
                "num_sanity_val_steps": 0, "benchmark": True, "log_every_n_steps": 10}
    settings |= OmegaConf.to_container(lightning.trainer, resolve=True)
    _check_settings("lightning.trainer", pl.Trainer, settings)
    if settings.get("max_steps") == 0 and not OmegaConf.select(config, "model.params.encoder"):
        raise UserError("lightning.trainer: max_steps 0 trains nothing; give 1 or more, or an encoder that predicts "
                        "the concept (configs/perfusion-fast.yaml)")
    saved_config = OmegaConf.create({name: config[name] for name in MODEL_SECTIONS if name in config})
    setup = SetupCallback(None, now, logdir, ckptdir=logdir / "checkpoints", cfgdir=logdir / "configs",
                          config=saved_config, lightning_config=lightning)
    callbacks = [setup, _make_checkpoint_callback(lightning, logdir), LearningRateMonitor(logging_interval="step"),
                 StepProgress(), WholeEpochs(), StopAfterStep(), AccelerateFrozenUNet(),
                 *_make_config_callbacks(config)]
    logger = TensorBoardLogger(save_dir=logdir, name="", version="tensorboard")
    with user_error_for("lightning.trainer, --accelerator or --devices cannot be used", MisconfigurationException):
        trainer = pl.Trainer(**settings, callbacks=callbacks, logger=logger, default_root_dir=logdir)
    with contextlib.suppress(TypeError):  # raised on a TPU, which has its own way
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer


def _make_checkpoint_callback(lightning: DictConfig, logdir: Path) -> ModelCheckpoint:
    settings = {"dirpath": logdir / "checkpoints", "filename": "{epoch:06}-{step:08}", "save_last": True,
                "auto_insert_metric_name": False, "monitor": None, "save_top_k": 1,
                "enable_version_counter": False}  # --resume looks for last.ckpt, not for last-v1.ckpt
    settings |= OmegaConf.to_container(lightning.get("modelcheckpoint") or OmegaConf.create(), resolve=True)
    _check_settings("lightning.modelcheckpoint", ModelCheckpoint, settings)
    settings["dirpath"] = expand_home(settings["dirpath"])
    with user_error_for("lightning.modelcheckpoint cannot be used", MisconfigurationException):
        return ModelCheckpoint(**settings)


def _make_config_callbacks(config: DictConfig) -> list[pl.Callback]:
    """Return the callbacks that the config names, after a `ConceptSaver` if the run learns concepts."""
    entries = (config.lightning.get("callbacks") or {}).values()
    named = [instantiate_from_config(entry) for entry in entries if entry is not None]  # null leaves one out
    for callback in named:
        if isinstance(callback, BeforeDuringAfter):
            callback.config = config
    savers = [callback for callback in named if isinstance(callback, ConceptSaver)]
    others = [callback for callback in named if not isinstance(callback, ConceptSaver)]
    if not savers and _learns_concepts(config):
        savers = [ConceptSaver()]
    return [*savers, *others]


def _learns_concepts(config: DictConfig) -> bool:
    target = get_obj_from_str(config.model.target) if config.model.get("target") else None
    return inspect.isclass(target) and issubclass(target, PersonalizationMethod)


def _check_settings(name: str, target: type, settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings that the target does not have, or that are out of range."""
    check_param_names(name, target, settings)
    check_param_types(name, target, settings)
    if settings.get("accumulate_grad_batches") == 0:
        raise UserError(f"{name}: accumulate_grad_batches 0 trains nothing; give 1 or more")


@contextlib.contextmanager
def restored_torch_settings() -> Iterator[None]:
    """Restore afterwards what a trainer sets for the whole process: determinism, and how convolutions are chosen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
