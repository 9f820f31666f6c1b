"""Choose whether to sample in 16 bits, and in which 16-bit type."""
from __future__ import annotations

import torch

from ldm.common.errors import UserError


def uses_sixteen_bits(precision: str | None, device: torch.device) -> bool:
    """Return whether to sample in 16 bits: as `precision` says, or by default on CUDA only.

    Raises:
        UserError: the precision is unknown.
    """
    if precision not in (None, "full", "autocast"):
        raise UserError(f"precision {precision!r} is unknown; choose full or autocast")
    return precision == "autocast" or (precision is None and device.type == "cuda")


def sixteen_bit_type(device: torch.device) -> torch.dtype:
    """Return bfloat16, in which no activation overflows, or float16 for GPUs without bfloat16."""
    modern = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if modern else torch.float16
