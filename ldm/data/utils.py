"""Batches of annotated images, under the public path of latent-diffusion's successors."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate


def custom_collate(batch: Sequence[Any]) -> Any:
    """Return what torch's `default_collate` does, but leave lists of annotations (named tuples) as they are.

    Images have different numbers of annotations, so they cannot become tensors.

    Args:
        batch: items of a data set, such as dicts.
    """
    first = batch[0]
    if isinstance(first, Mapping):
        return {key: custom_collate([item[key] for item in batch]) for key in first}
    if isinstance(first, list | tuple) and first and hasattr(first[0], "_fields"):
        return batch
    return default_collate(list(batch))
