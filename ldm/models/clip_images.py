"""The images that CLIP's image tower takes, and the features that it returns."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# What CLIP's image tower expects of a picture in [0, 1]; the project's own towers are trained with the same figures.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_for_clip(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as CLIP's image tower wants them."""
    centre, spread = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return ((images + 1) / 2 - centre) / spread


def unwrap_features(output: Any) -> Tensor:
    """Projected features, which `transformers` 5 gives inside of an output."""
    return output if isinstance(output, Tensor) else output.pooler_output
