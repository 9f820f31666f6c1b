"""Find the weights of a checkpoint within what training tools wrap around them: nested dictionaries and prefixes."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Names of dictionaries around weights, in order of preference: averaged weights come before those of the last step.
WRAPPERS = ("state_dict", "params_ema", "ema", "ema_model", "model_ema", "ema_state_dict", "params", "model", "module",
            "model_state_dict", "model_state", "weights", "net", "network", "unet", "generator")
MAX_DEPTH = 8
ROOTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema.", "conditioner.",
         "diffusion_model.", "input_blocks.", "concepts.")
# What torch.compile, DataParallel and DistributedDataParallel put into the names of the modules that they wrap
COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.)")
PARALLEL = re.compile(r"^(model\.|model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.)module\.")


def unwrap_weights(content: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the tensors of a checkpoint by name, or none if it holds none.

    Args:
        content: what the file holds.
        is_tensor: whether an object is a tensor, or stands for one.
    """
    found = _find_weights(content, is_tensor, MAX_DEPTH)
    return {str(key): value for key, value in found.items() if is_tensor(value)}


def _find_weights(content: Any, is_tensor: Callable[[Any], bool], depth: int) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    for name in WRAPPERS:
        inner = _find_weights(content.get(name), is_tensor, depth - 1)
        if inner:
            return inner
    if any(map(is_tensor, content.values())):
        return content
    # A single dictionary under another name
    inner_ones = [value for value in content.values() if isinstance(value, Mapping)]
    return _find_weights(inner_ones[0], is_tensor, depth - 1) if len(inner_ones) == 1 else {}


def strip_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return weights without the prefixes that training tools add to their names.

    These are `_orig_mod.` and `module.`, and whatever precedes the parts of a latent diffusion model in all names.
    """
    renamed = _rename_all(tensors, lambda key: COMPILED.sub("", key).lstrip("."))
    while all(key.startswith("module.") for key in renamed) and renamed:
        renamed = _rename_all(renamed, lambda key: key.removeprefix("module."))
    renamed = _rename_all(renamed, lambda key: PARALLEL.sub(r"\1", key))
    prefix = _common_prefix(renamed)
    return _rename_all(renamed, lambda key: key.removeprefix(prefix))


def _rename_all(tensors: Mapping[str, T], rename: Callable[[str], str]) -> dict[str, T]:
    """Return the tensors under other names, or as they are if two of the names would be equal."""
    renamed = {rename(key): value for key, value in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def _common_prefix(keys: Iterable[str]) -> str:
    """Return what all keys have before the parts of a latent diffusion model, or "" if it is nothing."""
    keys = list(keys)
    if not keys or any(key.startswith(ROOTS) for key in keys):
        return ""
    first = keys[0]
    for end in (index + 1 for index, letter in enumerate(first) if letter == "."):
        prefix = first[:end]
        if not all(key.startswith(prefix) for key in keys):
            return ""
        if any(key.removeprefix(prefix).startswith(ROOTS[:4]) for key in keys):
            return prefix
    return ""
