"""Thumbnails fit into 8 KB, survive files, and foreign ones are left out with one line."""
from __future__ import annotations

import base64
import io
import logging
from pathlib import Path

import numpy as np
import pytest
from helpers.concept_values import make_concept
from PIL import Image

from ldm.common.files import load_tensors, save_tensors
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.thumbnail import (
    MOST_BYTES,
    PREFIX,
    join_thumbnails,
    make_thumbnail,
    read_thumbnail,
    stored_thumbnail,
)


def noise(width: int, height: int) -> Image.Image:
    """The hardest image to compress."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("image", "smallest"), [
    (Image.new("RGB", (1000, 500), "orange"), 256), (noise(512, 512), 64), (noise(40, 2000), 2),
    (Image.new("RGBA", (30, 30)), 30)], ids=["plain", "noise", "narrow", "small and transparent"])
def test_a_thumbnail_has_at_most_8_kilobytes_and_the_shape_of_its_image(image: Image.Image, smallest: int) -> None:
    thumbnail = make_thumbnail(image)
    assert thumbnail.startswith(PREFIX) and len(thumbnail) <= MOST_BYTES
    found = read_thumbnail(thumbnail)
    assert max(found.size) >= smallest
    assert found.width / found.height == pytest.approx(image.width / image.height, rel=0.2)


def test_thumbnails_are_joined_side_by_side() -> None:
    colors = ((200, 30, 30), (30, 200, 30))
    joined = read_thumbnail(join_thumbnails([make_thumbnail(Image.new("RGB", (64, 64), color)) for color in colors]))
    assert joined.size == (128, 64)
    for x, color in ((32, colors[0]), (96, colors[1])):
        assert np.abs(np.subtract(joined.getpixel((x, 32)), color)).max() < 8
    assert join_thumbnails([]) == ""


def test_a_file_keeps_the_thumbnail_of_its_concept(tmp_path: Path) -> None:
    concept = make_concept(thumbnail=make_thumbnail(noise(64, 64)))
    path = save_perfusion_concepts(tmp_path / "c.safetensors", [concept])
    (loaded,) = load_perfusion_concepts(path)
    assert loaded.thumbnail == concept.thumbnail
    assert stored_thumbnail(path) == concept.thumbnail
    save_perfusion_concepts(path, [loaded, make_concept("<b>", seed=9)])
    assert stored_thumbnail(path) == "", "it shows one of two"


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return PREFIX + base64.b64encode(buffer.getvalue()).decode()


FOREIGN = {"png": png(), "long": PREFIX + "A" * MOST_BYTES, "no base64": PREFIX + "???", "text": "see my page",
           "cut": make_thumbnail(noise(64, 64))[:2000], "number": 3, "link": "https://example.com/a.jpg"}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_thumbnail_that_is_none_is_left_out_with_one_line(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_perfusion_concepts(tmp_path / "c.safetensors", [make_concept()])
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "modelspec.thumbnail": FOREIGN[name]})
    caplog.set_level(logging.WARNING)
    (loaded,) = load_perfusion_concepts(path)
    assert loaded.thumbnail == stored_thumbnail(path) == ""
    assert all("thumbnail is left out" in line and "\n" not in line for line in caplog.messages)
    assert len(caplog.messages) == 2
