"""scripts/img2img.py on a tiny model, as a user runs it."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.model_files import (
    PROMPT,
    QUICK,
    ROUNDING,
    Generate,
    Main,
    ModelFiles,
    error_line,
    image_paths,
    load_main,
    max_difference,
    read_pixels,
    run_script,
    script_generator,
)
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.images import crop_and_resize, from_tensor, read_image, to_tensor
from ldm.inference.output_folder import read_metadata
from ldm.util import instantiate_from_config

CAT = ("--prompt", "a cat", "--n_samples", 1)


def landscape(width: int, height: int) -> Image.Image:
    """Return a smooth image in which no two parts are alike."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, 128 + 127 * np.sin(x / 9))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return an image file of the model's size, so that nothing is cropped."""
    landscape(16, 16).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("img2img")


@pytest.mark.slow
def test_as_a_process_it_starts_from_a_rotated_jpeg_and_reports_what_it_did(
    model_files: ModelFiles, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    landscape(80, 48).save(tmp_path / "phone.jpg", exif=exif.tobytes())
    process = run_script(
        "img2img", "--config", model_files.config, "--init-img", tmp_path / "phone.jpg", "--concept",
        model_files.teddy, "--prompt", PROMPT, "a dog", "--negative_prompt", "a mug", "--n_samples", 2, "--strength",
        0.6, "--sampler", "euler_a", *QUICK, "--outdir", tmp_path / "out", cache=model_files.folder / "cache")
    assert process.returncode == 0, process.stderr
    written = image_paths(tmp_path / "out")
    assert len(written) == 4 and len({read_pixels(path).tobytes() for path in written}) == 4
    assert f"4 images: {written[0]} to 00003.png\n" in process.stdout
    assert f"{tmp_path / 'phone.jpg'}, 48x80: its middle, 48x48, is used, at 16x16\n" in process.stderr
    assert f"<teddy>: the teddy bear of {model_files.teddy}" in process.stderr
    metadata = read_metadata(written[3])
    assert (metadata["prompt"], metadata["seed"], metadata["negative_prompt"]) == ("a dog", 2, "a mug")
    assert (metadata["init_img"], metadata["strength"]) == (str(tmp_path / "phone.jpg"), 0.6)
    assert (metadata["sampler"], metadata["eta"]) == ("euler_a", 1)
    assert metadata["concepts"][0]["placeholder"] == "<teddy>"


@pytest.mark.slow
def test_strength_leads_from_the_reconstruction_to_the_image_of_txt2img(
    generate: Generate, model_files: ModelFiles, photo: Path, tmp_path: Path
) -> None:
    stage = instantiate_from_config(OmegaConf.load(model_files.config).model).eval().first_stage_model
    mean = stage.encode(to_tensor(read_image(photo))[None]).mode()
    reconstruction = np.asarray(from_tensor(stage.decode(mean)[0]), dtype=int)
    base = ("--init_img", photo, *CAT, "--steps", 10)
    near, middle, far = (np.abs(generate(*base, "--strength", strength)[0] - reconstruction).mean()
                         for strength in (0.01, 0.5, 1))
    assert near < 12 and 2 * near < middle and 2 * near < far
    txt2img = script_generator(load_main("txt2img"), model_files.config, tmp_path)(*CAT, "--steps", 10, outdir="other")
    assert max_difference(generate(*base, "--strength", 1), txt2img) == 0
    assert max_difference(generate(*base, "--strength", 0.9), txt2img) > ROUNDING


@pytest.mark.slow
def test_the_middle_of_an_image_of_any_size_and_mode_is_used(generate: Generate, tmp_path: Path) -> None:
    wide = landscape(96, 64)
    wide.save(tmp_path / "wide.bmp")
    crop_and_resize(wide, 16, 16).save(tmp_path / "middle.png")
    base = (*CAT, "--strength", 0.3, "--init-img")
    assert max_difference(generate(*base, tmp_path / "wide.bmp"), generate(*base, tmp_path / "middle.png")) == 0
    tall = generate(*base, tmp_path / "wide.bmp", "--H", 32, "--W", 20)
    assert tall.shape == (1, 32, 20, 3)
    for number, mode in enumerate(("L", "P", "RGBA", "CMYK", "1", "I;16")):
        path = tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
        (Image.new(mode, (40, 24)) if mode == "I;16" else landscape(40, 24).convert(mode)).save(path)
        assert generate(*base, path).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_images_depend_on_concept_and_seed_but_not_on_the_batch(
    generate: Generate, model_files: ModelFiles, photo: Path
) -> None:
    base = ("--init-img", photo, "--concept", model_files.teddy, "--strength", 0.8, "--prompt", PROMPT)
    four = generate(*base, "--n_samples", 4)
    assert max_difference(four[2:3], generate(*base, "--n_samples", 1, "--seed", 3)) <= ROUNDING
    assert max_difference(four[0], four[1]) > 10
    assert max_difference(four[:1], generate(*base, "--n_samples", 1, "--bias", 30)) > 10


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("--strength", "0"), "--strength: 0: must be above 0 and at most 1"),
    (("--strength", "1.5"), "1.5: must be above 0 and at most 1"),
    (("--strength", "half"), "'half' is not a number"),
    (("--init-img", "nowhere.png"), "nowhere.png: no such file"),
    (("--init-img", "{model_files}"), "no such file"),
    (("--init-img", "{model_files}/base.yaml"),
     r"base.yaml: cannot be read \(not an image: a text file\); .* JPEG or PNG"),
    (("--init-img", "{here}/cut.png"), "cut.png: cannot be read"),
    (("--init-img", "{here}/tiny.png"), "3x3 is too small"),
    (("--H", "30"), "height 30: this model generates multiples of 4"),
    (("--prompt", "a <mug>"), "names <mug>, but no loaded concept"),
    (("--mask", "mask.png"), "--mask: no such flag"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_mistakes_are_reported_in_one_line_before_anything_is_written(
    main: Main, model_files: ModelFiles, photo: Path, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "tiny.png")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    base = ("--init-img", str(photo), "--prompt", "a cat", "--config", str(model_files.config), "--outdir",
            str(tmp_path / "out"), *QUICK)
    given = [argument.format(model_files=model_files.folder, here=tmp_path) for argument in arguments]
    error = error_line(main, [*base, *given], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_an_image_is_required(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the following arguments are required: --init-img" in error_line(main, ["--prompt", "a cat"], capsys)
