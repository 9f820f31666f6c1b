"""The scripts on a small Stable Diffusion XL in one file, as users call them."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sdxl
from helpers.model_files import ROOT, error_line, image_paths, load_main, read_pixels, run_script
from PIL import Image

from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.inference.output_folder import read_metadata

PROMPT = "a photo of a <toy>"
QUICK = ("--ddim_steps", "4", "--n_samples", "1", "--sampler", "ddim")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config, single-file weights, two concepts, a photo and a mask."""
    path = tmp_path_factory.mktemp("sdxl")
    sdxl.write_small_model(path)
    model = sdxl.small_model()
    save_perfusion_concepts(path / "toy.safetensors", [sdxl.small_concept(model)])
    save_perfusion_concepts(path / "pot.safetensors", [sdxl.small_concept(model, "<pot>", "cup", 1)])
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "photo.png")
    mask = Image.new("L", (24, 24))
    mask.paste(255, (0, 0, 12, 24))
    mask.save(path / "mask.png")
    return path


def model_flags(folder: Path) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--ckpt", str(folder / "model.safetensors"), "--device", "cpu"]


def test_images_of_prompts_as_a_process(folder: Path, tmp_path: Path) -> None:
    result = run_script("txt2img", *model_flags(folder), "--concept", folder / "toy.safetensors",
                        folder / "pot.safetensors", "--prompt", f"{PROMPT} next to a <pot>", "--negative_prompt",
                        "blurry", "--W", 24, "--crop_coords", 2, 0, "--original_size", 64, 48, *QUICK, "--outdir",
                        tmp_path, cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    (image,) = image_paths(tmp_path)
    metadata = read_metadata(image)
    assert read_pixels(image).shape == (16, 24, 3) and "nan" not in result.stderr.lower()
    assert metadata["original_size"] == [64, 48] and metadata["crop"] == [2, 0] and metadata["width"] == 24


def test_images_that_start_from_images(folder: Path, tmp_path: Path) -> None:
    shared = [*model_flags(folder), "--concept", str(folder / "toy.safetensors"), "--prompt", PROMPT,
              "--init-img", str(folder / "photo.png"), *QUICK]
    load_main("img2img")([*shared, "--strength", "0.5", "--outdir", str(tmp_path / "whole")])
    load_main("inpaint")([*shared, "--mask", str(folder / "mask.png"), "--outdir", str(tmp_path / "part")])
    whole, part = (read_pixels(image_paths(tmp_path / name)[0]) for name in ("whole", "part"))
    assert whole.shape == part.shape == (16, 16, 3) and np.abs(whole - part).max() > 8


def test_attention_maps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    load_main("attention_maps")([PROMPT, *model_flags(folder), "--concepts", str(folder / "toy.safetensors"),
                                 "--mask", str(folder / "mask.png"), *QUICK, "--outdir", str(tmp_path)])
    assert (tmp_path / "attention_maps-0000.png").is_file() and "Perfusion" in capsys.readouterr().out


def test_the_familys_script(folder: Path, tmp_path: Path) -> None:
    load_main("stable_txt2img")([*model_flags(folder), "--prompt", "a bear", "--H", "16", "--W", "24", "--f", "2",
                                 "--ddim_steps", "2", "--n_samples", "2", "--n_iter", "1", "--outdir", str(tmp_path)])
    assert read_pixels(image_paths(tmp_path)[0]).shape == (16, 24, 3)


def test_mistakes_are_told_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [*model_flags(folder), "--prompt", PROMPT, "--outdir", str(tmp_path)]
    message = error_line(load_main("txt2img"), [*shared, "--H", "17"], capsys)
    assert "multiples of 8 pixels; the nearest is 16" in message
    mini = ["--config", str(ROOT / "models/mini/config.yaml"), "--prompt", "a cat", "--outdir", str(tmp_path)]
    message = error_line(load_main("txt2img"), [*mini, "--target_size", "64", "64"], capsys)
    assert "target_size: this model does not read sizes" in message
