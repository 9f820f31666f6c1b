"""Whether to sample in 16 bits, and in which kind of them."""
from __future__ import annotations

import torch

from ldm.common.errors import UserError


def uses_sixteen_bits(precision: str | None, device: torch.device) -> bool:
    """Return whether to sample in 16 bits: as `precision` says, or else where that is fast.

    Raises:
        UserError: the precision is unknown.
    """
    if precision not in (None, "full", "autocast"):
        raise UserError(f"precision {precision!r} is unknown; choose full or autocast")
    return precision == "autocast" or (precision is None and device.type == "cuda")


def sixteen_bit_type(device: torch.device) -> torch.dtype:
    """Return bfloat16, whose range no activation leaves, or float16 for GPUs that have no bfloat16."""
    modern = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if modern else torch.float16
