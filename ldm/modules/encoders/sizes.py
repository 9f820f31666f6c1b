"""Sizes as conditions: what Stable Diffusion XL reads besides the prompt (Podell et al., "SDXL", 2023, Sec. 2.2).

The original size and the crop of a training image are conditions, so that small and cropped photos can be used without
making generated images look like them. In sampling they say what the image should look like.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.prompts import AbstractEncoder

# Key of a batch -> the columns of sizes (B, 6) that are stored there, in pixels.
SIZE_COLUMNS = {
    "original_size_as_tuple": slice(0, 2),  # height, width
    "crop_coords_top_left": slice(2, 4),  # top, left
    "target_size_as_tuple": slice(4, 6),  # height, width
}


class ConcatTimestepEmbedderND(AbstractEncoder):
    """Embed each number of a row as timesteps are embedded, and concatenate the results.

    Args:
        outdim: features per number.

    Source: Stability-AI/generative-models, the class of this name.
    """

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        """Embed (B, n) or (B,) numbers as (B, n * outdim) float32."""
        rows = x[:, None] if x.ndim == 1 else x
        return timestep_embedding(rows.flatten().float(), self.outdim).reshape(len(rows), -1)


def sizes_of_batch(batch: Mapping[str, Any], count: int, default: Tensor) -> Tensor:
    """Return the sizes (B, 6) of a batch.

    Args:
        batch: may hold some of `SIZE_COLUMNS`, each (B, 2), or one pair for all.
        count: B.
        default: (6,), for what the batch does not hold.

    Raises:
        UserError: a value is not one pair of numbers, or one for each prompt.
    """
    sizes = default.float().expand(count, -1).clone()
    for key, columns in SIZE_COLUMNS.items():
        if key in batch:
            sizes[:, columns] = _pairs(key, batch[key], count)
    return sizes


def default_sizes(height: int, width: int) -> Tensor:
    """Return the sizes (6,) of an image that was not scaled or cropped."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def _pairs(key: str, values: Tensor | Sequence[Any], count: int) -> Tensor:
    try:
        pairs = torch.as_tensor(values, dtype=torch.float32, device="cpu").reshape(-1, 2)
    except (TypeError, ValueError, RuntimeError):
        pairs = torch.empty(0, 2)
    if len(pairs) not in (1, count):
        raise UserError(f"{key}: give a pair of numbers, or one for each of the {count} prompts")
    return pairs
