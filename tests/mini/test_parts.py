"""Measurements of the parts on images, masks and captions with known results."""
from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from evaluation.mini import parts
from ldm.common.errors import UserError
from ldm.data.mini.world import KIND_NAMES


class FadingFirstStage(nn.Module):
    """A first stage that darkens each image by a known factor."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, sample_posterior: bool) -> tuple[Tensor, None]:
        assert not sample_posterior
        return x * self.share, None


def scene(value: float, caption: str = "", kind: int = 0, wide: int = 8) -> dict[str, object]:
    mask = torch.zeros(1, 16, 16)
    mask[..., :wide] = 1
    return {"image": torch.full((3, 16, 16), value), "caption": caption, "kind": kind, "mask": mask}


def test_psnr_is_relative_to_a_range_of_two() -> None:
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])  # the latter is clamped
    assert parts.psnr(images, reconstructions).tolist() == pytest.approx([20.0, 10 * math.log10(4)])


def test_each_scene_has_its_own_psnr() -> None:
    found = parts.reconstruction_psnr(FadingFirstStage(), [scene(1.0), scene(0.5), scene(0.1)], 2)
    assert found == pytest.approx([10 * math.log10(4 / 0.01), 10 * math.log10(4 / 0.0025)], abs=1e-3)


def test_intersection_over_union() -> None:
    left, top = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    left[..., :4], top[:, :4] = True, True
    assert parts.intersection_over_union(torch.cat([left, left, ~left]), torch.cat([left, top, left])).tolist() == (
        pytest.approx([1, 1 / 3, 0]))
    assert parts.intersection_over_union(left & ~left, left & ~left).tolist() == [0]


class LeftQuarter:
    """A segmenter that always returns the left quarter, and records its texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> Tensor:
        self.texts.append(text)
        found = torch.zeros(len(images), *size)
        found[..., : size[1] // 4] = 0.9
        return found


def test_subjects_are_segmented_by_the_names_of_their_kinds() -> None:
    segmenter = LeftQuarter()
    scenes = [scene(0, kind=kind, wide=wide) for kind, wide in ((0, 8), (3, 4), (0, 16))]
    found = parts.segmentation_ious(segmenter, scenes, 3)
    assert sorted(found) == pytest.approx([0.25, 0.5, 1.0])
    assert sorted(segmenter.texts) == sorted([KIND_NAMES[0], KIND_NAMES[3]])


class Numbered:
    """A CLIP to which a picture's brightness and a caption's number point in a direction each."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.one_hot((images.mean((1, 2, 3)) * 100).round().long(), 70).float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.one_hot(torch.tensor([int(text) for text in texts]), 70).float()


def test_captions_are_compared_with_63_others() -> None:
    scenes = [scene(number / 100, str(number)) for number in range(64)] + [scene(0, "0")] * 40
    assert parts.caption_hits(Numbered(), scenes, 100) == [100.0] * 64
    wrong = [scene(((number + 1) % 64 if number < 16 else number) / 100, str(number)) for number in range(64)]
    assert sum(parts.caption_hits(Numbered(), wrong, 64)) == 100 * 48
    same = [scene(0.05, "5")] * 64
    assert sum(parts.caption_hits(Numbered(), same, 64)) == 6400  # any of the equal captions is correct


def test_the_size_leaves_out_weights_for_training(tmp_path: Path) -> None:
    for name, size in (("model.safetensors", 1000), ("clip/model.safetensors", 500), ("parts/a.safetensors", 9000),
                       ("clip/config.json", 70)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert parts.weights_megabytes(tmp_path) == pytest.approx(0.0015)


@pytest.mark.slow
def test_commands_are_timed_with_few_threads() -> None:
    says = "import os, time; time.sleep(0.2); raise SystemExit(int(os.environ['OMP_NUM_THREADS']) > 2)"
    assert 0.2 < parts.time_command([sys.executable, "-c", says]) < 10
    with pytest.raises(UserError, match="failed while it was timed: no such luck"):
        parts.time_command([sys.executable, "-c", "raise SystemExit('no such luck')"])
