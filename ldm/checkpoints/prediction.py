"""Find out what a checkpoint's network predicts (noise, v or the image) from what its files say. Imports no torch.

Weights of models that predict noise and of those that predict v look alike. Read as the wrong kind, they generate
noise. Models that were trained with zero terminal SNR (Lin et al. 2023) say so, too.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.checkpoints.header import read_header
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path

log = logging.getLogger(__name__)

PREDICTIONS = {"epsilon": "eps", "eps": "eps", "noise": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v",
               "velocity": "v", "vpred": "v", "sample": "x0", "x0": "x0"}
METADATA_KEYS = ("modelspec.prediction_type", "prediction_type", "modelspec.predict_type", "modelspec.predict_key")
V_PRED, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
V_KEYS = (V_PRED, ZERO_TERMINAL_SNR)  # empty tensors by which files say it that have no metadata
REMEDIES = {
    "v": "use a config with parameterization: v, such as configs/stable-diffusion/v2-inference-v.yaml",
    "eps": "use a config with parameterization: eps, such as configs/stable-diffusion/v1-inference.yaml or "
           "v2-inference.yaml",
    "x0": "use a config with parameterization: x0",
}


class Prediction(NamedTuple):
    """What a network predicts.

    Attributes:
        kind: "eps", "v" or "x0".
        source: what says so, for messages.
        zero_terminal_snr: whether it was trained on a schedule that ends in pure noise.
    """

    kind: str
    source: str
    zero_terminal_snr: bool = False


def stated_prediction(path: Path) -> Prediction | None:
    """Return what a checkpoint file or diffusers folder, or a config beside it, says; None if nothing does."""
    if path.is_dir():
        scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
        return _prediction(scheduler.get("prediction_type"), "its scheduler",
                           scheduler.get("rescale_betas_zero_snr") is True)
    return _in_header(path) or _in_config(path)


def stated_params(params: Mapping[str, Any], known: Collection[str], path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint says about its network and the params of a config leave open; log it in one line.

    Args:
        params: the params of the model in the config. What they state stays.
        known: names of the params that the model has.
        path: the checkpoint.

    Returns:
        `parameterization`, `zero_terminal_snr`, both or none.
    """
    stated = stated_prediction(resolve_path(path))
    if stated is None or stated.kind == "eps" or params.get("parameterization", stated.kind) != stated.kind:
        return {}
    says = {"parameterization": stated.kind} | ({"zero_terminal_snr": True} if stated.zero_terminal_snr else {})
    added = {key: value for key, value in says.items() if key in known and key not in params}
    if added:
        settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in added.items())
        log.info("%s: %s says that the model predicts %s, and the config says nothing; using %s", path, stated.source,
                 stated.kind, settings)
    return added


def prediction_remedy(kind: str) -> str:
    """Return what to do if a network predicts something else than its config says."""
    return REMEDIES[kind]


def _in_header(path: Path) -> Prediction | None:
    try:
        header = read_header(path)
    except UserError:
        return None
    if header is None:
        return None
    zero_snr = ZERO_TERMINAL_SNR in header.shapes
    for key in METADATA_KEYS:
        if found := _prediction(header.metadata.get(key), f"its metadata ({key})", zero_snr):
            return found
    marked = [key for key in V_KEYS if key in header.shapes]
    return Prediction("v", f"its key {marked[0]}", zero_snr) if marked else None


def _in_config(path: Path) -> Prediction | None:
    """Return what the config beside a checkpoint says, which has the same name or is called config.yaml."""
    for config in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
            params = content["model"]["params"]
            if "unet_config" not in params:
                continue
            return _prediction(params.get("parameterization", "eps"), f"{config.name} beside it",
                               params.get("zero_terminal_snr") is True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
            continue
    return None


def _prediction(stated: Any, source: str, zero_snr: bool = False) -> Prediction | None:
    kind = PREDICTIONS.get(stated.strip().lower()) if isinstance(stated, str) else None
    return Prediction(kind, source, zero_snr and kind == "v") if kind else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
