"""Photos before they are cropped: masks of cut-outs, notes beside photos, and copies of the same shot."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from ldm.common.errors import UserError
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.crops import Square
from ldm.data.training_photos import KEPT_RESOLUTION, read_training_photos, same_shots


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def cut_out(seed: int) -> Image.Image:
    image = scene(seed).convert("RGBA")
    alpha = Image.new("L", image.size, 0)
    alpha.paste(255, (60, 8, 90, 40))
    image.putalpha(alpha)
    return image


def test_a_cut_out_brings_its_mask(tmp_path: Path) -> None:
    cut_out(0).save(tmp_path / "cut.png")
    opaque = scene(1).convert("RGBA")
    opaque.save(tmp_path / "opaque.png")
    cut, other = read_training_photos(tmp_path, 32)
    assert cut.mask_source == "transparency" and other.mask is None and other.mask_source == ""
    square = cut.square(True, 1)
    assert square == Square(54, 3, 42)
    mask = cut.cropped_mask(square, 32)
    assert mask is not None and mask.shape == (1, 32, 32) and mask.max() == 1 and mask[0, 0, 0] == 0
    assert cut.square(False, 1).side == 96


def test_painted_masks_have_precedence(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "m").mkdir()
    cut_out(0).save(tmp_path / "p/cut.png")
    painted = Image.new("L", (96, 96), 0)
    painted.paste(255, (0, 50, 30, 96))
    painted.save(tmp_path / "m/cut.png")
    photo, = read_training_photos(tmp_path / "p", 32, tmp_path / "m")
    assert photo.mask_source == "painted" and photo.mask is not None and photo.mask.tobytes() == painted.tobytes()


def test_a_photo_whose_subject_is_outside_of_a_center_crop_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "m").mkdir()
    scene(0, (64, 256)).save(tmp_path / "p/tall.png")
    painted = Image.new("L", (64, 256), 0)
    painted.paste(255, (8, 8, 56, 56))
    painted.save(tmp_path / "m/tall.png")
    photo, = read_training_photos(tmp_path / "p", 32, tmp_path / "m")
    outside = photo.cropped_mask(photo.square(False, 32), 32)
    assert outside is not None and not outside.any()
    with pytest.raises(UserError, match="no photo's center square"):
        ConceptPhotos(tmp_path / "p", 32, mask_root=tmp_path / "m", crop="center")
    scene(1).save(tmp_path / "p/other.png")
    Image.new("L", (96, 96), 255).save(tmp_path / "m/other.png")
    data = ConceptPhotos(tmp_path / "p", 32, mask_root=tmp_path / "m", crop="center")
    assert data.left_out == {"tall.png": "the subject is not in its center square"} and len(data.images) == 1
    mask = photo.cropped_mask(photo.square(True, 32), 32)
    assert mask is not None and mask.mean() > 0.5


def test_large_photos_are_reduced(tmp_path: Path) -> None:
    scene(0, (400, 300)).save(tmp_path / "a.png")
    photo, = read_training_photos(tmp_path, 32)
    assert photo.image.size == (128, 32 * KEPT_RESOLUTION)


def test_notes_beside_photos(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "a.jpg")
    scene(1).save(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("\ufeffnext to a blue mug,\n on a table\n", encoding="utf-8")
    first, second = read_training_photos(tmp_path, 32)
    assert first.note == "next to a blue mug, on a table" and second.note == ""
    (tmp_path / "a.txt").write_bytes("tête".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt: cannot be read as text"):
        read_training_photos(tmp_path, 32)


def test_copies_of_a_shot_are_found(tmp_path: Path) -> None:
    original = scene(0, (200, 150))
    original.save(tmp_path / "a.png")
    original.resize((133, 100)).save(tmp_path / "b.jpg", quality=70)
    ImageEnhance.Brightness(original).enhance(1.2).save(tmp_path / "c.png")
    for seed in range(1, 6):
        scene(seed, (200, 150)).save(tmp_path / f"other{seed}.png")
    photos = read_training_photos(tmp_path, 64)
    assert [(first.name, second.name) for first, second in same_shots(photos)] == [
        ("a.png", "b.jpg"), ("a.png", "c.png")]


def test_bundled_examples_are_different_shots() -> None:
    photos = read_training_photos("models/mini/examples/teddy", 128)
    assert len(photos) == 5 and same_shots(photos) == []
    assert all(torch.equal(torch.from_numpy(np.array(photo.image)), torch.from_numpy(np.array(Image.open(photo.path))))
               for photo in photos)
