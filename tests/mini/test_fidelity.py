"""Subject fidelity: classification against a closed form, composed scenes, and what prompts leave to be recognized."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.mini import fidelity
from evaluation.mini.fidelity import (
    ExampleSubject,
    Prototypes,
    SubjectFidelity,
    candidate_subjects,
    color_histogram,
    compose_alone,
    compose_pair,
    compose_window,
    example_subject,
    first_subject_position,
    keeps_attributes,
)
from evaluation.mini.world_prompts import window_at
from ldm.data.mini import example_concepts
from ldm.data.mini.scenes import SIDE_BY_SIDE, Appearance
from ldm.data.mini.world import HELD_OUT

FEW = ("teddy", "mug")


class PixelEmbedder:
    """Embeds images as coarse pixels."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(F.interpolate(images, (6, 6), mode="area").flatten(1), dim=1)


@pytest.fixture(scope="module")
def recognizer() -> Iterator[SubjectFidelity]:
    few = {name: example_concepts.CONCEPTS[name] for name in FEW}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "CONCEPTS", few)
        patch.setattr(fidelity, "UNSEEN_BACKGROUNDS", ("snow", "desert"))
        yield SubjectFidelity(PixelEmbedder(), size=32, scenes=8)


def test_the_nearest_class_is_that_of_fishers_discriminant() -> None:
    rng = np.random.default_rng(0)
    means, shape = rng.normal(size=(5, 6)), rng.normal(size=(6, 6))
    known = means[:, None] + rng.normal(size=(5, 40, 6)) @ shape
    queries = rng.normal(size=(30, 6))
    centers = known.mean(1)
    within = (known - centers[:, None]).reshape(-1, 6)
    covariance = within.T @ within / len(within)
    inverse = np.linalg.inv(covariance + fidelity.RIDGE * np.trace(covariance) / 6 * np.eye(6))
    difference = queries[:, None] - centers
    expected = np.einsum("nci,ij,ncj->nc", difference, inverse, difference).argmin(1)
    classes = Prototypes(torch.from_numpy(known).float()).classify(torch.from_numpy(queries).float())
    assert classes.tolist() == expected.tolist()


def test_candidates_are_kinds_in_appearances_with_known_and_held_out_sprites() -> None:
    subjects = candidate_subjects()
    assert len({subject.label for subject in subjects}) == len(subjects) == 10 * (1 + 8 + 10) * 2
    for subject in subjects:
        assert {(subject.kind, emoji_set) in HELD_OUT for emoji_set in subject.emoji_sets} == {subject.held_out}
    matching = [subject for subject in subjects if subject.concept]
    assert sorted(subject.concept for subject in matching) == sorted([*example_concepts.CONCEPTS] * 2)
    for subject in matching:
        assert example_concepts.CONCEPTS[subject.concept] == (subject.kind, subject.appearance)
    assert ExampleSubject("cat", Appearance(), False).label == "cat, plain"
    assert example_subject("cat").label == "cat, blue striped orange, held out"
    assert example_subject("cat").concept == "cat"


def test_a_color_histogram_holds_shares_of_levels() -> None:
    images = torch.full((2, 3, 64, 64), -1.0)
    images[1, :, :, 32:] = 1.0
    images[1, 1, :, 32:] = -1.0  # the right half is magenta
    black, halves = color_histogram(images).view(2, 4, 4, 4) ** 2
    assert torch.allclose(color_histogram(images).norm(dim=1), torch.ones(2))
    assert black[0, 0, 0] == black.max() > 0.6
    assert torch.allclose(halves, (black + black.flip(0, 2)) / 2)


def test_a_color_histogram_ignores_the_border() -> None:
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    other = F.pad(image[..., 8:-8, 8:-8], (8, 8, 8, 8), value=1.0)
    assert torch.equal(color_histogram(image), color_histogram(other))


def test_scenes_are_reproducible_and_pairs_have_their_order() -> None:
    subject = ExampleSubject("mug", Appearance("purple"), held_out=False)
    for compose in (compose_alone, compose_window):
        first, again, other = (compose(subject, np.random.default_rng(seed), 32) for seed in (1, 1, 2))
        assert first.shape == (3, 32, 32) and torch.equal(first, again) and not torch.equal(first, other)
    pair = compose_pair("teddy", "mug", "snow", np.random.default_rng(3), 64)
    left, right = (window_at(pair, position) for position, _ in SIDE_BY_SIDE)
    assert left[0].mean() < right[0].mean()  # purple on the left, orange on the right


@pytest.mark.slow
def test_concepts_are_recognized_in_scenes_and_others_are_not_mistaken_for_them(recognizer: SubjectFidelity) -> None:
    ceilings = {name: np.mean(hits) for name, hits in recognizer.measure_ceilings(8).items()}
    others = ceilings.pop("others classified as a concept")
    assert min(ceilings.values()) > 75 and others < 5
    images = [compose_pair("teddy", "mug", "snow", np.random.default_rng(seed), 32) for seed in range(10)]
    pairs = recognizer.classify_pairs(torch.stack(images))
    assert pairs.count((example_subject("teddy"), example_subject("mug"))) > 5


def test_attributes_match_with_any_sprite_in_the_appearance(recognizer: SubjectFidelity) -> None:
    kind, appearance = example_concepts.CONCEPTS["mug"]
    for subject, expected in ((ExampleSubject(kind, appearance, False), "mug"),
                              (ExampleSubject(kind, Appearance("red"), True), None)):
        images = torch.stack([compose_alone(subject, np.random.default_rng(seed), 32) for seed in range(8)])
        assert [found.concept for found in recognizer.classify(images, [None] * 8)].count(expected) > 5


def test_a_position_selects_the_window(recognizer: SubjectFidelity) -> None:
    images = torch.stack([compose_pair("teddy", "mug", "desert", np.random.default_rng(seed), 32)
                          for seed in range(8)])
    left = recognizer.classify(images, [first_subject_position("a teddy next to a mug")] * 8)
    assert left == [first for first, _ in recognizer.classify_pairs(images)]
    mug = example_subject("mug")
    alone = torch.stack([compose_alone(mug, np.random.default_rng(seed), 32) for seed in range(8)])
    assert recognizer.classify(alone, [None] * 8).count(mug) > 5
    assert recognizer.classify(images[:0], []) == []


@pytest.mark.parametrize(("prompt", "position"), [
    ("a photo of a cat in space", None), ("a cat next to a tulip in space", (0.27, 0.56)),
    ("a cat on top of a gift", (0.5, 0.27)), ("a cat right of a gift", (0.73, 0.56))])
def test_position_of_the_first_subject(prompt: str, position: tuple[float, float] | None) -> None:
    assert first_subject_position(prompt) == position


@pytest.mark.parametrize(("prompt", "keeps"), [
    ("a photo of a cat in space", True), ("a photo of a red cat", False), ("a photo of a striped cat", False),
    ("a sketch of a cat", False), ("pixel art of a cat", False), ("a photo of a cat next to a tulip", True)])
def test_prompts_with_colors_patterns_or_styles_do_not_keep_the_attributes(prompt: str, keeps: bool) -> None:
    assert keeps_attributes(prompt) == keeps
