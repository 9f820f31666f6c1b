"""Masks of the parts to inpaint, against slow versions that go pixel by pixel."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.data.masks import dilate_mask, feather_mask, mask_to_image, read_binary_mask, unmasked_cells


def speckles(seed: int, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((1, 1, height, width)) < 0.03).float()


def distances(mask: torch.Tensor) -> np.ndarray:
    """Distance of each pixel from the nearest pixel of the mask, diagonals counted as one."""
    rows, columns = np.indices(mask.shape[-2:])
    positions = np.argwhere(mask[0, 0].numpy() > 0)
    return np.min([np.maximum(abs(rows - y), abs(columns - x)) for y, x in positions] or [rows * 0 + 999], axis=0)


@given(seed=st.integers(0, 50), pixels=st.integers(0, 6))
def test_dilating_and_feathering_follow_the_distance(seed: int, pixels: int) -> None:
    mask = speckles(seed)
    far = torch.from_numpy(distances(mask))
    assert torch.equal(dilate_mask(mask, pixels)[0, 0], (far <= pixels).float())
    slope = (1 - far / (pixels + 1)).clamp(min=0).float()
    soft = feather_mask(mask, pixels)[0, 0]
    assert torch.allclose(soft, slope, atol=1e-6)
    assert torch.equal(soft == 1, far == 0) and torch.equal(soft == 0, far > pixels)


def test_a_cell_is_unmasked_if_all_its_weights_are_zero() -> None:
    weights = torch.zeros(1, 1, 12, 16)
    weights[0, 0, 5, 9] = 0.01
    weights[0, 0, 0, 0] = 1
    expected = torch.ones(3, 4)
    expected[1, 2] = expected[0, 0] = 0
    assert torch.equal(unmasked_cells(weights, (3, 4))[0, 0], expected)


def test_a_painted_mask_is_cropped_as_its_photo_and_saved_again(tmp_path: Path) -> None:
    painted = Image.new("L", (60, 40))
    painted.paste(200, (10, 0, 30, 40))
    painted.paste(100, (30, 0, 50, 40))  # closer to black than to white
    painted.save(tmp_path / "mask.png")
    mask = read_binary_mask(tmp_path / "mask.png", (600, 400), 20, 20)
    assert mask.shape == (1, 1, 20, 20)
    assert mask[..., :9].all() and not mask[..., 11:].any()
    mask_to_image(mask).save(tmp_path / "again.png")
    assert torch.equal(read_binary_mask(tmp_path / "again.png", (600, 400), 20, 20), mask)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_zero_and_one_become_black_and_white(value: float) -> None:
    assert mask_to_image(torch.full((1, 1, 2, 3), value)).getcolors() == [(6, round(255 * value))]
