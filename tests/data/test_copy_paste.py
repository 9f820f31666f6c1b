"""The subject of a photo in the place of something else: geometry, opacity, and what is left behind it."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.data.copy_paste import box_of, fill_region, paste_subject

SIZE = 64
RED, GREEN, GRAY = [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [0.1, 0.1, 0.1]


def plain(color: list[float]) -> Tensor:
    return torch.tensor(color)[:, None, None].expand(3, SIZE, SIZE).clone()


def disc(x: float, y: float, radius: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return ((columns - x) ** 2 + (rows - y) ** 2).sqrt() <= radius


def paint(image: Tensor, region: Tensor, color: list[float]) -> Tensor:
    return torch.where(region, torch.tensor(color)[:, None, None], image)


@pytest.mark.parametrize(("x", "y", "radius"), [(16.0, 40.0, 10.0), (48.0, 30.0, 6.0), (32.0, 32.0, 25.0)])
def test_the_subject_takes_the_place_and_size_of_the_object(x: float, y: float, radius: float) -> None:
    photo_mask, region = disc(30.0, 34.0, 20.0), disc(x, y, radius)
    photo, scene = paint(plain(GRAY), photo_mask, RED), paint(plain([0.0, 0.0, 1.0]), region, GREEN)
    image, mask = paste_subject(scene, region, photo, photo_mask.float())
    # Closed form: a disc that is moved and scaled is a disc.
    expected = disc(x, y, radius).float()
    assert (mask - expected).abs().mean() < 0.02
    center_x, center_y, side = box_of(mask > 0.5)
    assert abs(center_x - x) <= 1 and abs(center_y - y) <= 1 and abs(side - 2 * radius) <= 2
    torch.testing.assert_close(image[:, disc(x, y, radius - 3)], torch.tensor(RED)[:, None].expand(
        3, int(disc(x, y, radius - 3).sum())), atol=0.02, rtol=0)
    far = ~disc(x, y, radius + 6)
    assert torch.equal(image[:, far], scene[:, far])


def test_nothing_of_the_object_shows_behind_a_slim_subject() -> None:
    region, scene = disc(32.0, 32.0, 14.0), paint(plain(GRAY), disc(32.0, 32.0, 14.0), GREEN)
    slim = disc(32.0, 32.0, 20.0) & (torch.arange(SIZE) // 4 == 8)[None]
    image, mask = paste_subject(scene, region, paint(plain(GRAY), slim, RED), slim.float())
    beside = region & (mask < 0.05)
    assert beside.sum() > 200
    torch.testing.assert_close(image[:, beside], plain(GRAY)[:, beside], atol=0.02, rtol=0)


def test_filling_keeps_what_is_outside() -> None:
    torch.manual_seed(0)
    image, region = torch.rand(3, SIZE, SIZE) * 2 - 1, disc(20.0, 20.0, 8.0)
    filled = fill_region(image, region)
    outside = ~disc(20.0, 20.0, 13.0)
    assert torch.equal(filled[:, outside], image[:, outside])
    assert not torch.equal(filled[:, region], image[:, region])


def test_empty_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        paste_subject(plain(GRAY), torch.zeros(SIZE, SIZE, dtype=torch.bool), plain(RED), disc(9, 9, 4).float())
    with pytest.raises(ValueError, match="empty"):
        paste_subject(plain(GRAY), disc(9, 9, 4), plain(RED), torch.zeros(SIZE, SIZE))
