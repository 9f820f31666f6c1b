"""scripts/sample_diffusion.py on a tiny model without a condition."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import stand_ins
from helpers.model_files import Main, error_line, load_main, read_pixels
from helpers.oracles import randomize
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

CONFIG = "configs/latent-diffusion/celebahq-ldm-vq-4.yaml"


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("sample_diffusion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    section = stand_ins.stand_in(CONFIG, folder, timesteps=8)
    section["params"]["unet_config"]["params"]["image_size"] = 8  # the script reads the size of the U-Net
    model = randomize(instantiate_from_config(section), scale=0.1)
    torch.save({"global_step": 123, "state_dict": model.state_dict()}, folder / "model.ckpt")
    OmegaConf.save({"model": section}, folder / "config.yaml")
    return folder


def sample(main: Main, *arguments: object) -> np.ndarray:
    """Return the pixels of the newest run, after comparing its files with each other."""
    main([*map(str, arguments), "--device", "cpu", "--seed", "3", "--batch_size", "2", "-n", "5"])
    logdir = Path(arguments[3])
    (run,) = (logdir / Path(arguments[1]).name / "samples" / "00000123").iterdir()
    (file,) = (run / "numpy").iterdir()
    pixels = np.load(file)["arr_0"]
    assert file.name == "x".join(map(str, pixels.shape)) + "-samples.npz"
    images = sorted((run / "img").iterdir())
    assert [image.name for image in images] == [f"sample_{number:06}.png" for number in range(4)]
    assert np.array_equal(np.stack([read_pixels(image) for image in images]), pixels)
    assert OmegaConf.load(run / "sampling_config.yaml").n_samples == 5
    return pixels


@pytest.mark.slow
def test_a_run_writes_images_and_their_pixels(main: Main, folder: Path, tmp_path: Path) -> None:
    pixels = sample(main, "-r", folder, "-l", tmp_path / "a", "-c", 2, "-e", 0)
    assert len(pixels) == 4 and pixels.std() > 1
    assert np.array_equal(pixels, sample(main, "-r", folder, "-l", tmp_path / "b", "-c", 2, "-e", 0))
    noisy = sample(main, "-r", folder, "-l", tmp_path / "c", "-c", 2)
    assert not np.array_equal(pixels, noisy)
    ancestral = sample(main, "-r", folder, "-l", tmp_path / "d", "-v")
    assert not np.array_equal(ancestral, noisy)
    fewer = sample(main, "-r", folder, "-l", tmp_path / "e", "-v", "model.params.timesteps=4")
    assert not np.array_equal(ancestral, fewer)


def test_mistakes_are_reported_in_one_line(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such checkpoint" in error_line(main, ["-r", str(tmp_path)], capsys)
    other = error_line(main, ["-r", ".", "--steps", "3"], capsys)
    assert "--steps is a flag of other tools; here it is --custom_steps" in other
