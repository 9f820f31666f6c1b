"""Pictures made from a picture, as a user makes them, on a tiny model."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.image_world import (
    PROMPT,
    QUICK,
    ROUNDING,
    Draw,
    Main,
    World,
    apart,
    complaint,
    drawer,
    levels,
    main_of,
    pictures,
    process,
)
from omegaconf import OmegaConf
from PIL import Image

from ldm.data.images import cut_to, from_tensor, read_image, to_tensor
from ldm.inference.output_folder import read_note
from ldm.util import instantiate_from_config

CAT = ("--prompt", "a cat", "--n_samples", 1)


def landscape(width: int, height: int) -> Image.Image:
    """Smooth, and no two parts of it alike."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, 128 + 127 * np.sin(x / 9))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Of the model's size, so that nothing is cut."""
    landscape(16, 16).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module")
def main() -> Main:
    return main_of("img2img")


def test_as_a_process_it_draws_from_a_phones_photo_and_says_what_it_did(world: World, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    landscape(80, 48).save(tmp_path / "phone.jpg", exif=exif.tobytes())
    done = process(
        "img2img", "--config", world.config, "--init-img", tmp_path / "phone.jpg", "--concept", world.teddy, "--prompt",
        PROMPT, "a dog", "--negative_prompt", "a mug", "--n_samples", 2, "--strength", 0.6, "--sampler", "euler_a",
        *QUICK, "--outdir", tmp_path / "out", cache=world.folder / "cache")
    assert done.returncode == 0, done.stderr
    written = pictures(tmp_path / "out")
    assert len(written) == 4 and len({levels(path).tobytes() for path in written}) == 4
    assert f"4 pictures: {written[0]} to 00003.png\n" in done.stdout
    assert f"{tmp_path / 'phone.jpg'}, 48x80: its middle, 48x48, is used, at 16x16\n" in done.stderr
    assert f"<teddy>: the teddy bear of {world.teddy}" in done.stderr
    note = read_note(written[3])
    assert (note["prompt"], note["seed"], note["negative_prompt"]) == ("a dog", 2, "a mug")
    assert (note["init_img"], note["strength"], note["sampler"]) == (str(tmp_path / "phone.jpg"), 0.6, "euler_a")
    assert note["concepts"][0]["placeholder"] == "<teddy>" and note["ddim_eta"] == 1


def test_strength_leads_from_the_reconstruction_to_what_txt2img_draws(
    draw: Draw, world: World, photo: Path, tmp_path: Path
) -> None:
    stage = instantiate_from_config(OmegaConf.load(world.config).model).eval().first_stage_model
    mean = stage.encode(to_tensor(read_image(photo))[None]).mode()
    reconstruction = np.asarray(from_tensor(stage.decode(mean)[0]), dtype=int)
    base = ("--init_img", photo, *CAT, "--steps", 10)
    near, middle, far = (np.abs(draw(*base, "--strength", strength)[0] - reconstruction).mean()
                         for strength in (0.01, 0.5, 1))
    assert near < 12 and 2 * near < middle and 2 * near < far
    drawn = drawer(main_of("txt2img"), world.config, tmp_path)(*CAT, "--steps", 10, outdir="other")
    assert apart(draw(*base, "--strength", 1), drawn) == 0
    assert apart(draw(*base, "--strength", 0.9), drawn) > ROUNDING


def test_the_middle_of_any_picture_is_used(draw: Draw, tmp_path: Path) -> None:
    wide = landscape(96, 64)
    wide.save(tmp_path / "wide.bmp")
    cut_to(wide, 16, 16).save(tmp_path / "middle.png")
    base = (*CAT, "--strength", 0.3, "--init-img")
    assert apart(draw(*base, tmp_path / "wide.bmp"), draw(*base, tmp_path / "middle.png")) == 0
    tall = draw(*base, tmp_path / "wide.bmp", "--H", 32, "--W", 20)
    assert tall.shape == (1, 32, 20, 3)
    for number, mode in enumerate(("L", "P", "RGBA", "CMYK", "1", "I;16")):
        path = tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
        (Image.new(mode, (40, 24)) if mode == "I;16" else landscape(40, 24).convert(mode)).save(path)
        assert draw(*base, path).shape == (1, 16, 16, 3)


def test_pictures_depend_on_concept_and_seed_but_not_on_the_batch(draw: Draw, world: World, photo: Path) -> None:
    base = ("--init-img", photo, "--concept", world.teddy, "--strength", 0.8, "--prompt", PROMPT)
    four = draw(*base, "--n_samples", 4)
    assert apart(four[2:3], draw(*base, "--n_samples", 1, "--seed", 3)) <= ROUNDING
    assert apart(four[0], four[1]) > 10
    assert apart(four[:1], draw(*base, "--n_samples", 1, "--bias", 30)) > 10


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("--strength", "0"), "--strength: 0: must be above 0 and at most 1"),
    (("--strength", "1.5"), "1.5: must be above 0 and at most 1"),
    (("--strength", "half"), "'half' is no number"),
    (("--init-img", "nowhere.png"), "nowhere.png: no such file"),
    (("--init-img", "{world}"), "no such file"),
    (("--init-img", "{world}/base.yaml"), r"base.yaml: cannot be read \(not a picture\); .* JPEG or PNG"),
    (("--init-img", "{here}/cut.png"), "cut.png: cannot be read"),
    (("--init-img", "{here}/tiny.png"), "3x3 is too small"),
    (("--H", "30"), "height 30: this model draws multiples of 4"),
    (("--prompt", "a <mug>"), "names <mug>, but no loaded concept"),
    (("--mask", "mask.png"), "unrecognized arguments: --mask"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(
    main: Main, world: World, photo: Path, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "tiny.png")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    base = ("--init-img", str(photo), "--prompt", "a cat", "--config", str(world.config), "--outdir",
            str(tmp_path / "out"), *QUICK)
    given = [argument.format(world=world.folder, here=tmp_path) for argument in arguments]
    error = complaint(main, [*base, *given], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_picture_is_needed(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the following arguments are required: --init-img" in complaint(main, ["--prompt", "a cat"], capsys)
