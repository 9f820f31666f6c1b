"""Read LoRA files of kohya's sd-scripts, LyCORIS, PEFT and diffusers. `ldm.checkpoints.lora_merging` applies them.

The names of tensors are those of a layer, see `ldm.checkpoints.lora_names`, and of a part, see `PART`. What the parts
mean is in `ldm.checkpoints.lora_merging`.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.families import family_of_width
from ldm.checkpoints.lora_names import TEXT_ENCODERS, Place, place_of
from ldm.checkpoints.other_kinds import is_transformer_lora
from ldm.checkpoints.pickled import printable, read_pickled
from ldm.checkpoints.wrappings import unwrap_weights
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_format
from ldm.common.files import load_tensors
from ldm.common.paths import resolve_path

AGAIN = "copy or download it again"
METADATA = "lora_adapter_metadata"  # in which diffusers stores PEFT's settings
PART = re.compile(r"""(?P<layer>.+?)(?:
    [._]lora(?:_linear_layer)?\.(?P<old>up|down)\.weight   # diffusers before PEFT
  | \.lora_(?P<kohya>up|down|mid)\.weight
  | \.lora_(?P<peft>A|B)(?:\.\w+)?\.weight
  | \.lora_(?P<norms>magnitude_vector)(?:\.\w+)*
  | \.(?P<other>alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))
)""", re.VERBOSE)
PEFT = {"A": "down", "B": "up"}

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA holds of one layer.

    Attributes:
        name: the layer's name in the file.
        parts: "down", "up", "mid", "dora_scale", "hada_w1_a", ... -> float32 on the CPU.
        alpha: scale of delta before the division by the rank; None: the rank.
        rank_exponent: 1, or 0.5 for rank-stabilised LoRA, which divides by the square root of the rank.
    """

    name: str
    parts: Parts
    alpha: float | None = None
    rank_exponent: float = 1.0

    @property
    def context_width(self) -> int | None:
        """The width of the text encodings that the layer reads, if it is a cross-attention layer of a plain LoRA."""
        is_reading = re.search(r"attn2[._](processor\.)?to_[kv]$", self.name)
        reader = self.parts.get("down", self.parts.get("hada_w1_b"))
        return reader.shape[1] if is_reading and reader is not None else None


@dataclass(frozen=True)
class Lora:
    """The content of a LoRA file.

    Attributes:
        path: the file, for messages.
        layers: the layers of a U-Net and of text encoders.
        unknown: names of tensors that belong to no known network, or are of an unknown kind.
    """

    path: Path
    layers: Mapping[Place, LoraLayer]
    unknown: Sequence[str] = ()

    @property
    def base(self) -> str:
        """The kind of model that the LoRA was made for, for messages; "another kind of model" if nothing shows it."""
        if is_transformer_lora([*self.unknown, *(layer.name for layer in self.layers.values())]):
            return "a diffusion transformer, such as Flux or Stable Diffusion 3"
        widths = [layer.context_width for layer in self.layers.values() if layer.context_width is not None]
        if not widths:
            has_two = any(place.network == TEXT_ENCODERS[1] for place in self.layers)
            return "a model of two text encoders, such as Stable Diffusion XL" if has_two else "another kind of model"
        return family_of_width(widths[0]).name


def load_lora(path: str | Path) -> Lora:
    """Read a LoRA from a file, or from a folder of PEFT or diffusers with one.

    Raises:
        UserError: the file is missing, damaged or holds no LoRA.
    """
    file = _file_in(resolve_path(path))
    if check_format(file) is Format.SAFETENSORS:
        tensors, metadata = load_tensors(file)
    else:
        tensors, metadata = unwrap_weights(read_pickled(file), lambda value: isinstance(value, Tensor)), {}
    settings = metadata.get(METADATA)
    if not isinstance(settings, dict):
        settings = _settings_beside(file)
    parts: dict[Place, dict[str, Tensor]] = {}
    names, unknown = {}, []
    for key, tensor in tensors.items():
        match = PART.fullmatch(key)
        place = place_of(match["layer"]) if match else None
        if place is None:
            unknown.append(key)
            continue
        names[place] = match["layer"]
        parts.setdefault(place, {})[_part_name(match)] = tensor.detach().float()
    if not parts and not unknown:
        raise UserError(f"{path}: holds no weights; choose another file")
    layers = {place: _build_layer(file, names[place], place.network, own, settings) for place, own in parts.items()}
    return Lora(file, layers, unknown)


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("pytorch_lora_weights", "adapter_model")
    for name in [f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in names]:
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: a folder without a LoRA in it; name a file, such as style.safetensors")


def _settings_beside(file: Path) -> dict[str, Any]:
    """Return PEFT's settings from the file beside its weights; none if there is no such file."""
    config = file.parent / "adapter_config.json"
    if file.stem != "adapter_model" or not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{config}: cannot be read; {AGAIN}") from None
    return {f"unet.{key}": value for key, value in content.items()} if isinstance(content, dict) else {}


def _part_name(match: re.Match[str]) -> str:
    return match["old"] or match["kohya"] or PEFT.get(match["peft"]) or match["norms"] or match["other"]


def _build_layer(path: Path, name: str, network: str, parts: dict[str, Tensor], settings: Mapping[str, Any]
                 ) -> LoraLayer:
    for part, tensor in parts.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {part} of {printable(name)} holds numbers that are not finite; {AGAIN}")
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{path}: alpha of {printable(name)} is not one number; {AGAIN}")
    stored = _stored_alpha(settings, network, name) if alpha is None else float(alpha)
    stabilised = settings.get(f"{network}.use_rslora") is True
    return LoraLayer(name, parts, stored, 0.5 if stabilised else 1.0)


def _stored_alpha(settings: Mapping[str, Any], network: str, name: str) -> float | None:
    """Return the alpha of a layer according to PEFT's settings; None if they do not say it."""
    patterns = settings.get(f"{network}.alpha_pattern")
    for pattern, alpha in (patterns.items() if isinstance(patterns, dict) else ()):
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(alpha)
    alpha = settings.get(f"{network}.lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) else None
