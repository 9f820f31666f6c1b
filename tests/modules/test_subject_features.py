"""Features of a subject: cut-outs by geometry, statistics and colors in closed form, and what they do not depend on."""
from __future__ import annotations

import pytest
import torch
from helpers.oracles import randomize
from helpers.tiny_clips import tiny_openclip
from open_clip.transformer import VisionTransformer
from torch import Tensor

from ldm.modules.color_shares import LEVELS, color_shares
from ldm.modules.subject_features import MARGIN, SubjectFeatures, cut_out, masked_statistics

SIDE = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def box_mask(top: int, left: int, height: int, width: int, size: tuple[int, int] = (60, 40)) -> Tensor:
    mask = torch.zeros(size)
    mask[top:top + height, left:left + width] = 1
    return mask


@pytest.mark.parametrize("place", [(10, 5, 20, 20), (30, 12, 20, 10), (0, 0, 8, 20)])
def test_a_cut_out_shows_the_subject_in_its_middle(place: tuple[int, int, int, int]) -> None:
    mask = box_mask(*place)
    image, cut_mask = cut_out(torch.stack([mask, mask, mask]) * 2 - 1, mask, SIDE)
    rows, columns = (torch.nonzero(cut_mask[0].amax(axis) > 0.5)[:, 0] for axis in (1, 0))
    height, width = place[2:]
    scale = SIDE / (MARGIN * max(height, width))
    assert image.shape == (3, SIDE, SIDE) and cut_mask.shape == (1, SIDE, SIDE)
    assert len(rows) == pytest.approx(height * scale, abs=2) and len(columns) == pytest.approx(width * scale, abs=2)
    assert all(abs(float(line.float().mean()) - (SIDE - 1) / 2) <= 1 for line in (rows, columns))
    assert image[:, cut_mask[0] > 0.999].min() > 0.99 and image[:, cut_mask[0] < 0.001].max() <= 0


def test_a_mask_of_a_few_pixels_is_no_subject() -> None:
    image = torch.zeros(3, 60, 40)
    assert cut_out(image, box_mask(3, 3, 1, 7), SIDE) is None
    assert cut_out(image, box_mask(3, 3, 20, 20) * 0.4, SIDE) is None
    assert cut_out(image, box_mask(3, 3, 1, 8), SIDE) is not None


def test_statistics_are_those_of_the_pixels_in_the_mask() -> None:
    stage = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 4:8, 2:12] = 1
    masks[1] = 1
    mean, deviation = masked_statistics(stage, masks)
    inside = [stage[0, :, 2:4, 1:6].flatten(1), stage[1].flatten(1)]
    torch.testing.assert_close(mean, torch.stack([pixels.mean(1) for pixels in inside]))
    torch.testing.assert_close(deviation, torch.stack([pixels.std(1, correction=0) for pixels in inside]))


def test_color_shares_are_square_roots_of_shares() -> None:
    corner = torch.tensor([-1.0, 1.0, -1.0])[:, None].expand(3, 6)  # all pixels in one corner of the color cube
    shares = color_shares(corner[None])[0].reshape(LEVELS, LEVELS, LEVELS)
    assert float(shares.square().sum()) == pytest.approx(1)
    assert shares.argmax() == (LEVELS - 1) * LEVELS and float(shares.max() ** 2) > 0.7
    halves = torch.cat([corner, -corner], 1)[None]
    each = [color_shares(half[None])[0].square() for half in (corner, -corner)]
    torch.testing.assert_close(color_shares(halves)[0].square(), (each[0] + each[1]) / 2)
    only_first = torch.tensor([[1.0] * 6 + [0.0] * 6])
    torch.testing.assert_close(color_shares(halves, only_first), color_shares(corner[None]))


@pytest.fixture(scope="module", params=["residual", "transformer"])
def features(request: pytest.FixtureRequest) -> SubjectFeatures:
    tower = tiny_openclip().clip.visual
    if request.param == "transformer":
        torch.manual_seed(0)
        tower = VisionTransformer(SIDE, 8, width=16, layers=8, heads=2, mlp_ratio=2.0, output_dim=8)
    return SubjectFeatures(randomize(tower, 3, scale=0.1), MEAN, STD, SIDE)


def test_features_do_not_depend_on_what_is_around_the_subject(features: SubjectFeatures) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[:, :, 8:24, 4:20] = 1
    table = features(images, masks)
    assert table.shape == (2, features.width) and table.isfinite().all()
    torch.testing.assert_close(features(images * masks + (1 - masks) * 0.7, masks), table)
    assert not torch.allclose(features(images.flip(1), masks), table, atol=1e-2)
