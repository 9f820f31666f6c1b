"""Conditions as the LDM family nests them: tensors, lists of them, and mappings of either."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.diffusion.wrapper import Condition
from ldm.modules.context import PromptContext
from ldm.sampling.sampler import guidance_batch

log = logging.getLogger(__name__)


def concat_conditions(unconditional: Condition, conditional: Condition) -> Condition:
    """Return both conditions as one batch (2B, ...), the unconditional one first, nested as `conditional` is.

    Raises:
        UserError: if the two are nested differently.
    """
    both = (unconditional, conditional)
    if all(isinstance(one, Tensor | PromptContext) for one in both):
        return guidance_batch(unconditional, conditional)
    if all(isinstance(one, Mapping) for one in both):
        if missing := sorted(conditional.keys() - unconditional.keys()):
            raise UserError(f"unconditional_conditioning has no {', '.join(missing)}, but the conditioning has")
        return {key: concat_conditions(unconditional[key], part) for key, part in conditional.items()}
    if all(isinstance(one, list | tuple) for one in both) and len(unconditional) >= len(conditional):
        return [concat_conditions(*parts) for parts in zip(unconditional, conditional, strict=False)]
    raise UserError(f"unconditional_conditioning ({type(unconditional).__name__}) must have the same form as the "
                    f"conditioning ({type(conditional).__name__}): tensors, or the same number or keys of them")


def condition_sizes(condition: Condition) -> Iterator[int]:
    """Yield the batch size of every tensor in a condition."""
    if isinstance(condition, Tensor | PromptContext):
        yield condition.shape[0]
    elif isinstance(condition, Mapping | list | tuple):
        for part in condition.values() if isinstance(condition, Mapping) else condition:
            yield from condition_sizes(part)


def warn_of_batch_size(condition: Condition, batch_size: int) -> None:
    """Log a warning if a condition is for another number of images."""
    for size in condition_sizes(condition):
        if size != batch_size:
            log.warning("conditioning for %d images, but batch_size is %d", size, batch_size)
            return
