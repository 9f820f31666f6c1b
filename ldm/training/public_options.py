"""Options and settings of the LDM family's main.py, in the words of this project's configs."""
from __future__ import annotations

import logging
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from ldm.common.errors import UserError
from ldm.training.options import TrainingOptions

log = logging.getLogger(__name__)

INVERSION = "model.params.personalization_config"
DATA_SECTIONS = ("train", "reg", "validation")


def flatten_checkpoint_settings(config: DictConfig) -> DictConfig:
    """Replace `lightning.modelcheckpoint: {target: ..., params: ...}` by its params, in place; return the config."""
    lightning = config.get("lightning")
    settings = lightning.get("modelcheckpoint") if isinstance(lightning, DictConfig) else None
    if isinstance(settings, DictConfig) and isinstance(settings.get("params"), DictConfig):
        config.lightning.modelcheckpoint = settings.params
    return config


def use_gpus(trainer: DictConfig) -> None:
    """Replace Lightning 1's `gpus`, if it is there: "0," is the first GPU, "2" are two. Without a GPU it is the CPU.

    Args:
        trainer: the section `lightning.trainer`, which is changed.
    """
    gpus = trainer.pop("gpus", None)
    if gpus is None:
        return
    import torch  # only now: without this setting nothing here needs it

    if torch.cuda.is_available():
        trainer.accelerator, trainer.devices = "gpu", str(gpus)
    else:
        log.warning("--gpus %s: this machine has no CUDA device; training without one (other devices: "
                    "--accelerator and --devices)", gpus)
        trainer.accelerator, trainer.devices = "auto", 1


def apply_public_options(config: DictConfig, options: TrainingOptions) -> TrainingOptions:
    """Set what only public configs have, and return the options that are left.

    Raises:
        UserError: the config has no place for an option.
    """
    if options.gpus is not None:
        config.lightning.trainer.gpus = options.gpus
    if options.reg_data_root is not None:
        _params_of(config, "data.params.reg", "--reg_data_root").data_root = options.reg_data_root
    if options.class_word is not None:
        _params_of(config, "data.params.reg", "--class_word")
        _set_placeholder(config, options.class_word)
    if OmegaConf.select(config, INVERSION) is not None:
        return _apply_inversion_options(config, options)
    if options.embedding_manager_ckpt is not None:
        raise UserError("--embedding_manager_ckpt: this config has no personalization_config to start from; give one "
                        "such as configs/stable-diffusion/v1-finetune.yaml, or continue the run of a concept with "
                        "--resume LOG_FOLDER")
    return options


def _apply_inversion_options(config: DictConfig, options: TrainingOptions) -> TrainingOptions:
    """Set the words and the first vectors of Textual Inversion's `EmbeddingManager`."""
    params = _params_of(config, INVERSION, "--init_word")
    if options.super_category is not None:
        first, *_ = options.super_category
        params.initializer_words = [first, *(params.get("initializer_words") or [])[1:]]
    if options.placeholder is not None:
        params.placeholder_strings = list(options.placeholder)
        _set_placeholder(config, options.placeholder[0])
    if options.embedding_manager_ckpt:
        params.embedding_manager_ckpt = options.embedding_manager_ckpt
    return replace(options, super_category=None, placeholder=None)


def _set_placeholder(config: DictConfig, word: str) -> None:
    """Set the word that stands for the concept in the captions of every data set."""
    for name in DATA_SECTIONS:
        if OmegaConf.select(config, f"data.params.{name}") is not None:
            _params_of(config, f"data.params.{name}", "--placeholder").placeholder_token = word


def _params_of(config: DictConfig, section: str, flag: str) -> DictConfig:
    """Return the params of a section, created if need be."""
    found = OmegaConf.select(config, section)
    if not isinstance(found, DictConfig):
        raise UserError(f"{flag}: this config has no {section} to set")
    if not isinstance(found.get("params"), DictConfig):
        found.params = {}
    return found.params
