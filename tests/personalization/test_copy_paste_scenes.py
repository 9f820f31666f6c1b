"""Scenes in which a concept stands beside other things: their captions, and a run that trains on them."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training_setup import FEW_IMAGES, in_project_root, run_main
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.storage import load_concepts
from ldm.data.concept_photos import ConceptPhotos
from ldm.personalization import copy_paste_scenes
from ldm.personalization.copy_paste_scenes import SceneSettings, add_scenes, scene_captions

TEDDY = "models/mini/examples/teddy"
SETTINGS = SceneSettings(3, 2, 2.0)


def model_that_knows(*words: str) -> Any:
    def unknown_words(text: str) -> list[str]:
        return [word for word in text.split() if words and word not in words]

    return SimpleNamespace(cond_stage_model=SimpleNamespace(unknown_words=unknown_words))


def test_captions_name_one_other_thing_that_is_known() -> None:
    captions = scene_captions(model_that_knows("mug", "teapot", "teddy", "bear", "owl"), "teddy bear", 9)
    assert len(captions) == 9 and captions == scene_captions(model_that_knows("mug", "teapot", "teddy", "bear", "owl"),
                                                             "teddy bear", 9)
    for caption in captions:
        assert caption.count("{}") == 1
        assert sum(thing in caption for thing in ("a mug", "a teapot", "an owl")) == 1
        assert "bear" not in caption
    assert any(caption.startswith("a photo of a {}") for caption in captions)
    assert any(caption.endswith("a {}") for caption in captions)


def test_a_text_encoder_that_knows_nothing_gets_captions_too() -> None:
    assert len(scene_captions(model_that_knows("zebra crossing"), "cat", 4)) == 4


def photos_with_masks(tmp_path: Path) -> ConceptPhotos:
    with in_project_root():
        photos = ConceptPhotos(TEDDY, size=64, placeholder_token="<it>")
    mask = torch.zeros(128, 128)
    mask[30:90, 40:80] = 1
    photos.set_subject_masks([mask] * len(photos.photos))
    return photos


def generate_gray(model: Any, captions: list[str], *_: object) -> Iterator[Tensor]:
    for index in range(len(captions)):
        yield torch.full((3, 64, 64), index / 100)


def test_images_without_the_super_category_make_no_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    regions = iter([None, torch.ones(64, 64) > 0] + [None] * 7)
    monkeypatch.setattr(copy_paste_scenes, "_generate", generate_gray)
    monkeypatch.setattr(copy_paste_scenes, "_find", lambda *_: next(regions))
    photos = photos_with_masks(tmp_path)
    with caplog.at_level(logging.WARNING):
        add_scenes(model_that_knows(), photos, "teddy bear", None, SETTINGS)
    assert photos.scene_count == 1
    assert "only 1 of 9 generated images" in caplog.text


def test_no_more_images_than_needed_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[20:40, 30:50] = True
    seen: list[Tensor] = []
    monkeypatch.setattr(copy_paste_scenes, "_generate", generate_gray)
    monkeypatch.setattr(copy_paste_scenes, "_find", lambda _, image, __: (seen.append(image), region)[1])
    photos = photos_with_masks(tmp_path)
    add_scenes(model_that_knows(), photos, "teddy bear", None, SETTINGS)
    assert photos.scene_count == len(seen) == 3
    # The subject of another photo each time, in the region
    scenes = photos.images[-3:]
    assert len({scene.tobytes() for scene in scenes}) == 3
    assert all(0.05 < float(photos.mask(len(photos.photos) + index).mean()) < 0.12 for index in range(3))


def test_photos_without_masks_get_no_scenes(caplog: pytest.LogCaptureFixture) -> None:
    with in_project_root():
        photos = ConceptPhotos(TEDDY, size=64, placeholder_token="<it>")
    add_scenes(model_that_knows(), photos, "teddy bear", None, SETTINGS)
    assert photos.scene_count == 0 and "no photo has a mask" in caplog.text


def test_scenes_need_a_segmenter(tmp_path: Path) -> None:
    with in_project_root(), pytest.raises(UserError, match="copy_paste_scenes 3: .* needs a segmenter"):
        run_main(["--base", "configs/perfusion.yaml", "-l", str(tmp_path / "logs"), "--masks", "none",
                  "model.params.copy_paste_scenes=3"])


@pytest.mark.slow
def test_a_run_makes_scenes_and_repeats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learned = []
    for name in ("a", "b"):
        with in_project_root(), caplog.at_level(logging.INFO):
            run_main(["--base", "configs/perfusion-scenes.yaml", "-l", str(tmp_path / name), "--accelerator", "cpu",
                      *FEW_IMAGES, "--max_steps", "2", "data.params.batch_size=4", "model.params.copy_paste_scenes=2",
                      "model.params.scene_steps=8"])
        (logdir,) = (tmp_path / name).iterdir()
        learned.append(load_concepts(logdir / "concept.safetensors")[0])
    assert "2 scenes beside other things" in caplog.text
    assert learned[0].used_layers == [] and len(learned[0].target_outputs_v) == 7
    for name, output in learned[0].target_outputs_v.items():
        assert torch.equal(output, learned[1].target_outputs_v[name])
