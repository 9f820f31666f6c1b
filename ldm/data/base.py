"""The base class of the LDM family's streamed text-to-image data sets."""
from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

log = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """A data set of images and texts that is read in order. Subclasses define `__iter__`.

    Loaders of the family give each of their workers its own part of `valid_ids`, as `sample_ids`.

    Args:
        num_records: number of items.
        valid_ids: names or numbers of the items; None if a subclass needs none.
        size: side of the square images, in pixels.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records, self.size = num_records, size
        self.valid_ids = self.sample_ids = valid_ids
        log.info("%s has %d items", type(self).__name__, len(self))

    def __len__(self) -> int:
        return self.num_records

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yield the items of `sample_ids`."""
