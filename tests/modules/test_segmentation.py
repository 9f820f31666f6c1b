"""Zero-shot masks of a tiny random CLIPSeg, against transformers' own model and closed forms."""
from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_clips import MEAN, STD, write_segmenter
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from ldm.common.errors import UserError
from ldm.data.images import crop_square
from ldm.modules.segmentation import (
    Preprocessing,
    ZeroShotSegmenter,
    cached_masks,
    mask_overlay,
    soft_mask,
    threshold_mask,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> ZeroShotSegmenter:
    return ZeroShotSegmenter.from_path(folder)


def noise(seed: int, width: int = 48, height: int = 48) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(found):
        noise(seed, 64, 40).save(path)
    return found


class CountingSegmenter:
    """Returns the brightness as probabilities, and counts the images."""

    def __init__(self, fingerprint: str = "one") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def segment(self, images: list[Image.Image], text: str, size: int) -> torch.Tensor:
        self.calls += len(images)
        assert all(image.size == (size, size) for image in images)
        return torch.stack([torch.from_numpy(np.array(image.convert("L"))) / 300 for image in images])


def test_probabilities_have_the_requested_size(segmenter: ZeroShotSegmenter) -> None:
    for size, expected in ((None, (48, 48)), (20, (20, 20)), ((10, 70), (10, 70))):
        found = segmenter.segment([noise(0), noise(1, 60, 30)], "teddy", size)
        assert (found.shape, found.dtype, found.requires_grad) == ((2, *expected), torch.float32, False)
        assert 0 <= found.min() < found.max() <= 1


def test_agrees_with_the_plain_model(segmenter: ZeroShotSegmenter, folder: Path) -> None:
    pixels = (torch.from_numpy(np.array(noise(3))) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    tokens = CLIPTokenizer.from_pretrained(folder)(["a toy teddy"], return_tensors="pt")
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(pixel_values=pixels.permute(2, 0, 1)[None], **tokens).logits
    expected = 1 / (1 + torch.exp(-logits.reshape(48, 48)))
    assert torch.allclose(segmenter.segment([noise(3)], "a toy teddy")[0], expected, atol=1e-5)


def test_result_depends_on_text_and_image_but_not_on_the_batch(segmenter: ZeroShotSegmenter) -> None:
    together = segmenter.segment([noise(0), noise(1)], "teddy")
    assert torch.allclose(together[1], segmenter.segment([noise(1)], "teddy")[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(together, segmenter.segment([noise(0), noise(1)], "clock"), atol=1e-4)


def test_long_texts_are_truncated(segmenter: ZeroShotSegmenter) -> None:
    assert segmenter.segment([noise(0)], "a very large green teddy bear " * 5).isfinite().all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [(352, (352, 352)), ({"height": 30, "width": 40}, (30, 40)), ({"shortest_edge": 64}, (64, 64)), (None, (224, 224))],
)
def test_sizes_of_preprocessing(size: object, expected: tuple[int, int]) -> None:
    config = {"size": size, "image_mean": MEAN, "image_std": STD}
    assert Preprocessing.from_config(config, 224)([noise(0)]).shape == (1, 3, *expected)


def copy_without(folder: Path, parent: Path, name: str) -> Path:
    """Copy a segmenter and remove or damage one part of it."""
    copy = parent / "copy"
    shutil.copytree(folder, copy)
    if name == "a weight":
        weights = load_file(folder / "model.safetensors")
        weights.pop("decoder.film_mul.weight")
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    elif name == "half":
        content = (folder / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    else:
        (copy / name).unlink()
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "a weight", "half"]
)
def test_incomplete_segmenters_are_refused(folder: Path, tmp_path: Path, missing: str) -> None:
    with pytest.raises(UserError, match="give a folder with a CLIPSeg model, or do something else") as refused:
        ZeroShotSegmenter.from_path(copy_without(folder, tmp_path, missing), instead="do something else")
    assert "copy" in str(refused.value) and "\n" not in str(refused.value)


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "no/such/folder"):
        with pytest.raises(UserError, match="no such folder"):
            ZeroShotSegmenter.from_path(path)


def test_half_precision_weights_run_in_full(folder: Path, tmp_path: Path, segmenter: ZeroShotSegmenter) -> None:
    shutil.copytree(folder, tmp_path / "half")
    CLIPSegForImageSegmentation.from_pretrained(folder).half().save_pretrained(tmp_path / "half")
    half = ZeroShotSegmenter.from_path(tmp_path / "half")
    assert half.model.dtype == torch.float32
    assert half.fingerprint != segmenter.fingerprint
    assert torch.allclose(half.segment([noise(0)], "cat"), segmenter.segment([noise(0)], "cat"), atol=0.05)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.floats(0.06, 1.0), st.integers(0, 1000))
def test_a_soft_mask_peaks_at_one(side: int, peak: float, seed: int) -> None:
    raw = torch.rand(side, side, generator=torch.Generator().manual_seed(seed))
    mask = soft_mask(raw / raw.max() * peak)
    assert mask.max() == 1 and mask.min() >= 0
    assert torch.allclose(mask, raw / raw.max(), atol=1e-5)


