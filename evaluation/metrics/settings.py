"""The settings of image comparisons, as plain values. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass

NO_SEGMENTER = "none"


@dataclass(frozen=True)
class ReferenceSettings:
    """The references of a concept's images, and the models that compare them.

    Attributes:
        photos: folder of the concept's photos.
        masks: folder with a mask for each photo, white where the concept is; None: the segmenter finds it.
        super_category: what kind of object the concept is, in plain words; None: the concept or the images tell.
        clip: folder or name of a CLIP; None: the model's.
        segmenter: folder or hub name of a CLIPSeg; `NO_SEGMENTER`: objects are not compared; None: the model's.
    """

    photos: str
    masks: str | None = None
    super_category: str | None = None
    clip: str | None = None
    segmenter: str | None = None
