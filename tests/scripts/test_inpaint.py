"""scripts/inpaint.py on a tiny model, as a user runs it."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import (
    PROMPT,
    QUICK,
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
from PIL import Image

from ldm.data.images import crop_and_resize
from ldm.inference.output_folder import read_metadata
from ldm.modules.segmentation import ZeroShotSegmenter

CAT = ("--prompt", "a cat", "--n_samples", 2)
HARD = ("--border", 0)


class BrightnessSegmenter:
    """Stand-in for a segmenter: finds what is bright and records how it was called."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def load(self, name: str, device: object, instead: str) -> BrightnessSegmenter:
        assert "--mask FILE" in instead
        self.calls.append(name)
        return self

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> torch.Tensor:
        (image,) = images
        assert image.size == size[::-1]
        self.calls.append(text)
        return torch.from_numpy(np.array(image.convert("L"))).float()[None] / 300


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> BrightnessSegmenter:
    stand_in = BrightnessSegmenter()
    monkeypatch.setattr(ZeroShotSegmenter, "from_path", stand_in.load)
    return stand_in


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return an image file of the model's size: dark noise with a white square at x 8..12, y 4..8."""
    pixels = np.random.default_rng(0).integers(0, 90, (16, 16, 3), dtype=np.uint8)
    pixels[4:8, 8:12] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Return a mask file twice as large as the photo, white at the photo's x 4..12, y 8..16."""
    painted = Image.new("L", (32, 32))
    painted.paste(255, (8, 16, 24, 32))
    painted.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("inpaint")


