"""Zero-shot masks of a tiny random CLIPSeg, against transformers' own model and closed forms."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_clips import MEAN, STD, write_segmenter
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

from ldm.common.errors import UserError
from ldm.modules.segmentation import (
    Preprocessing,
    ZeroShotSegmenter,
    mask_overlay,
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
