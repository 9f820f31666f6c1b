"""Which weights of `open_clip` were trained with QuickGELU, x * sigmoid(1.702 x), in place of GELU.

Such weights also load into towers with GELU, without an error, but features are then slightly wrong. An architecture of
`open_clip` such as ViT-B-32 has weights of both kinds; its list of pretrained weights says which need which.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from ldm.common.errors import UserError

HUB_CACHE = "models--"  # start of a model's folder in the hub's cache: models--OWNER--NAME
TOWER_SIZES = ("width", "layers", "patch_size", "image_size")


def needs_quick_gelu(architecture: str, weights: str | None) -> bool:
    """Return whether these pretrained weights, a tag of `open_clip.list_pretrained`, need towers with QuickGELU."""
    return bool(weights and get_pretrained_cfg(architecture, weights).get("quick_gelu", False))


def create_pretrained(architecture: str, weights: str | None, **options: Any) -> open_clip.CLIP:
    """Return `open_clip.create_model` of the architecture with the activation that the pretrained weights need."""
    return open_clip.create_model(architecture, weights, force_quick_gelu=needs_quick_gelu(architecture, weights),
                                  **options)


def check_activation(folder: str | Path, settings: str) -> None:
    """Check the activation in the settings of a local folder against the weights that the folder is named after.

    Args:
        folder: holds a CLIP in open_clip's layout; a name such as ViT-B-32-openai says which weights these are.
        settings: name of its JSON file.

    Raises:
        UserError: the weights of this name need the other activation.
    """
    try:
        config = json.loads((Path(folder) / settings).read_text(encoding="utf-8"))["model_cfg"]
        has_quick = bool(config.get("quick_gelu", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # `open_clip` says what is wrong with it
    named = _weights_named(Path(folder), config)
    if not named or any(needs_quick_gelu(*weights) == has_quick for weights in named):
        return
    right, wrong = ("QuickGELU", "GELU") if not has_quick else ("GELU", "QuickGELU")
    raise UserError(f"CLIP {folder}: {settings} builds {wrong}, but the weights {'/'.join(named[0])} need {right}; set "
                    f"\"quick_gelu\": {str(not has_quick).lower()} in it, or rename the folder if it holds others")


def _weights_named(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (architecture, tag) of all known weights that a folder's name stands for and its towers fit."""
    resolved = folder.resolve()
    names = [resolved.name.lower(), *(part.lower() for part in resolved.parts if part.startswith(HUB_CACHE))]
    known = []
    for architecture, tag in open_clip.list_pretrained():
        hub_name = get_pretrained_cfg(architecture, tag).get("hf_hub", "").strip("/").rpartition("/")[2].lower()
        if any(_holds(name, tag) or (hub_name and _holds(name, hub_name)) for name in names):
            known.append((architecture, tag))
    return [weights for weights in known if _tower_sizes(open_clip.get_model_config(weights[0])) ==
            _tower_sizes(config)]


def _holds(name: str, part: str) -> bool:
    """Return whether a name holds a part between separators: "vit-b-32-openai" holds "openai"."""
    pattern = re.escape(part.lower().replace("_", "-"))
    return re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", name.replace("_", "-")) is not None


def _tower_sizes(config: Mapping[str, Any]) -> tuple[Any, ...]:
    vision = config.get("vision_cfg") or {}
    return (config.get("embed_dim"), *(vision.get(size) for size in TOWER_SIZES))
