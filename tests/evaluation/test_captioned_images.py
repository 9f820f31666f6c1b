"""Images with their prompts: placeholders put into plain words, and lists of captions as users write them."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evaluation.metrics.captioned_images import Caption, read_captions
from ldm.common.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images, 0.png to 2.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    return folder


def test_placeholders_become_super_categories() -> None:
    caption = Caption("a <toy> next to an <Cup>", {"<toy>": "owl", "<cup>": "mug"})
    assert caption.text(None) == caption.text("cat") == "an owl next to a mug"
    assert Caption("a <toy>", {"<toy>": "owl"}).text("cat") == "a cat"
    assert Caption("a <toy> and a {}").text("cat") == "a cat and a cat"
    assert Caption("a sks-2 next to a sks", {"sks": "owl", "sks-2": "mug"}).text(None) == "a mug next to an owl"


def test_super_categories_beside_their_placeholders_are_written_once() -> None:
    assert Caption("photo of a <new1> cat at a beach").text("cat") == "photo of a cat at a beach"
    known = {"<my-teddy>": "teddy bear"}
    assert Caption("a <my-teddy> teddy bear in the snow", known).text(None) == "a teddy bear in the snow"
    assert Caption("a {} cat and two cats").text("cat") == "a cat and two cats"


def test_weights_are_no_part_of_the_text() -> None:
    caption = Caption("a (<my-teddy>:1.3) on the [beach]", {"<my-teddy>": "teddy bear"})
    assert caption.text(None) == "a teddy bear on the beach"
    assert replace(caption, prompt_weights=False).text(None) == "a (teddy bear:1.3) on the [beach]"
    with pytest.raises(UserError, match="<lora:x:0.8>"):
        Caption("a dog <lora:x:0.8>").text("cat")


def test_images_that_are_not_listed_are_left_out(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                 ) -> None:
    list_file = tmp_path / "captions.csv"
    list_file.write_text("\ufeffprompt,file\n a dog ,1.png\n", encoding="utf-8")
    (caption,) = read_captions(images, list_file)
    assert caption == Caption("a dog", file=images / "1.png")
    assert f"2 images of {images} are not in" in caplog.text


@pytest.mark.parametrize(("content", "message"), [
    ("file,text\n1.png,a dog\n", "its first line must be file,prompt"), ("file,prompt\n", "a line for each image"),
    ("file,prompt\n1.png,\n", "line 2: it lacks a prompt"), ("file,prompt\n,a dog\n", "line 2: it lacks a file"),
    ("file,prompt\n1.png,a dog\n9.png,a dog\n", "line 3: there is no"), (None, "no such file")])
def test_lists_with_errors(content: str | None, message: str, images: Path, tmp_path: Path) -> None:
    list_file = tmp_path / "captions.csv"
    if content is not None:
        list_file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_captions(images, list_file)
