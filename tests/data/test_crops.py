"""The squares of photos that training sees, against the subject's own box."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.crops import MARGIN, Square, center_square, subject_square
from ldm.data.images import crop_square


def mask_of(box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(size[1], size[0])
    mask[box[1]:box[3], box[0]:box[2]] = 1
    return mask


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (64, 131)])
def test_the_center_is_what_crop_square_takes(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert center_square(size).crop(image, 32).tobytes() == crop_square(image, 32).tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_square_is_inside_and_shows_the_whole_subject(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(20, 200)), data.draw(st.integers(20, 200))
    left, top = data.draw(st.integers(0, width - 2)), data.draw(st.integers(0, height - 2))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    square = subject_square(mask_of((left, top, right, bottom), (width, height)), (width, height))
    assert 0 <= square.left <= width - square.side and 0 <= square.top <= height - square.side
    assert square.side <= min(width, height)
    longer = max(right - left, bottom - top)
    if longer <= min(width, height):
        assert square.left <= left and square.left + square.side >= right
        assert square.top <= top and square.top + square.side >= bottom
        assert square.side >= min(min(width, height), round(longer * (1 + 2 * MARGIN)))


def test_a_subject_at_the_end_of_a_tall_photo() -> None:
    square = subject_square(mask_of((10, 0, 54, 60), (64, 256)), (64, 256))
    assert square == Square(0, 0, 64)


def test_a_small_subject_is_not_enlarged_beyond_the_photos_sharpness() -> None:
    mask = mask_of((90, 90, 110, 110), (200, 200))
    assert subject_square(mask, (200, 200)).side == 26
    assert subject_square(mask, (200, 200), min_side=64) == Square(68, 68, 64)


def test_almost_all_of_a_photo_is_all_of_it() -> None:
    assert subject_square(mask_of((20, 20, 92, 92), (100, 100)), (100, 100)) == Square(0, 0, 100)


def test_of_a_subject_longer_than_any_square_the_largest_part_is_shown() -> None:
    mask = mask_of((0, 28, 300, 32), (300, 60))
    mask[:, 200:260] = 1
    assert subject_square(mask, (300, 60)) == Square(200, 0, 60)


def test_masks_of_another_resolution() -> None:
    small = torch.nn.functional.interpolate(mask_of((80, 40, 120, 80), (400, 200))[None, None], scale_factor=0.25)[0, 0]
    assert subject_square(small, (400, 200)) == subject_square(mask_of((80, 40, 120, 80), (400, 200)), (400, 200))


def test_an_empty_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="no subject"):
        subject_square(torch.zeros(8, 8), (8, 8))
