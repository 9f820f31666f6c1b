"""Composed subjects for the concept encoder: their looks have names, their masks are like a segmenter's."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.common.errors import UserError
from ldm.data.mini.composed_subjects import ComposedSubjects, all_looks, change_lightness, degrade_mask, look_words
from ldm.data.mini.scenes import Appearance, SceneDataset
from ldm.data.mini.world import sprite_sets


def test_every_look_has_its_own_words() -> None:
    looks = all_looks()
    assert len(looks) == len(set(looks)) == 1 + 8 + 8 * 7 * 2
    assert {"", "red", "purple and yellow striped"} <= set(looks)
    assert look_words(Appearance("red", "spotted", "blue")) == "red and blue spotted"


def test_items_say_what_they_show() -> None:
    subjects = ComposedSubjects(length=20, seed=3, patterned=1.0, without_kinds=["cat"], lightness=0.0)
    looks = set(all_looks())
    for index in range(4):
        item, scene = subjects[index], subjects.plan(index)
        assert item["image"].shape == (3, 64, 64) and item["mask"].shape == (1, 64, 64)
        assert float(item["mask"].max()) <= 1 and item["look"] in looks - {""} and item["kind"] == scene.words[0]
    assert all(subjects.plan(index).subjects[0].kind != "cat" for index in range(300))
    subjects.with_pixels = False
    assert subjects[7] == {"index": 7}


def test_held_out_sprites_are_not_seen() -> None:
    subjects = ComposedSubjects(length=300, seed=1)
    for index in range(200):
        for subject in subjects.plan(index).subjects:
            assert subject.emoji_set in sprite_sets(subject.kind)


@pytest.mark.parametrize("params", [{"without_kinds": ["sofa"]}, {"kinds": ["cat", "sofa"]}])
def test_unknown_kinds_are_refused(params: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="no kind of subject 'sofa'"):
        ComposedSubjects(**params)


def test_an_image_is_that_of_the_scenes_outside_of_its_subject() -> None:
    params = {"length": 9, "seed": 5, "patterned": 0.0, "styled": 0.0}
    subjects, scenes = ComposedSubjects(lightness=1.0, **params), SceneDataset(**params)
    changed = subjects[2]["image"] - scenes[2]["image"]
    mask = scenes[2]["mask"]
    assert float((changed * (mask == 0)).abs().max()) < 1e-5 < float((changed * mask).abs().max())


def test_masks_are_exact_or_a_little_off() -> None:
    exact = torch.zeros(64, 64)
    exact[20:40, 16:44] = 1
    areas = np.array([float((degrade_mask(exact, np.random.default_rng(seed)) > 0.5).sum()) for seed in range(200)])
    share = {"exact": (areas == 560).mean(), "larger": (areas > 560).mean(), "smaller": (areas < 560).mean()}
    assert share["exact"] > 0.25 and share["larger"] > 0.15 and share["smaller"] > 0.3
    assert areas.min() > 0.6 * 560 and areas.max() < 1.5 * 560
    tiny = torch.zeros(64, 64)
    tiny[5:8, 5:8] = 1
    assert all((degrade_mask(tiny, np.random.default_rng(seed)) > 0.5).any() for seed in range(30))


def test_lightness_scales_colors_or_mixes_white() -> None:
    pixels, mask = torch.full((3, 4, 4), 0.6), torch.ones(4, 4)
    found = [float(change_lightness(pixels, mask, np.random.default_rng(seed), 1.0)[0, 0, 0]) for seed in range(60)]
    assert 0.3 <= min(found) < 0.45 and 0.68 < max(found) <= 0.76
    assert torch.equal(change_lightness(pixels, mask, np.random.default_rng(0), 0.0), pixels)
