"""Recognising concepts by their marks: classes against a closed form, scenes, and what prompts leave to be seen."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.mini import fidelity as marks
from evaluation.mini.fidelity import (
    ExampleSubject,
    SubjectFidelity,
    Prototypes,
    colors,
    candidate_subjects,
    example_subject,
    keeps_attributes,
    pair,
    scene,
    first_subject_position,
    window,
)
from evaluation.mini.world_prompts import window_at
from ldm.data.mini import example_concepts
from ldm.data.mini.scenes import SIDE_BY_SIDE, Appearance
from ldm.data.mini.world import HELD_OUT

FEW = ("teddy", "mug")


class PixelEmbedder:
    """Sees coarse pixels."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(F.interpolate(images, (6, 6), mode="area").flatten(1), dim=1)


@pytest.fixture(scope="module")
def recogniser() -> Iterator[SubjectFidelity]:
    few = {name: example_concepts.CONCEPTS[name] for name in FEW}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "CONCEPTS", few)
        patch.setattr(marks, "FREE_PLACES", ("snow", "desert"))
        yield SubjectFidelity(PixelEmbedder(), size=32, scenes=8)


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
    found = Prototypes(torch.from_numpy(known).float()).classify(torch.from_numpy(asked).float())
    assert found.tolist() == wanted.tolist()


def test_identities_are_kinds_in_looks_by_known_and_by_held_out_drawings() -> None:
    every = candidate_subjects()
    assert len({one.label for one in every}) == len(every) == 10 * (1 + 8 + 10) * 2
    for one in every:
        assert {(one.kind, load_sprite) in HELD_OUT for load_sprite in one.drawings} == {one.held_out}
    bearers = [one for one in every if one.concept]
    assert sorted(one.concept for one in bearers) == sorted([*example_concepts.CONCEPTS] * 2)
    assert all(example_concepts.CONCEPTS[one.concept] == (one.kind, one.appearance) for one in bearers)
    assert ExampleSubject("cat", Appearance(), False).label == "cat, plain"
    assert example_subject("cat").label == "cat, blue striped orange, held out" and example_subject("cat").concept == "cat"


def test_colours_are_shares_of_shades() -> None:
    image = torch.full((2, 3, 64, 64), -1.0)
    image[1, :, :, 32:] = 1.0
    image[1, 1, :, 32:] = -1.0  # the right half is magenta
    black, halves = colors(image).view(2, 4, 4, 4) ** 2
    assert torch.allclose(colors(image).norm(dim=1), torch.ones(2))
    assert black[0, 0, 0] == black.max() > 0.6
    assert torch.allclose(halves, (black + black.flip(0, 2)) / 2)


def test_colours_do_not_look_at_the_border() -> None:
    inside = torch.rand(1, 3, 64, 64) * 2 - 1
    other = F.pad(inside[..., 8:-8, 8:-8], (8, 8, 8, 8), value=1.0)
    assert torch.equal(colors(inside), colors(other))


def test_scenes_show_the_thing_and_windows_it_beside_another() -> None:
    identity = ExampleSubject("mug", Appearance("purple"), held_out=False)
    for draw in (scene, window):
        first, again, other = (draw(identity, np.random.default_rng(seed), 32) for seed in (1, 1, 2))
        assert first.shape == (3, 32, 32) and torch.equal(first, again) and not torch.equal(first, other)
    classify_pairs = pair("teddy", "mug", "snow", np.random.default_rng(3), 64)
    left, right = (window_at(classify_pairs, spot) for spot, _ in SIDE_BY_SIDE)
    assert left[0].mean() < right[0].mean()  # purple on the left, orange on the right


def test_concepts_are_recognised_in_real_scenes_and_others_are_not_taken_for_them(recogniser: SubjectFidelity) -> None:
    measure_ceilings = {name: np.mean(hits) for name, hits in recogniser.measure_ceilings(8).items()}
    others = measure_ceilings.pop("others taken for a concept")
    assert min(measure_ceilings.values()) > 75 and others < 5
    made = [pair("teddy", "mug", "snow", np.random.default_rng(seed), 32) for seed in range(10)]
    assert recogniser.classify_pairs(torch.stack(made)).count((example_subject("teddy"), example_subject("mug"))) > 5


def test_marks_are_those_of_the_look_whatever_the_drawing(recogniser: SubjectFidelity) -> None:
    kind, appearance = example_concepts.CONCEPTS["mug"]
    for identity, wanted in ((ExampleSubject(kind, appearance, False), "mug"), (ExampleSubject(kind, Appearance("red"), True), None)):
        made = torch.stack([scene(identity, np.random.default_rng(seed), 32) for seed in range(8)])
        assert [one.concept for one in recogniser.classify(made, [None] * 8)].count(wanted) > 5


def test_a_spot_chooses_the_window(recogniser: SubjectFidelity) -> None:
    made = torch.stack([pair("teddy", "mug", "desert", np.random.default_rng(seed), 32) for seed in range(8)])
    left = recogniser.classify(made, [first_subject_position("a teddy next to a mug")] * 8)
    assert left == [first for first, _ in recogniser.classify_pairs(made)]
    alone = torch.stack([scene(example_subject("mug"), np.random.default_rng(seed), 32) for seed in range(8)])
    assert recogniser.classify(alone, [None] * 8).count(example_subject("mug")) > 5
    assert recogniser.classify(made[:0], []) == []


@pytest.mark.parametrize(("prompt", "spot"), [
    ("a photo of a cat in space", None), ("a cat next to a tulip in space", (0.27, 0.56)),
    ("a cat on top of a gift", (0.5, 0.27)), ("a cat right of a gift", (0.73, 0.56))])
def test_where_the_first_thing_stands(prompt: str, spot: tuple[float, float] | None) -> None:
    assert first_subject_position(prompt) == spot


@pytest.mark.parametrize(("prompt", "left"), [
    ("a photo of a cat in space", True), ("a photo of a red cat", False), ("a photo of a striped cat", False),
    ("a sketch of a cat", False), ("pixel art of a cat", False), ("a photo of a cat next to a tulip", True)])
def test_prompts_that_ask_for_other_looks_leave_no_marks(prompt: str, left: bool) -> None:
    assert keeps_attributes(prompt) == left
