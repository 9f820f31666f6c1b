"""Prompts and their scenes, windows of two subjects, and recognition by constructed embeddings."""
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
    background_texts,
    kind_texts,
    plain_scenes,
    reference_images,
    scene_prompts,
    subject_windows,
)
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import BACKGROUND_NAMES, RELATIONS, Appearance, Scene, SceneSubject
from ldm.data.mini.world import HELD_OUT, KIND_NAMES, KINDS


def two_subjects(relation: str, first: str = "cat", second: str = "dog") -> ScenePrompt:
    """A prompt with a scene whose two subjects are a little off the relation's positions."""
    subjects = [SceneSubject(name, "noto", Appearance(), (x + 0.02, y - 0.01), extent)
                for name, ((x, y), extent) in zip((first, second), RELATIONS[relation][0], strict=True)]
    scene = Scene("snow", 0, subjects, [], "")
    return ScenePrompt(f"a {first} {relation} a {second}", 0, (first, second), None, scene)


@pytest.mark.parametrize("num_subjects", [1, 2])
def test_prompts_are_of_plain_subjects_and_reproducible(num_subjects: int) -> None:
    prompts = scene_prompts(30, seed=4, num_subjects=num_subjects)
    texts = [prompt.prompt for prompt in prompts]
    assert [prompt.prompt for prompt in scene_prompts(30, 4, num_subjects)] == texts
    assert [prompt.prompt for prompt in scene_prompts(30, 5, num_subjects)] != texts
    assert len({prompt.seed for prompt in prompts}) == 30
    for prompt in prompts:
        assert len(prompt.kinds) == num_subjects
        assert all(subject.appearance == Appearance() for subject in prompt.scene.subjects)
        words = [word for name in prompt.kinds for word in KINDS[KIND_NAMES.index(name)].words]
        assert any(word in prompt.prompt for word in words)
        assert prompt.background is None or prompt.prompt.endswith(BACKGROUNDS[prompt.background][1])


def test_known_and_held_out_sprites_do_not_mix() -> None:
    used = {held_out: {(subject.kind, subject.emoji_set) for prompt in scene_prompts(60, 1, 2, held_out)
                       for subject in prompt.scene.subjects}
            for held_out in (False, True)}
    assert not used[False] & HELD_OUT and used[True] <= HELD_OUT


def test_reference_images_are_those_of_the_dataset() -> None:
    dataset = plain_scenes(2, 1)
    expected = torch.stack([dataset[index]["image"] for index in range(3)])
    assert torch.equal(reference_images(scene_prompts(3, 2, 1)), expected)


def test_texts_name_their_class() -> None:
    for kind, texts in zip(KINDS, kind_texts(), strict=True):
        assert all(any(word in text for word in kind.words) for text in texts) and len(set(texts)) == len(texts)
    assert len(background_texts()) == len(BACKGROUND_NAMES)
    assert "a photo of a teddy bear in space" in background_texts()[BACKGROUND_NAMES.index("space")]


@pytest.mark.parametrize(("relation", "first", "second"), [
    ("left of", "left", "right"), ("right of", "right", "left"), ("and", "left", "right"),
    ("on top of", "top", "bottom")])
def test_windows_are_at_the_prompts_positions_in_its_order(relation: str, first: str, second: str) -> None:
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    means = subject_windows(image[None], [two_subjects(relation)]).mean((2, 3))
    side = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
    for mean, (axis, sign) in zip(means, (side[first], side[second]), strict=True):
        assert sign * mean[axis] > 0.3


class ColorEmbedder:
    """Reads the index of a kind from an image's mean red, and that of a background from its mean green."""

    kinds, backgrounds = len(KIND_NAMES), len(BACKGROUND_NAMES)

    def embed_classes(self, texts: Sequence[Sequence[str]], description: str) -> Tensor:
        rows = F.one_hot(torch.arange(len(texts)) + (0 if len(texts) == self.kinds else self.kinds))
        return F.pad(rows, (0, self.kinds + self.backgrounds - rows.shape[1])).float()

    def embed_images(self, images: Tensor) -> Tensor:
        red, green = ((images[:, channel].mean((1, 2)) + 1) * 50 for channel in (0, 1))
        return (F.one_hot(red.round().long(), self.kinds + self.backgrounds)
                + F.one_hot(green.round().long() + self.kinds, self.kinds + self.backgrounds)).float()


class EdgeEmbedder(ColorEmbedder):
    """Reads only the outer edge of an image, where a window never shows the other subject."""

    def embed_images(self, images: Tensor) -> Tensor:
        left, right = images[..., :2], images[..., -2:]
        is_left = (images[:, 0, 0, 0] == images[:, 0, 0, 20])[:, None, None, None]
        return super().embed_images(torch.where(is_left, left, right))


def painted(kinds: Sequence[int], background: int) -> Tensor:
    """An image of one kind, or of one on the left and one on the right, as `ColorEmbedder` reads them."""
    image = torch.full((3, 64, 64), -1.0)
    image[1] = background / 50 - 1
    for kind, part in zip(kinds, image[0].chunk(len(kinds), dim=1), strict=True):
        part.fill_(kind / 50 - 1)
    return image


def test_one_subject_is_recognized_in_the_whole_image() -> None:
    prompts = scene_prompts(3, 1, 1)
    kinds = [KIND_NAMES.index(prompt.kinds[0]) for prompt in prompts]
    backgrounds = [BACKGROUND_NAMES.index(prompt.scene.background) for prompt in prompts]
    kinds[1], backgrounds[1] = (kinds[1] + 1) % 100, (backgrounds[1] + 1) % 20  # both wrong
    images = [painted([kind], background) for kind, background in zip(kinds, backgrounds, strict=True)]
    results = SceneRecognizer(ColorEmbedder()).recognize(torch.stack(images), prompts)
    assert results.kind_hits(prompts) == [100.0, 0.0, 100.0]
    assert results.backgrounds[0] == prompts[0].scene.background
    assert results.backgrounds[1] != prompts[1].scene.background


def test_two_subjects_are_recognized_each_in_its_window() -> None:
    indices = [KIND_NAMES.index(name) for name in ("cat", "dog")]
    images = torch.stack([painted(indices, 3), painted(indices[::-1], 3), painted([indices[0]] * 2, 3)])
    prompts = [two_subjects("left of")] * 3
    results = SceneRecognizer(EdgeEmbedder()).recognize(images, prompts)
    assert results.kinds == [("cat", "dog"), ("dog", "cat"), ("cat", "cat")]
    assert results.kind_hits(prompts) == [100.0, 100.0, 0.0]  # in either order, but both


def test_hits_and_records() -> None:
    scene = two_subjects("and").scene
    prompts = [two_subjects("and"), ScenePrompt("a cat in space", 7, ("cat",), "space", scene),
               ScenePrompt("a cat", 8, ("cat",), None, scene)]
    results = RecognitionResults([("dog", "cat"), ("cat",), ("owl",)], ["snow", "sea", "sea"])
    assert results.kind_hits(prompts) == [100.0, 100.0, 0.0]
    assert results.background_hits(prompts) == [0.0]  # only the prompt that names a background
    assert results.records(prompts, "generated")[1] == {
        "images": "generated", "prompt": "a cat in space", "seed": 7, "kinds": "cat", "recognized kinds": "cat",
        "background": "space", "recognized background": "sea"}
