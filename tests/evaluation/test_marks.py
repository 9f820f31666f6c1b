"""Recognising concepts by their marks: classes against a closed form, scenes, and what prompts leave to be seen."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import marks
from evaluation.marks import Identity, Marks, Prototypes, identities, leaves_marks, pair, scene, spot_of, window
from evaluation.world_prompts import window_at
from ldm.data import example_concepts
from ldm.data.scenes import SIDE_BY_SIDE, Look
from ldm.data.world import HELD_OUT

FEW = ("teddy", "mug")


class PixelEmbedder:
    """Sees coarse pixels."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(F.interpolate(images, (6, 6), mode="area").flatten(1), dim=1)


@pytest.fixture(scope="module")
def recogniser() -> Iterator[Marks]:
    few = {name: example_concepts.CONCEPTS[name] for name in FEW}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "CONCEPTS", few)
        patch.setattr(marks, "FREE_PLACES", ("snow", "desert"))
        yield Marks(PixelEmbedder(), size=32, scenes=8)


def test_the_nearest_class_is_that_of_fishers_discriminant() -> None:
    draw = np.random.default_rng(0)
    means, shape = draw.normal(size=(5, 6)), draw.normal(size=(6, 6))
    known = means[:, None] + draw.normal(size=(5, 40, 6)) @ shape
    asked = draw.normal(size=(30, 6))
    centres = known.mean(1)
    within = (known - centres[:, None]).reshape(-1, 6)
    covariance = within.T @ within / len(within)
    inverse = np.linalg.inv(covariance + marks.RIDGE * np.trace(covariance) / 6 * np.eye(6))
    away = asked[:, None] - centres
    wanted = np.einsum("nci,ij,ncj->nc", away, inverse, away).argmin(1)
    found = Prototypes(torch.from_numpy(known).float()).nearest(torch.from_numpy(asked).float())
    assert found.tolist() == wanted.tolist()


def test_identities_are_concepts_and_what_is_like_them() -> None:
    every = identities()
    assert len({one.label for one in every}) == len(every) == 10 * (1 + 1 + 8 + 9)
    for one in every:
        held_out = {(one.kind, drawing) in HELD_OUT for drawing in one.drawings}
        assert held_out == {one.concept is not None}
        assert one.concept or example_concepts.CONCEPTS.get(one.kind, (None, None))[1] != one.look
    assert Identity("cat", Look()).label == "cat, plain"
    assert Identity("cat", Look("red", "striped", "blue")).label == "cat, red striped blue"


def test_scenes_show_the_thing_and_windows_it_beside_another() -> None:
    identity = Identity("mug", Look("purple"))
    for draw in (scene, window):
        first, again, other = (draw(identity, np.random.default_rng(seed), 32) for seed in (1, 1, 2))
        assert first.shape == (3, 32, 32) and torch.equal(first, again) and not torch.equal(first, other)
    both = pair("teddy", "mug", "snow", np.random.default_rng(3), 64)
    left, right = (window_at(both, spot) for spot, _ in SIDE_BY_SIDE)
    assert left[0].mean() < right[0].mean()  # purple on the left, orange on the right


def test_concepts_are_recognised_in_real_scenes_and_others_are_not_taken_for_them(recogniser: Marks) -> None:
    ceilings = {name: np.mean(hits) for name, hits in recogniser.ceilings(8).items()}
    assert ceilings["concepts alone"] > 75 and ceilings["concepts beside another thing"] > 75
    assert ceilings["others taken for a concept"] < 10
    assert ceilings["two concepts side by side, both"] > 50
    made = [pair("teddy", "mug", "snow", np.random.default_rng(seed), 32) for seed in range(10)]
    assert recogniser.both(torch.stack(made)).count(FEW) > 5


def test_a_spot_chooses_the_window(recogniser: Marks) -> None:
    made = torch.stack([pair("teddy", "mug", "desert", np.random.default_rng(seed), 32) for seed in range(8)])
    left = recogniser.nearest(made, [spot_of("a teddy next to a mug")] * 8)
    assert left == [first for first, _ in recogniser.both(made)]
    mug = Identity("mug", Look("orange", "spotted", "blue"), "mug")
    alone = torch.stack([scene(mug, np.random.default_rng(seed), 32)
                         for seed in range(8)])
    assert recogniser.nearest(alone, [None] * 8).count("mug") > 5
    assert recogniser.nearest(made[:0], []) == []


@pytest.mark.parametrize(("prompt", "spot"), [
    ("a photo of a cat in space", None), ("a cat next to a tulip in space", (0.27, 0.56)),
    ("a cat on top of a gift", (0.5, 0.27)), ("a cat right of a gift", (0.73, 0.56))])
def test_where_the_first_thing_stands(prompt: str, spot: tuple[float, float] | None) -> None:
    assert spot_of(prompt) == spot


@pytest.mark.parametrize(("prompt", "left"), [
    ("a photo of a cat in space", True), ("a photo of a red cat", False), ("a photo of a striped cat", False),
    ("a sketch of a cat", False), ("pixel art of a cat", False), ("a photo of a cat next to a tulip", True)])
def test_prompts_that_ask_for_other_looks_leave_no_marks(prompt: str, left: bool) -> None:
    assert leaves_marks(prompt) == left
