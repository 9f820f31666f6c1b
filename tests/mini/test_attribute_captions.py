"""Captions with asides: how they read with and without them."""
from __future__ import annotations

import pytest

from ldm.data.mini.attribute_captions import aside, full_caption, plain_caption
from ldm.data.mini.scenes import SceneDataset


@pytest.mark.parametrize(("caption", "told", "heard"), [
    ("a photo of a (orange striped|cat) on the beach", "a photo of a cat on the beach",
     "a photo of an orange striped cat on the beach"),
    ("a (red|owl) next to a (blue and red spotted|palm tree)", "an owl next to a palm tree",
     "a red owl next to a blue and red spotted palm tree"),
    ("a (red|cat) and a (red|cat)", "a cat and a cat", "a red cat and a red cat"),
    ("a small (red|owl)", "a small owl", "a small red owl"),
    ("a photo (with brackets) of a cat", "a photo (with brackets) of a cat", "a photo (with brackets) of a cat"),
    ("", "", "")])
def test_reading(caption: str, told: str, heard: str) -> None:
    assert plain_caption(caption) == told
    assert full_caption(caption) == heard


def test_no_words_are_no_aside() -> None:
    assert aside("", "cat") == "cat"
    assert full_caption(aside("red", "cat")) == "red cat"


def test_scenes_say_looks_in_asides() -> None:
    """The pictures stay what they are, and what is heard is what would have been said."""
    kept = {"two_things": 0.5, "patterned": 0.5, "sized": 0.5, "second_colours": 1.0, "seed": 4}
    said, with_asides = SceneDataset(**kept), SceneDataset(**kept, asides=1.0)
    sized = 0
    for index in range(60):
        plain, scene = said.plan(index), with_asides.plan(index)
        assert scene.things == plain.things and scene.place == plain.place
        told = plain_caption(scene.caption)
        for thing, word in zip(scene.things, scene.words, strict=True):
            worn = {thing.look.colour, thing.look.second, thing.look.pattern} - {None}
            assert not worn & set(told.split()), told
            assert f" {word}" in told
        sized += bool({"small", "big"} & set(told.split()))
    assert sized > 5


def test_only_some_captions_have_asides() -> None:
    scenes = SceneDataset(coloured=1.0, asides=0.5)
    captions = [scenes.plan(index).caption for index in range(100)]
    assert 20 < sum("|" in caption for caption in captions) < 70
