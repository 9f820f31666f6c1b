"""The commands that a run ends with: how to generate with what it has learned."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from ldm.common.paths import quote_command, resolve_path

DEFAULT_CONFIG = "configs/perfusion.yaml"  # what scripts/txt2img.py uses without --config
MODEL_PARAMS = ("ckpt_path", "covariance")  # what makes a base model another one


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
    own_params = OmegaConf.load(configs[-1]).model.params
    if default.is_file():
        params = OmegaConf.load(default).model.params
        if all(own_params.get(name) == params.get(name) for name in MODEL_PARAMS):
            return ""
    return f"--config {quote_command(configs[-1])} "
