"""Segmentations of photos, computed once and kept on disk."""
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.common.files import write_atomically
from ldm.common.progress import show_progress
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.modules.subject_masks import find_subject

logger = logging.getLogger(__name__)

LEVELS = 65535  # cached probabilities are PNG files with 16 bits per pixel
CACHED_DTYPES = (np.uint16, np.int32)  # the dtypes in which newer and older versions of Pillow read these files
CACHE_FORMAT = "photos-1"  # part of every cache key: change it when the segmentation or the file format changes


def cached_subjects(paths: Sequence[Path], images: Sequence[Image.Image], segmenter: ZeroShotSegmenter, text: str,
                    folder: str | Path, size: int) -> list[Tensor]:
    """Segment the subject in whole photos, or read what an earlier call has kept.

    There is one PNG file per photo. Its name depends on the photo's file, `text`, the segmenter and `size`. Files that
    cannot be read are made again.

    Args:
        paths: the files of the photos.
        images: their pixels.
        segmenter: the segmenter.
        text: what the photos show, the super-category.
        folder: where the segmentations are kept.
        size: length of a segmentation's shorter side.

    Returns:
        Probabilities (h, w) in [0, 1], one tensor for each photo.
    """
    files = [_cache_file(Path(folder), path, text, segmenter.fingerprint, size) for path in paths]
    found = [_read_cached(file, size) for file in files]
    missing = [index for index, probabilities in enumerate(found) if probabilities is None]
    for index in show_progress(missing, description=f"masks of {text!r}", unit="photos", leave=True,
                               enabled=bool(missing)):
        levels = (find_subject(segmenter, images[index], text, size).numpy().astype(np.float64) * LEVELS).round()
        _write_cached(files[index], levels.astype(np.uint16))
        found[index] = levels / LEVELS
    return [torch.from_numpy(probabilities).float() for probabilities in found]


def _cache_file(folder: Path, photo: Path, text: str, fingerprint: str, size: int) -> Path:
    content = hashlib.blake2b(photo.read_bytes()).hexdigest()
    key = json.dumps([CACHE_FORMAT, content, text, fingerprint, size])
    return folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.png"


def _write_cached(path: Path, levels: np.ndarray) -> None:
    image = Image.fromarray(levels)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def _read_cached(path: Path, size: int) -> np.ndarray | None:
    """Read probabilities whose shorter side is `size`; return None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            levels = np.array(opened)
    except Exception as error:  # damaged PNG files raise many exceptions
        logger.warning("%s: cached mask cannot be read (%s); made again", path, error)
        return None
    if levels.ndim != 2 or min(levels.shape) != size or levels.dtype not in CACHED_DTYPES:
        logger.warning("%s: not a cached mask of %d pixels; made again", path, size)
        return None
    return levels / LEVELS
