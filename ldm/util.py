"""The small helpers that the whole package shares, under the LDM family's public path.

Reading flags and configs needs some of them and must not wait for torch, so functions import it where they use it.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ldm.common.errors import UserError
from ldm.common.instantiate import get_obj_from_str, instantiate_from_config
from ldm.common.library_errors import user_error_for
from ldm.common.params import check_param_names, check_param_types, known_params

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_param_names", "check_param_types", "count_params", "default", "get_obj_from_str", "has_trainable_parameters",
    "instantiate_from_config", "known_params", "pick_device", "to_device", "user_error_for",
]
T = TypeVar("T")
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


def default(value: T | None, fallback: T) -> T:
    """Return `value`, or `fallback` if it is None."""
    return fallback if value is None else value


def has_trainable_parameters(module: torch.nn.Module) -> bool:
    """Return whether any parameter of `module` requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_params(model: torch.nn.Module, trainable_only: bool = False) -> int:
    """Return the number of elements of all parameters, or of the trainable ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


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
