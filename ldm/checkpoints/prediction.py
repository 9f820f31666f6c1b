"""Find out what a checkpoint's network predicts (noise, v or the image) from what its files say. Imports no torch.

Weights of models that predict noise and of those that predict v look alike. Read as the wrong kind, they generate
noise.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.checkpoints.header import read_header
from ldm.common.errors import UserError

PREDICTIONS = {"epsilon": "eps", "eps": "eps", "noise": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v",
               "velocity": "v", "vpred": "v", "sample": "x0", "x0": "x0"}
METADATA_KEYS = ("modelspec.prediction_type", "prediction_type", "modelspec.predict_type")
V_KEYS = ("v_pred", "ztsnr")  # empty tensors by which files say it that have no metadata
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
    """

    kind: str
    source: str


def stated_prediction(path: Path) -> Prediction | None:
    """Return what a checkpoint file or diffusers folder, or a config beside it, says; None if nothing does."""
    if path.is_dir():
        return _prediction(_read_json(path / "scheduler" / "scheduler_config.json").get("prediction_type"),
                           "its scheduler")
    return _in_header(path) or _in_config(path)


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
    for key in METADATA_KEYS:
        if found := _prediction(header.metadata.get(key), f"its metadata ({key})"):
            return found
    marked = [key for key in V_KEYS if key in header.shapes]
    return Prediction("v", f"its key {marked[0]}") if marked else None


def _in_config(path: Path) -> Prediction | None:
    """Return what the config beside a checkpoint says, which has the same name or is called config.yaml."""
    for config in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
            params = content["model"]["params"]
            if "unet_config" not in params:
                continue
            return _prediction(params.get("parameterization", "eps"), f"{config.name} beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
            continue
    return None


def _prediction(stated: Any, source: str) -> Prediction | None:
    kind = PREDICTIONS.get(stated.strip().lower()) if isinstance(stated, str) else None
    return Prediction(kind, source) if kind else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
