"""The photos of Textual Inversion and DreamBooth: captions, pixels and the order of random numbers."""
from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ldm.common.errors import UserError
from ldm.data import personalized, personalized_style
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.personalized import PersonalizedBase, per_img_token_list
from ldm.util import instantiate_from_config

SIZE = 16


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, shape in enumerate([(32, 32, 3), (33, 48, 3), (40, 21, 3)]):
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


# Which photos a call means


@pytest.mark.parametrize("params", [
    {"set": "train"}, {"per_image_tokens": False}, {"interpolation": "lanczos"}, {"center_crop": True},
    {"mixing_prob": 0.5}, {"coarse_class_text": "toy"}, {"reg": False}])
def test_params_of_textual_inversion_decide(photos: Path, params: dict[str, Any]) -> None:
    assert isinstance(PersonalizedBase(photos, **params), PersonalizedBase)


@pytest.mark.parametrize("params", [{}, {"size": SIZE}, {"templates": "photo_small"}, {"seed": 3}])
def test_without_them_they_are_concept_photos(photos: Path, params: dict[str, Any]) -> None:
    built = PersonalizedBase(photos, **params)
    assert isinstance(built, ConceptPhotos) and not isinstance(built, PersonalizedBase)
    target = "ldm.data.personalized.PersonalizedBase"
    config = {"target": target, "params": {"data_root": str(photos), **params}}
    assert isinstance(instantiate_from_config(config), ConceptPhotos)


def test_positional_arguments_in_the_order_of_either_kind(photos: Path) -> None:
    assert isinstance(PersonalizedBase(photos, SIZE, 2, "bicubic", 0.5, "train"), PersonalizedBase)
    assert isinstance(PersonalizedBase(photos, SIZE, 2, 0.5, "<toy>"), ConceptPhotos)


def test_subclasses_are_textual_inversions(photos: Path) -> None:
    class Mine(PersonalizedBase):
        pass

    assert isinstance(Mine(photos, SIZE), Mine)


def test_params_of_both_kinds_are_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="leave out one kind"):
        PersonalizedBase(photos, set="train", mask_root="masks")
    with pytest.raises(UserError, match="does not know flips"):
        instantiate_from_config({"target": "ldm.data.personalized.PersonalizedBase",
                                 "params": {"data_root": str(photos), "set": "train", "flips": 1}})


# Items


def expected_pixels(path: str, size: int | None, flip_p: float, center_crop: bool = False) -> np.ndarray:
    """Use torchvision for what the data set does with Pillow."""
    image = Image.open(path).convert("RGB")
    if center_crop:
        pixels, side = np.array(image), min(image.size)
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        image = Image.fromarray(pixels[top:top + side, left:left + side])
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    image = transforms.RandomHorizontalFlip(flip_p)(image)
    return (np.array(image) / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize(("size", "center_crop"), [(SIZE, False), (SIZE, True), (None, False)])
def test_pixels(photos: Path, size: int | None, center_crop: bool) -> None:
    data = PersonalizedBase(photos, size, set="train", center_crop=center_crop)
    torch.manual_seed(1)
    items = [data[index]["image"] for index in range(12)]
    torch.manual_seed(1)
    for index, pixels in enumerate(items):
        path = os.path.join(photos, os.listdir(photos)[index % 3])
        assert np.array_equal(pixels, expected_pixels(path, size, 0.5, center_crop))


def test_one_seed_gives_the_captions_of_the_templates_in_order(photos: Path) -> None:
    data = PersonalizedBase(photos, SIZE, set="train", placeholder_token="*", coarse_class_text="toy")
    random.seed(5)
    captions = [data[index]["caption"] for index in range(20)]
    random.seed(5)
    templates = personalized.imagenet_templates_small
    assert captions == [random.choice(templates).format("toy *") for _ in range(20)]
    assert len(templates) == 81 and templates[:2] == ["a photo of a {}", "a rendering of a {}"]
    assert templates[27] == "an illustration of a {}" and templates[-1] == "a depiction of a small {}"


def test_per_image_tokens(photos: Path) -> None:
    data = PersonalizedBase(photos, SIZE, per_image_tokens=True, mixing_prob=0.5)
    random.seed(5)
    np.random.seed(5)
    captions = [data[index]["caption"] for index in range(30)]
    random.seed(5)
    np.random.seed(5)
    for index, caption in enumerate(captions):
        if np.random.uniform() < 0.5:
            template = random.choice(personalized.imagenet_dual_templates_small)
            assert caption == template.format("*", per_img_token_list[index % 3])
        else:
            assert caption == random.choice(personalized.imagenet_templates_small).format("*")
    assert len(per_img_token_list) == 22 and len(personalized.imagenet_dual_templates_small) == 27


def test_dreambooth(photos: Path) -> None:
    subject = PersonalizedBase(photos, SIZE, set="train", reg=False, placeholder_token="dog")
    images = PersonalizedBase(photos, SIZE, set="train", reg=True, placeholder_token="dog", repeats=10)
    assert subject[0]["caption"] == "photo of a sks dog" and images[0]["caption"] == "photo of a dog"
    assert (len(subject), len(images)) == (300, 30)


def test_styles(photos: Path) -> None:
    data = personalized_style.PersonalizedBase(photos, SIZE, placeholder_token="*")
    random.seed(2)
    caption = data[0]["caption"]
    random.seed(2)
    assert caption == random.choice(personalized_style.imagenet_templates_small).format("*")
    assert len(personalized_style.imagenet_templates_small) == 19
    assert len(personalized_style.imagenet_dual_templates_small) == 17
    assert "a painting of one {} in the style of {}" in personalized_style.imagenet_dual_templates_small


def test_every_photo_once_for_validation(photos: Path) -> None:
    assert len(PersonalizedBase(photos, set="val", repeats=10)) == 3


def test_workers_may_be_started_anew(photos: Path) -> None:
    data = pickle.loads(pickle.dumps(PersonalizedBase(photos, SIZE, set="train", flip_p=0.0)))
    assert data[1]["image"].shape == (SIZE, SIZE, 3)


# Mistakes


def test_unusable_photos(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder"):
        PersonalizedBase(tmp_path / "nowhere", set="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no photos"):
        PersonalizedBase(tmp_path / "empty", set="train")
    (tmp_path / "empty" / "notes.txt").write_text("no photo")
    with pytest.raises(UserError, match="notes.txt: cannot be read"):
        PersonalizedBase(tmp_path / "empty", set="train")[0]
    with pytest.raises(UserError, match="nearest"):
        PersonalizedBase(photos, interpolation="nearest")


def test_too_many_photos_for_per_image_tokens(tmp_path: Path) -> None:
    for number in range(22):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    with pytest.raises(UserError, match="words for 21 photos"):
        PersonalizedBase(tmp_path, per_image_tokens=True)
