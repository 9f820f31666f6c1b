"""The small helpers that the whole package shares, under the LDM family's public path.

Reading flags and configs needs some of them and must not wait for torch, so functions import it where they use it.
"""
from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ldm.common.errors import UserError
from ldm.common.instantiate import get_obj_from_str, instantiate_from_config
from ldm.common.library_errors import user_error_for
from ldm.common.parallel import parallel_data_prefetch
from ldm.common.params import check_param_names, check_param_types, known_params

if TYPE_CHECKING:
    import torch
    from PIL import ImageFont

__all__ = [
    "check_param_names", "check_param_types", "count_params", "default", "exists", "get_obj_from_str",
    "has_trainable_parameters", "instantiate_from_config", "isimage", "ismap", "known_params", "log_txt_as_img",
    "mean_flat", "parallel_data_prefetch", "pick_device", "to_device", "user_error_for",
]
log = logging.getLogger(__name__)
T = TypeVar("T")
CAPTION_FONTS = ("data/DejaVuSans.ttf", "DejaVuSans.ttf")  # the LDM repositories' own copy, that of the system
CAPTION_CHARACTERS = 40  # per line, in an image of 256 pixels
SYNCHRONOUS_COPY_LIMIT = 2**16  # bytes that CUDA copies at once (CUDA Runtime API, "API synchronization behavior")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the work that is queued on a CUDA device.

    CUDA copies small tensors at once from anywhere, and larger ones without waiting only from pinned memory.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes >= SYNCHRONOUS_COPY_LIMIT:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def exists(x: object) -> bool:
    """Return whether `x` is not None."""
    return x is not None


def default(val: T | None, d: T | Callable[[], T]) -> T:
    """Return `val`, or if it is None, `d`; if `d` is a function, call it."""
    if val is not None:
        return val
    return d() if inspect.isfunction(d) else d


def isimage(x: object) -> bool:
    """Return whether `x` is a batch of images, a tensor (B, 1 or 3, H, W)."""
    return _has_four_dimensions(x) and x.shape[1] in (1, 3)


def ismap(x: object) -> bool:
    """Return whether `x` is a batch of feature maps, a tensor (B, C, H, W) of more than three channels."""
    return _has_four_dimensions(x) and x.shape[1] > 3


def _has_four_dimensions(x: object) -> bool:
    import torch

    return isinstance(x, torch.Tensor) and x.ndim == 4


def mean_flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over all dimensions but the first, (B,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> torch.Tensor:
    """Draw each text on a white image, for logs.

    Args:
        wh: (width, height) of the images.
        xc: B texts, which break after 40 characters for every 256 pixels of the width.
        size: size of the font.

    Returns:
        (B, 3, height, width) of float64 in [-1, 1].
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw

    font, length = _caption_font(size), max(1, int(CAPTION_CHARACTERS * wh[0] / 256))
    images = []
    for text in xc:
        image = Image.new("RGB", wh, color="white")
        lines = [text[start : start + length] for start in range(0, len(text), length)]
        ImageDraw.Draw(image).text((0, 0), "\n".join(lines), fill="black", font=font)
        images.append(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1)
    return torch.from_numpy(np.stack(images))


def _caption_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    for path in CAPTION_FONTS:
        try:
            return ImageFont.truetype(path, size=size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def has_trainable_parameters(module: torch.nn.Module) -> bool:
    """Return whether any parameter of `module` requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_params(model: torch.nn.Module, verbose: bool = False, trainable_only: bool = False) -> int:
    """Return the number of elements of all parameters, or of the trainable ones; log it if `verbose`."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
    if verbose:
        log.info("%s has %.2f M params.", type(model).__name__, count / 1e6)
    return count


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, by default the best available: cuda, then mps, then cpu.

    Raises:
        UserError: if the named device does not exist.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for "meta" and for devices that do not exist
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: this machine has no such device; leave the flag out") from None
    return device
