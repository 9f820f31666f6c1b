"""Check the arguments of `Sampler.sample`. Every function raises UserError if they are illegal or contradictory."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext

Size = tuple[int, ...]


def latent_size(batch_size: int, shape: Sequence[int]) -> Size:
    """Return (batch_size, C, H, W)."""
    size = (batch_size, *shape)
    if len(size) != 4 or min(size) < 1:
        raise UserError(f"cannot sample {batch_size} latents of shape {tuple(shape)}: give 1 or more, of (C, H, W)")
    return size


def check_noise(size: Size, eta: float, temperature: float, x_T: Tensor | None) -> None:
    """Check the noise at the start and in the steps."""
    if temperature < 0:
        raise UserError(f"temperature {temperature} must be 0 or more")
    if temperature != 1 and eta == 0:
        raise UserError(f"temperature {temperature} scales the noise of eta, which is 0; raise eta or leave it out")
    if x_T is not None and tuple(x_T.shape) != size:
        raise UserError(f"x_T has shape {tuple(x_T.shape)}, but the latents have {size}")


def check_guidance(
    batch_size: int, conditioning: Tensor | PromptContext | None, unconditional: Tensor | PromptContext | None,
    scale: float, rescale: float = 0.0,
) -> None:
    """Check both conditionings against each other and the batch size, and how guidance is rescaled."""
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance_rescale {rescale} must be between 0 (as it is) and 1")
    if conditioning is not None and conditioning.shape[0] != batch_size:
        raise UserError(f"conditioning for {conditioning.shape[0]} images, but batch_size is {batch_size}")
    if scale == 1:
        return
    if conditioning is None or unconditional is None:
        raise UserError(f"unconditional_guidance_scale {scale} needs conditioning and unconditional_conditioning")
    if tuple(conditioning.shape) != tuple(unconditional.shape):
        shapes = f"{tuple(unconditional.shape)} and {tuple(conditioning.shape)}"
        raise UserError(f"unconditional_conditioning and conditioning differ in shape, {shapes}; encode them alike")


def check_original(size: Size, mask: Tensor | None, x0: Tensor | None, strength: float | None) -> None:
    """Check the latents to keep or to start from."""
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength {strength} must be above 0 (x0 is kept) and at most 1 (x0 is ignored)")
    if (x0 is None) != (mask is None and strength is None):
        raise UserError("x0 belongs together with a mask or a strength: give it with one of them or both, or none")
    if x0 is not None and tuple(x0.shape) != size:
        raise UserError(f"x0 has shape {tuple(x0.shape)}, but the latents have {size}")
    if mask is not None and not _broadcasts(tuple(mask.shape), size):
        raise UserError(f"mask of shape {tuple(mask.shape)} does not broadcast to the latents' {size}")


def _broadcasts(shape: Size, size: Size) -> bool:
    if len(shape) > len(size):
        return False
    return all(have in (1, want) for have, want in zip(reversed(shape), reversed(size), strict=False))