def inside(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """Return a boolean mask of the tiny model's image size, True in a box."""
    box = np.zeros((16, 16), dtype=bool)
    box[top:bottom, left:right] = True
    return box


@pytest.mark.slow
def test_as_a_process_it_keeps_what_is_not_masked(
    model_files: ModelFiles, photo: Path, mask: Path, tmp_path: Path
) -> None:
    process = run_script(
        "inpaint", "--config", model_files.config, "--init-img", photo, "--mask", mask, "--concept", model_files.teddy,
        "--prompt", PROMPT, "a dog", "--n_samples", 2, "--border", 1, *QUICK, "--outdir", tmp_path / "out",
        cache=model_files.folder / "cache")
    assert process.returncode == 0, process.stderr
    used_mask = tmp_path / "out" / "mask-0000.png"
    assert f"the white part of {used_mask} is regenerated, with a border of 1 pixels\n" in process.stderr
    assert np.array_equal(read_pixels(used_mask), 255 * inside(4, 8, 12, 16))
    written = image_paths(tmp_path / "out")
    assert len(written) == 4 and len({read_pixels(path).tobytes() for path in written}) == 4
    outside = ~inside(3, 7, 13, 16)
    assert all(np.array_equal(read_pixels(path)[outside], read_pixels(photo)[outside]) for path in written)
    metadata = read_metadata(written[0])
    assert (metadata["init_img"], metadata["mask"]) == (str(photo), str(used_mask))
    assert (metadata["border"], metadata["strength"]) == (1, 1.0)
    assert metadata["concepts"][0]["placeholder"] == "<teddy>"


@pytest.mark.slow
def test_the_border_lies_outside_of_the_grown_mask(generate: Generate, photo: Path, mask: Path) -> None:
    original = read_pixels(photo)
    base = ("--init-img", photo, "--mask", mask, *CAT)
    hard, soft, grown = generate(*base, *HARD), generate(*base, "--border", 2), generate(*base, *HARD, "--grow", 3)
    for images, box in ((hard, (4, 8, 12, 16)), (soft, (2, 6, 14, 16)), (grown, (1, 5, 15, 16))):
        assert np.array_equal(images[:, ~inside(*box)], np.stack([original[~inside(*box)]] * 2))
    changed = np.abs(grown - original).max(axis=(0, 3))
    assert (changed[inside(1, 5, 15, 16)] > 0).mean() > 0.9
    assert max_difference(generate(*base, *HARD), hard) == 0
    default = generate(*base)  # the default border of such a small image has no width
    assert max_difference(default, hard) == 0


@pytest.mark.slow
def test_a_white_mask_gives_the_image_of_txt2img_and_strength_leads_there(
    generate: Generate, model_files: ModelFiles, photo: Path, tmp_path: Path
) -> None:
    Image.new("L", (16, 16), "white").save(tmp_path / "white.png")
    base = ("--init-img", photo, "--mask", tmp_path / "white.png", *CAT)
    txt2img = script_generator(load_main("txt2img"), model_files.config, tmp_path)(*CAT, outdir="other")
    assert max_difference(generate(*base), txt2img) == 0
    assert max_difference(generate(*base, "--strength", 0.5), txt2img) > 10


@pytest.mark.slow
def test_a_mask_found_by_a_word_can_be_given_again(
    generate: Generate, photo: Path, segmenter: BrightnessSegmenter, tmp_path: Path
) -> None:
    wide = Image.new("RGB", (48, 32))
    wide.paste(Image.open(photo).resize((32, 32), Image.Resampling.NEAREST), (8, 0))
    wide.save(tmp_path / "wide.png")
    base = ("--init-img", tmp_path / "wide.png", *CAT, *HARD)
    by_word = generate(*base, "--mask_word", "snow man", "--grow", 1)
    used_mask = tmp_path / "out" / "mask-0000.png"
    assert segmenter.calls == ["CIDAS/clipseg-rd64-refined", "snow man"]
    box = inside(7, 3, 13, 9)
    assert np.array_equal(read_pixels(used_mask) == 255, box)
    cropped = np.asarray(crop_and_resize(wide, 16, 16), dtype=int)
    assert np.array_equal(by_word[:, ~box], np.stack([cropped[~box]] * 2))
    assert max_difference(generate(*base, "--mask", used_mask), by_word) == 0
    assert (tmp_path / "out" / "mask-0001.png").read_bytes() == used_mask.read_bytes()
    (tmp_path / "own").mkdir()
    generate(*base, "--mask-word", "snow man", "--segmenter", tmp_path / "own")
    assert segmenter.calls[2:] == [str(tmp_path / "own"), "snow man"]


def test_the_opaque_part_of_a_transparent_image_is_the_mask(generate: Generate, photo: Path, tmp_path: Path) -> None:
    cutout = Image.new("RGBA", (16, 16))
    cutout.paste("black", (0, 0, 8, 16))
    cutout.save(tmp_path / "cutout.png")
    generate("--init-img", photo, "--mask", tmp_path / "cutout.png", *CAT)
    assert np.array_equal(read_pixels(tmp_path / "out" / "mask-0000.png") == 255, inside(0, 0, 8, 16))


def test_a_word_that_the_segmenter_does_not_find_is_an_error(
    main: Main, model_files: ModelFiles, segmenter: BrightnessSegmenter, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (16, 16), (60, 60, 60)).save(tmp_path / "grey.png")
    error = error_line(main, ["--init-img", str(tmp_path / "grey.png"), "--mask-word", "cat", "--prompt", "a dog",
                              "--config", str(model_files.config), "--outdir", str(tmp_path / "out")], capsys)
    assert f"{tmp_path / 'grey.png'}: the segmenter finds no cat in it (20 % likely at most); choose another" in error
    assert not (tmp_path / "out").exists()


MASK = ("--mask", "{here}/mask.png")
MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    ((), "one of the arguments --mask --mask-word/--mask_word is required"),
    ((*MASK, "--mask-word", "cat"), "argument --mask-word/--mask_word: not allowed with argument --mask"),
    ((*MASK, "--segmenter", "some/name"), "--segmenter looks for what --mask-word names"),
    (("--mask-word", "cat", "--segmenter", "no/such/folder"), "segmenter no/such/folder: no such folder"),
    (("--mask-word", " "), "--mask-word: names nothing"),
    ((*MASK, "--grow", "-1"), "-1: must be 0 or more"),
    ((*MASK, "--border", "5000"), "5000: must be 0 or more and less than 4096"),
    ((*MASK, "--strength", "0"), "must be above 0"),
    ((*MASK, "--init-img", "nowhere.png"), "nowhere.png: no such file"),
    (("--mask", "nowhere.png"), "nowhere.png: no such file"),
    (("--mask", "{model_files}/base.yaml"), "base.yaml: cannot be read"),
    (("--mask", "{here}/wide.png"), "wide.png: 32x16 does not fit its photo, 16x16"),
    (("--mask", "{here}/black.png"), "black.png: black where the photo is used, so nothing would change"),
    ((*MASK, "--prompt", "a <mug>"), "names <mug>"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_mistakes_are_reported_in_one_line_before_anything_is_written(
    main: Main, model_files: ModelFiles, photo: Path, mask: Path, tmp_path: Path, arguments: tuple[str, ...],
    message: str, capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("L", (32, 16), "white").save(tmp_path / "wide.png")
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    base = ("--init-img", str(photo), "--prompt", "a cat", "--config", str(model_files.config), "--outdir",
            str(tmp_path / "out"), *QUICK)
    given = [argument.format(model_files=model_files.folder, here=tmp_path) for argument in arguments]
    error = error_line(main, [*base, *given], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
