"""The command that a run logs at its end: how to generate with its concepts."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm.common.paths import quote_command, resolve_path
from ldm.inference.model_config import inference_defaults, model_setting

DEFAULT_CONFIG = "models/mini/config.yaml"  # what scripts/txt2img.py uses without --config


def generation_command(logdir: str | Path, concepts: Sequence[Path], placeholders: Sequence[str]) -> str:
    """Return the command that generates an image of each concept.

    Args:
        logdir: the run's log folder.
        concepts: the concepts' files.
        placeholders: their words in prompts.
    """
    prompts = " ".join(f'"a photo of a {placeholder} on the beach"' for placeholder in placeholders)
    return f"python scripts/txt2img.py {config_flag(logdir)}--concept {quote_command(*concepts)} --prompt {prompts}"


def config_flag(logdir: str | Path) -> str:
    """Return the flag that names the run's own config, or "" if the scripts' default has the same base model."""
    configs = sorted((Path(logdir) / "configs").glob("*-project.yaml"))
    if not configs:
        return ""
    default = resolve_path(DEFAULT_CONFIG)
    if default.is_file() and _base_model(default) == _base_model(configs[-1]):
        return ""
    return f"--config {quote_command(configs[-1])} "


def _base_model(path: Path) -> tuple[str | None, str | None]:
    """Return the weights and the covariance that a config names."""
    config = OmegaConf.load(path)
    covariance = model_setting(config, "params.covariance") or inference_defaults(config).covariance
    return model_setting(config, "params.ckpt_path"), covariance
