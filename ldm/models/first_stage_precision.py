"""Keep first stages out of float16 if its range is too small: that of Stable Diffusion XL overflows and gives NaN."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

log = logging.getLogger(__name__)

Output = TypeVar("Output", Tensor, DiagonalGaussianDistribution)


def run_first_stage(first_stage: nn.Module, function: Callable[[Tensor], Output], x: Tensor,
                    autocast: bool = True) -> Output:
    """Encode or decode by a first stage, and again in float32 if float16 gives values that are not finite.

    The first time, a warning is logged, and the first stage is converted to float32 for good.

    Args:
        first_stage: the module whose method `function` is.
        function: takes images or latents.
        x: (B, C, H, W).
        autocast: whether autocast may choose the precision. Otherwise it is that of the weights.
    """
    weight = next(first_stage.parameters(), None)
    if weight is None:
        return function(x)
    autocast = autocast and not getattr(first_stage, "overflows_in_float16", False)
    if autocast and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        output = function(x)
    else:
        dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            output = function(x.to(dtype))
    if dtype != torch.float16 or _is_finite(output) or not _is_finite(x):
        return output

    log.warning("the first stage (VAE) overflows in float16, so it runs in float32 from now on; one that was made for "
                "float16 (--vae) takes less memory")
    first_stage.float()
    first_stage.overflows_in_float16 = True
    with torch.autocast(x.device.type, enabled=False):
        return function(x.float())


def _is_finite(output: Tensor | DiagonalGaussianDistribution) -> bool:
    values = output.parameters if isinstance(output, DiagonalGaussianDistribution) else output
    return bool(values.isfinite().all())
