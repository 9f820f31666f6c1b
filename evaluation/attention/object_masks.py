"""Locate the object in each image, by a painted mask or a segmenter."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from evaluation.attention.cases import AttentionCase
from evaluation.attention.figure import AttentionRow
from evaluation.attention.masked_attention import measure_attention
from ldm.common.errors import UserError
from ldm.data.images import read_mask
from ldm.data.masks import read_binary_mask
from ldm.inference.model_config import segmenter_of
from ldm.inference.run import PreparedRun
from ldm.modules.segmentation import ZeroShotSegmenter, threshold_mask

log = logging.getLogger(__name__)


class ObjectMasks:
    """Finds the object in images.

    Args:
        run: gives the size of the images, the model's config and the device.
        mask: image file with the mask of all images; None: a segmenter finds the object in each image.
        segmenter: folder or hub name of that CLIPSeg; None: the model's.

    Raises:
        UserError: the mask or the segmenter cannot be used.
    """

    def __init__(self, run: PreparedRun, mask: str | None = None, segmenter: str | None = None) -> None:
        width, height = run.size
        self.size = height, width
        self.painted: Tensor | None = None
        if mask is not None:
            self.painted = read_binary_mask(mask, read_mask(mask).size, width, height)[0, 0]
        else:
            self.segmenter = ZeroShotSegmenter.from_path(segmenter or segmenter_of(run.config), run.device)

    def find(self, row: AttentionRow, case: AttentionCase, seed: int) -> Tensor | None:
        """Return (H, W) of ones and zeros; None, after a warning, if the object is not found."""
        if self.painted is not None:
            return self.painted
        try:
            probabilities = self.segmenter.segment([row.image], case.subject, self.size)[0]
            return threshold_mask(probabilities, case.subject, f"{case.name}, seed {seed}")
        except UserError as error:
            reason = str(error).partition(";")[0]
            log.warning("warning: %s; the image does not count", reason)
            return None

    def measure(self, case: AttentionCase, rows: Sequence[AttentionRow]) -> list[AttentionRow]:
        """Return the rows of a case with masks and measurements, as far as the object is found."""
        measured = []
        for row, request in zip(rows, case.run.requests, strict=True):
            mask = self.find(row, case, request.seed)
            if mask is not None:
                row = replace(row, mask=mask, measured=measure_attention(row.maps, mask))
            measured.append(row)
        return measured
