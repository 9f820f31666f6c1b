"""Prompts and their scenes, windows on two things, and answers of a recogniser whose embeddings are constructed."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.mini.world_prompts import (
    RecognitionResults,
    ScenePrompt,
    SceneRecognizer,
    scene_prompts,
    kind_texts,
    background_texts,
    reference_images,
    scenes,
    subject_windows,
)
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import BACKGROUND_NAMES, RELATIONS, Appearance, Scene, SceneSubject
from ldm.data.mini.world import HELD_OUT, KIND_NAMES, KINDS


def two(relation: str, first: str = "cat", second: str = "dog") -> ScenePrompt:
    """A scene of two things that are a little off their places."""
    subjects = [SceneSubject(name, "noto", Appearance(), (x + 0.02, y - 0.01), extent)
              for name, ((x, y), extent) in zip((first, second), RELATIONS[relation][0], strict=True)]
    return ScenePrompt(f"a {first} {relation} a {second}", 0, (first, second), None, Scene("snow", 0, subjects, [], ""))


@pytest.mark.parametrize("things", [1, 2])
def test_prompts_are_of_plain_things_and_always_the_same(subjects: int) -> None:
    wanted = scene_prompts(30, seed=4, subjects=subjects)
    assert [one.prompt for one in scene_prompts(30, 4, subjects)] == [one.prompt for one in wanted]
    assert [one.prompt for one in scene_prompts(30, 5, subjects)] != [one.prompt for one in wanted]
    assert len({one.seed for one in wanted}) == 30
    for one in wanted:
        assert len(one.kinds) == subjects and all(subject.appearance == Appearance() for subject in one.scene.subjects)
        words = [word for name in one.kinds for word in KINDS[KIND_NAMES.index(name)].words]
        assert any(word in one.prompt for word in words)
        assert one.background is None or one.prompt.endswith(BACKGROUNDS[one.background][1])


def test_known_and_held_out_drawings_do_not_mix() -> None:
    used = {held_out: {(subject.kind, subject.source) for one in scene_prompts(60, 1, 2, held_out) for subject in one.scene.subjects}
            for held_out in (False, True)}
    assert not used[False] & HELD_OUT and used[True] <= HELD_OUT


def test_real_pictures_are_the_datasets() -> None:
    assert torch.equal(reference_images(scene_prompts(3, 2, 1)), torch.stack([scenes(2, 1)[index]["image"] for index in range(3)]))


def test_texts_name_what_they_are_about() -> None:
    for kind, texts in zip(KINDS, kind_texts(), strict=True):
        assert all(any(word in text for word in kind.words) for text in texts) and len(set(texts)) == len(texts)
    assert len(background_texts()) == len(BACKGROUND_NAMES)
    assert "a photo of a teddy bear in space" in background_texts()[BACKGROUND_NAMES.index("space")]


@pytest.mark.parametrize(("relation", "first", "second"), [
    ("left of", "left", "right"), ("right of", "right", "left"), ("and", "left", "right"),
    ("on top of", "top", "bottom")])
def test_windows_are_where_the_prompt_says_in_its_order(relation: str, first: str, second: str) -> None:
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    middles = subject_windows(image[None], [two(relation)]).mean((2, 3))
    side = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    for middle, (axis, sign) in zip(middles, (side[first], side[second]), strict=True):
        assert sign * middle[axis] > 0.3


class ColourEmbedder:
    """Sees the mean red of a picture as the number of a kind and its mean green as that of a place."""

    kinds, backgrounds = len(KIND_NAMES), len(BACKGROUND_NAMES)

    def embed_classes(self, texts: Sequence[Sequence[str]], description: str) -> Tensor:
        rows = F.one_hot(torch.arange(len(texts)) + (0 if len(texts) == self.kinds else self.kinds))
        return F.pad(rows, (0, self.kinds + self.backgrounds - rows.shape[1])).float()

    def embed_images(self, images: Tensor) -> Tensor:
        red, green = ((images[:, channel].mean((1, 2)) + 1) * 50 for channel in (0, 1))
        return (F.one_hot(red.round().long(), self.kinds + self.backgrounds)
                + F.one_hot(green.round().long() + self.kinds, self.kinds + self.backgrounds)).float()


class SharpEmbedder(ColourEmbedder):
    """Looks at the outer edge of what it is shown, where a window never holds the other thing."""

    def embed_images(self, images: Tensor) -> Tensor:
        left, right = images[..., :2], images[..., -2:]
        is_left = (images[:, 0, 0, 0] == images[:, 0, 0, 20])[:, None, None, None]
        return super().embed_images(torch.where(is_left, left, right))


def painted(kinds: Sequence[int], background: int) -> Tensor:
    """A picture of one kind, or of one on the left and one on the right, as `ColourEmbedder` sees them."""
    image = torch.full((3, 64, 64), -1.0)
    image[1] = background / 50 - 1
    for number, half in zip(kinds, image[0].chunk(len(kinds), dim=1), strict=True):
        half.fill_(number / 50 - 1)
    return image


def test_one_thing_is_recognised_in_the_whole_picture() -> None:
    wanted = scene_prompts(3, 1, 1)
    right = [painted([KIND_NAMES.index(one.kinds[0])], BACKGROUND_NAMES.index(one.scene.background)) for one in wanted]
    right[1] = painted([(KIND_NAMES.index(wanted[1].kinds[0]) + 1) % 100],
                       (BACKGROUND_NAMES.index(wanted[1].scene.background) + 1) % 20)
    answers = SceneRecognizer(ColourEmbedder()).answers(torch.stack(right), wanted)
    assert answers.kind_hits(wanted) == [100.0, 0.0, 100.0]
    assert answers.backgrounds[0] == wanted[0].scene.background and answers.backgrounds[1] != wanted[1].scene.background


def test_two_things_are_recognised_each_in_its_window() -> None:
    numbers = [KIND_NAMES.index(name) for name in ("cat", "dog")]
    images = torch.stack([painted(numbers, 3), painted(numbers[::-1], 3), painted([numbers[0]] * 2, 3)])
    wanted = [two("left of")] * 3
    answers = SceneRecognizer(SharpEmbedder()).answers(images, wanted)
    assert answers.kinds == [("cat", "dog"), ("dog", "cat"), ("cat", "cat")]
    assert answers.kind_hits(wanted) == [100.0, 100.0, 0.0]  # whichever is where, but both


def test_the_arithmetic_of_answers() -> None:
    wanted = [two("and"), ScenePrompt("a cat in space", 7, ("cat",), "space", two("and").scene),
              ScenePrompt("a cat", 8, ("cat",), None, two("and").scene)]
    answers = RecognitionResults([("dog", "cat"), ("cat",), ("owl",)], ["snow", "sea", "sea"])
    assert answers.kind_hits(wanted) == [100.0, 100.0, 0.0]
    assert answers.place_hits(wanted) == [0.0]  # only the one that names a place
    second = answers.records(wanted, "drawn")[1]
    assert second == {"pictures": "drawn", "prompt": "a cat in space", "seed": 7, "kinds": "cat", "recognised": "cat",
                      "place": "space", "recognised place": "sea"}