@pytest.mark.parametrize("probabilities", [torch.zeros(4, 4), torch.full((4, 4), 0.03), torch.full((4, 4), torch.nan)])
def test_an_empty_segmentation_gives_a_mask_of_ones(probabilities: torch.Tensor,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert soft_mask(probabilities, "cat.jpg").eq(1).all()
    assert "cat.jpg" in caplog.text


@pytest.mark.parametrize("read_as", ["I;16", "I"])
def test_masks_are_computed_once(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_as: str
                                 ) -> None:
    """Pillow reads PNG files of 16 bits as such, or, before 10.3, as integers of 32 bits."""
    segmenter, opened = CountingSegmenter(), Image.open
    first = cached_masks(paths, segmenter, "teddy", tmp_path / "cache", 24)
    assert segmenter.calls == 3 and len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setattr(Image, "open", lambda path: opened(path).convert(read_as) if "cache" in str(path)
                        else opened(path))
    second = cached_masks(paths, segmenter, "teddy", tmp_path / "cache", 24)
    assert segmenter.calls == 3
    for seed, (mask, again) in enumerate(zip(first, second, strict=True)):
        assert mask.shape == (1, 24, 24) and mask.max() == 1 and torch.equal(mask, again)
        expected = torch.from_numpy(np.array(crop_square(noise(seed, 64, 40), 24).convert("L"))).float()
        assert torch.allclose(mask[0], expected / expected.max(), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_masks_do_not_depend_on_the_batch_size(
    segmenter: ZeroShotSegmenter, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    batches: list[int] = []

    def counted(images: list[Image.Image], text: str, size: int) -> torch.Tensor:
        batches.append(len(images))
        return ZeroShotSegmenter.segment(segmenter, images, text, size)

    monkeypatch.setattr("ldm.modules.segmentation.BATCH_SIZE", batch_size)
    monkeypatch.setattr(segmenter, "segment", counted)
    masks = cached_masks(paths, segmenter, "teddy", tmp_path / str(batch_size), 40)
    monkeypatch.undo()
    assert batches == {1: [1, 1, 1], 2: [2, 1], 8: [3]}[batch_size]
    for seed, mask in enumerate(masks):
        raw = segmenter.segment([crop_square(noise(seed, 64, 40), 40)], "teddy", 40)[0]
        assert torch.allclose(mask[0], raw / raw.max(), atol=1e-3)


def test_the_cache_key_covers_photo_text_segmenter_and_size(paths: list[Path], tmp_path: Path) -> None:
    cache, segmenter = tmp_path / "cache", CountingSegmenter()
    cached_masks(paths, segmenter, "teddy", cache, 24)
    cached_masks(paths, segmenter, "clock", cache, 24)
    cached_masks(paths, segmenter, "teddy", cache, 16)
    assert segmenter.calls == 9
    other = CountingSegmenter("two")
    cached_masks(paths, other, "teddy", cache, 24)
    assert other.calls == 3
    noise(9).save(paths[0])
    cached_masks(paths, segmenter, "teddy", cache, 24)
    assert segmenter.calls == 10
    paths[1] = paths[1].rename(tmp_path / "renamed.png")
    cached_masks(paths, segmenter, "teddy", cache, 24)
    assert segmenter.calls == 10


def test_broken_cache_entries_are_made_again(paths: list[Path], tmp_path: Path) -> None:
    cache, segmenter = tmp_path / "cache", CountingSegmenter()
    before = cached_masks(paths, segmenter, "teddy", cache, 24)
    empty, cut, other = sorted(cache.iterdir())
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    Image.new("L", (24, 24), 255).save(other)
    after = cached_masks(paths, segmenter, "teddy", cache, 24)
    assert segmenter.calls == 6
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    cached_masks(paths, segmenter, "teddy", cache, 24)
    assert segmenter.calls == 6


def test_a_real_segmenter_fills_the_cache(segmenter: ZeroShotSegmenter, paths: list[Path], tmp_path: Path) -> None:
    masks = cached_masks(paths, segmenter, "teddy", tmp_path / "cache", 40)
    raw = segmenter.segment([crop_square(noise(0, 64, 40), 40)], "teddy", 40)[0]
    assert torch.allclose(masks[0][0], raw / raw.max(), atol=1e-3)


def test_the_overlay_darkens_what_is_hidden() -> None:
    mask = torch.zeros(1, 4, 4)
    mask[..., 2:] = 1
    pair = np.asarray(mask_overlay(Image.new("RGB", (32, 32), (100, 150, 200)), mask))
    assert pair.shape == (32, 64, 3)
    assert (pair[:, :32] == [100, 150, 200]).all()
    assert (pair[:, 32:48] == 0).all() and (pair[:, 48:] == [100, 150, 200]).all()


def test_threshold_is_half_of_the_maximum() -> None:
    found = torch.tensor([[0.8, 0.41, 0.39], [0.1, 0.5, 0.0]])
    assert threshold_mask(found, "cat", "a.png").tolist() == [[1, 1, 0], [0, 1, 0]]
    for nothing in (torch.full((2, 2), 0.5), torch.full((2, 2), float("nan"))):
        with pytest.raises(UserError, match="a.png: the segmenter finds no cat"):
            threshold_mask(nothing, "cat", "a.png")
