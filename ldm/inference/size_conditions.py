"""The sizes that some models read besides the prompt (Stable Diffusion XL); see `ldm.modules.encoders.sizes`."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.inference.settings import GenerationSettings
from ldm.modules.context import PromptContext


def sizes_of(settings: GenerationSettings, image_size: tuple[int, int]) -> Tensor:
    """Return the sizes (6,) of images: by default not scaled, not cropped, and of the size that they have.

    Args:
        settings: what they are conditioned on instead.
        image_size: (height, width) in pixels.
    """
    original, target = settings.original_size or image_size, settings.target_size or image_size
    return torch.tensor([*original, *(settings.crop or (0, 0)), *target], dtype=torch.float32)


def reads_sizes(model: Any) -> bool:
    """Return whether a model is conditioned on sizes."""
    return hasattr(model.cond_stage_model, "add_sizes")


def with_sizes(model: Any, context: PromptContext, sizes: Tensor) -> PromptContext:
    """Return the same prompts, all of them with these sizes (6,)."""
    return model.cond_stage_model.add_sizes(context, sizes.expand(context.batch_size, -1))
