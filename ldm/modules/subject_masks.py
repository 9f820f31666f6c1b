"""Find the subject in whole photos of any shape, by a zero-shot segmenter.

A segmenter sees squares that cover the photo, so that no shape is squeezed. A small segmenter such as the bundled one
also fails where a photo differs from what it was trained on: the subject fills the photo, or a strong pattern hides its
shape. So it sees each square in four views: plain and blurred, near and, with a reflected border around it, from far.
Views that find nothing do not count.

Of several squares, the one in which the views are most certain together is taken: where the subject is absent, a
segmenter takes something else for it, but rarely in all views. Of the result, the largest connected region is kept,
without holes.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.modules.segmentation import MIN_CONFIDENCE, MIN_PROBABILITY, ZeroShotSegmenter

BORDER = 0.3  # of a square's side: the reflected border on each of its sides in the views from farther away
BLUR = 1 / 64  # of a square's side: the radius of the blur that removes patterns
OVERLAP = 0.5  # of a square's side: neighboring squares share at least this much
MIN_CERTAINTY = 0.4  # of several views together; the bundled examples have 0.47 or more, most empty backgrounds less
SOFT_EDGE = 1 / 32  # of the shorter side: how far around the subject its soft edge may reach


Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class View:
    """A square image for the segmenter.

    Attributes:
        image: a square of a photo, perhaps blurred and with a border.
        border: width of the border, relative to the side of the image.
    """

    image: Image.Image
    border: float


@dataclass(frozen=True)
class Finding:
    """What a segmenter finds in a square of a photo.

    Attributes:
        box: the square.
        probabilities: (n, n) in [0, 1], the mean over the views that find something.
        certainty: mean over all views of the probability where `probabilities` has half of its maximum or more.
    """

    box: Box
    probabilities: Tensor
    certainty: float


def find_subject(segmenter: ZeroShotSegmenter, photo: Image.Image, text: str, size: int) -> Tensor:
    """Compute how likely each pixel of a whole photo shows what `text` names.

    Args:
        segmenter: the segmenter.
        photo: of any size.
        text: what to look for.
        size: length of the result's shorter side.

    Returns:
        (h, w) float32 in [0, 1], in the photo's proportions. All but one connected region is 0; everything is 0 if the
        subject is not found.
    """
    scale = size / min(photo.size)
    reduced = photo.convert("RGB").resize([max(1, round(length * scale)) for length in photo.size],
                                          Image.Resampling.LANCZOS, reducing_gap=3)
    boxes = square_boxes(reduced.size)
    finding = max((_look(segmenter, reduced, box, text) for box in boxes), key=lambda found: found.certainty)
    if len(boxes) > 1:
        # Look again with the subject in the middle: the borders of squares may have cut it.
        again = _look(segmenter, reduced, _centered(finding, reduced.size), text)
        if again.certainty > MIN_PROBABILITY:
            finding = again
    result = torch.zeros(reduced.height, reduced.width)
    if not _is_found(finding, segmenter.needs_varied_views):
        return result
    left, top, right, bottom = finding.box
    result[top:bottom, left:right] = keep_subject(finding.probabilities)
    return result


def square_boxes(size: tuple[int, int]) -> list[Box]:
    """Return the overlapping squares that cover an image of (width, height)."""
    side, length = min(size), max(size)
    count = 1 + math.ceil((length - side) / (side * OVERLAP))
    starts = [round(start) for start in np.linspace(0, length - side, count)]
    if size[0] >= size[1]:
        return [(start, 0, start + side, side) for start in starts]
    return [(0, start, side, start + side) for start in starts]


def make_views(square: Image.Image, varied: bool) -> list[View]:
    """Return one view of a square; if `varied`, four: plain and blurred, near and from far."""
    if not varied:
        return [View(square, 0.0)]
    views = []
    width = round(square.width * BORDER)
    for image in (square, square.filter(ImageFilter.GaussianBlur(square.width * BLUR))):
        views.append(View(image, 0.0))
        padded = np.pad(np.asarray(image), ((width, width), (width, width), (0, 0)), mode="reflect")
        views.append(View(Image.fromarray(padded), width / padded.shape[0]))
    return views


def _look(segmenter: ZeroShotSegmenter, photo: Image.Image, box: Box, text: str) -> Finding:
    """Segment all views of a square of a photo."""
    views = make_views(photo.crop(box), segmenter.needs_varied_views)
    results = segmenter.segment([view.image for view in views], text)
    side = box[2] - box[0]
    aligned = torch.stack([_without_border(result, view.border, side)
                           for view, result in zip(views, results, strict=True)])
    probabilities = combine(aligned)
    region = probabilities >= probabilities.max() / 2
    return Finding(box, probabilities, float(aligned.mean(0)[region].mean()))


def _is_found(finding: Finding, varied: bool) -> bool:
    return finding.certainty >= MIN_CERTAINTY if varied else bool(finding.probabilities.max() > MIN_CONFIDENCE)


def combine(results: Tensor) -> Tensor:
    """Return the mean (H, W) of those segmentations (M, H, W) that find something; of all, if none does."""
    confident = results[results.amax(dim=(1, 2)) > MIN_PROBABILITY]
    return (confident if len(confident) else results).mean(0)


def _centered(finding: Finding, size: tuple[int, int]) -> Box:
    """Return the square in an image of (width, height) that has what was found in its middle, as far as possible."""
    left, top, right, bottom = finding.box
    region = (keep_subject(finding.probabilities) > 0).nonzero().float()
    middle = (region.amin(0) + region.amax(0)) / 2  # row and column in the old square
    side = right - left
    new_left = min(max(0, left + round(float(middle[1]) - side / 2)), size[0] - side)
    new_top = min(max(0, top + round(float(middle[0]) - side / 2)), size[1] - side)
    return new_left, new_top, new_left + side, new_top + side


def keep_subject(probabilities: Tensor) -> Tensor:
    """Return a segmentation (H, W) with its largest connected region only, and that region without holes.

    A region consists of pixels with at least half of the maximal probability. The largest one has the highest sum.
    """
    threshold = float(probabilities.max()) / 2
    if not threshold > 0:
        return probabilities
    labels, count = ndimage.label(probabilities.numpy() >= threshold)
    sums = ndimage.sum_labels(probabilities.numpy(), labels, range(1, count + 1))
    region = ndimage.binary_fill_holes(labels == 1 + int(np.argmax(sums)))
    edge = ndimage.binary_dilation(region, iterations=max(1, round(min(region.shape) * SOFT_EDGE)))
    filled = torch.where(torch.from_numpy(region), probabilities.clamp(min=threshold), probabilities)
    return filled * torch.from_numpy(edge)


def _without_border(result: Tensor, border: float, side: int) -> Tensor:
    """Cut the border off a square segmentation (n, n), and resize the rest to (side, side)."""
    total = round(side / (1 - 2 * border))
    enlarged = interpolate(result[None, None], size=(total, total), mode="bilinear", antialias=True,
                           align_corners=False)[0, 0]
    start = (total - side) // 2
    return enlarged[start:start + side, start:start + side].clamp(0, 1)
