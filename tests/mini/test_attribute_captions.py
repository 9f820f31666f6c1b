"""Captions that bind attributes to nouns, and their plain and full forms."""
from __future__ import annotations

import pytest

from ldm.data.mini.attribute_captions import bind_attributes, full_caption, plain_caption
from ldm.data.mini.scenes import SceneDataset


@pytest.mark.parametrize(("caption", "plain", "full"), [
    ("a photo of a (orange striped|cat) on the beach", "a photo of a cat on the beach",
     "a photo of an orange striped cat on the beach"),
    ("a (red|owl) next to a (blue and red spotted|palm tree)", "an owl next to a palm tree",
     "a red owl next to a blue and red spotted palm tree"),
    ("a (red|cat) and a (red|cat)", "a cat and a cat", "a red cat and a red cat"),
    ("a small (red|owl)", "a small owl", "a small red owl"),
    ("a photo (with brackets) of a cat", "a photo (with brackets) of a cat", "a photo (with brackets) of a cat"),
    ("", "", "")])
def test_plain_and_full_captions(caption: str, plain: str, full: str) -> None:
    assert plain_caption(caption) == plain
    assert full_caption(caption) == full


def test_a_noun_without_attributes_stays_as_it_is() -> None:
    assert bind_attributes("", "cat") == "cat"
    assert full_caption(bind_attributes("red", "cat")) == "red cat"


def test_scenes_bind_colors_and_patterns_to_nouns() -> None:
    """Images do not change, and plain captions name no attributes."""
    common = {"two_subjects": 0.5, "patterned": 0.5, "sized": 0.5, "second_colors": 1.0, "seed": 4}
    without, bound = SceneDataset(**common), SceneDataset(**common, attribute_captions=1.0)
    sized = 0
    for index in range(60):
        expected, scene = without.plan(index), bound.plan(index)
        assert scene.subjects == expected.subjects and scene.background == expected.background
        plain = plain_caption(scene.caption)
        for subject, word in zip(scene.subjects, scene.words, strict=True):
            appearance = subject.appearance
            attributes = {appearance.color, appearance.second_color, appearance.pattern} - {None}
            assert not attributes & set(plain.split()), plain
            assert f" {word}" in plain
        sized += bool({"small", "big"} & set(plain.split()))
    assert sized > 5


def test_only_a_share_of_the_captions_binds_attributes() -> None:
    scenes = SceneDataset(colored=1.0, attribute_captions=0.5)
    captions = [scenes.plan(index).caption for index in range(100)]
    assert 20 < sum("|" in caption for caption in captions) < 70
