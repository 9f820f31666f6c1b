"""The images that CLIP's image tower takes, and the features that it returns."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Mean and standard deviation that CLIP's image tower expects of images in [0, 1]. The project's own towers are trained
# with the same values.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_for_clip(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Normalize images (B, 3, H, W) in [-1, 1] for CLIP's image tower."""
    center = images.new_tensor(mean)[:, None, None]
    spread = images.new_tensor(std)[:, None, None]
    return ((images + 1) / 2 - center) / spread


def unwrap_features(output: Any) -> Tensor:
    """Return projected features, which `transformers` 5 returns inside an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output
