"""The segmenter with a residual image tower: its receptive field, its folder, and damaged folders."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.oracles import randomize
from helpers.tiny_clips import MEAN, STD
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.common.errors import UserError
from ldm.modules.encoders.modules import TOKENIZER
from ldm.modules.residual_segmenter import ResidualSegmenter, is_residual, load_residual_segmenter
from ldm.modules.segmentation import ZeroShotSegmenter

SETTINGS = {
    "embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32},
    "text_cfg": {"width": 16, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 49408},
    "widths": [32, 32, 32, 32, 64]}


@pytest.fixture(scope="module")
def model() -> ResidualSegmenter:
    torch.manual_seed(0)
    return randomize(ResidualSegmenter(**SETTINGS), 1).eval()


@pytest.fixture(scope="module")
def folder(model: ResidualSegmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": ResidualSegmenter.model_type, **model.config}))
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD, "resample": 2}))
    return folder


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_logits_have_the_size_of_the_images_and_do_not_depend_on_the_batch(model: ResidualSegmenter) -> None:
    pixels, text_embedding = torch.randn(3, 3, 64, 32), torch.randn(3, 8)
    with torch.no_grad():
        together = model(pixels, text_embedding)
        alone = model(pixels[1:2], text_embedding[1:2])
        other = model(pixels[1:2], text_embedding[2:])
    assert together.shape == (3, 64, 32)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (alone - other).abs().max() > 1e-2


def test_receptive_field_covers_near_and_far_pixels(model: ResidualSegmenter) -> None:
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    model(pixels, torch.randn(1, 8))[0, 20, 30].backward()
    reach = pixels.grad[0].abs().sum(0)
    assert reach[20, 30] > 0 and reach[60, 60] > 0  # by the finest level, and by the coarsest


def test_loaded_segmenter_equals_the_saved_one(model: ResidualSegmenter, folder: Path) -> None:
    assert is_residual(folder) and not is_residual(folder.parent)
    segmenter = ZeroShotSegmenter.from_path(folder)
    tokens = segmenter.tokenizer(["a cat"], return_tensors="pt").input_ids
    with torch.no_grad():
        pixels, text_embedding = segmenter.preprocessing([noise()]), model.encode_text(tokens)
        expected = ((model(pixels, text_embedding) + model(pixels.flip(-1), text_embedding).flip(-1)) / 2).sigmoid()
    torch.testing.assert_close(segmenter.segment([noise()], "a cat"), expected, atol=1e-5, rtol=0)
    assert segmenter.segment([noise(), noise(1)], "a cat " * 30, 20).shape == (2, 20, 20)  # truncated
    assert load_residual_segmenter(folder).config == model.config


def test_bundled_segmenter_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    segmenter = ZeroShotSegmenter.from_path("models/mini/segmenter")
    assert segmenter.segment([noise()], "a cat", 8).shape == (1, 8, 8)


def test_a_mirror_image_has_the_mirror_image_of_the_mask(folder: Path) -> None:
    segmenter = ZeroShotSegmenter.from_path(folder)
    mirrored = Image.fromarray(np.asarray(noise())[:, ::-1])
    found = segmenter.segment([noise(), mirrored], "a cat")
    torch.testing.assert_close(found[0], found[1].flip(-1), atol=1e-5, rtol=0)
    assert (found[0] - found[0].flip(-1)).abs().max() > 1e-3


@pytest.mark.slow
def test_other_weights_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "out.bias": weights["out.bias"] + 1}, tmp_path / "other" / "model.safetensors")
    folders = folder, folder, tmp_path / "other"
    one, same, other = (ZeroShotSegmenter.from_path(path).fingerprint for path in folders)
    assert one == same != other


def damage(folder: Path, what: str) -> None:
    weights, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if what == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "no weights":
        weights.unlink()
    elif what == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()
    elif what == "another width":
        (folder / "config.json").write_text(json.dumps({**settings, "embed_dim": 16}))
    elif what == "another vocabulary":
        shutil.copy(TOKENIZER / "vocab.json", folder)
        (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
    elif what == "no settings":
        (folder / "config.json").write_text(json.dumps({"model_type": ResidualSegmenter.model_type}))
    else:
        (folder / "config.json").write_text("{")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights cut off", "no weights", "no preprocessing", "another width",
                                  "another vocabulary", "no settings", "settings cut off"])
def test_damaged_folders_are_refused_in_one_line(folder: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy", what)
    with pytest.raises(UserError, match="give a folder with a CLIPSeg model") as refused:
        ZeroShotSegmenter.from_path(tmp_path / "copy")
    assert "copy" in str(refused.value) and "\n" not in str(refused.value)
