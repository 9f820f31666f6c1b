"""A soft color histogram: how much of an image has which color."""
from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 4  # per color channel
SOFTNESS = 0.3  # in units of [-1, 1]: a color counts for the neighboring levels, too


def color_shares(pixels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the square roots of the shares of 64 colors. Their distances are Hellinger's.

    Args:
        pixels: (N, 3, P) in [-1, 1].
        weights: (N, P), how much each pixel counts; None: all alike.

    Returns:
        (N, 64), of length 1: 4 x 4 x 4 levels of red, green and blue.
    """
    # Share out each channel of each pixel among the levels, then multiply the channels.
    levels = torch.linspace(-1, 1, LEVELS, device=pixels.device)
    channels = (-(pixels[..., None] - levels) ** 2 / (2 * SOFTNESS**2)).softmax(-1)
    if weights is None:
        weights = pixels.new_ones(len(pixels), pixels.shape[-1])
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
    histogram = torch.einsum("np,npr,npg,npb->nrgb", shares, *channels.unbind(1)).flatten(1)
    return histogram.sqrt()
