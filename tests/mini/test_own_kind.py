"""Whether concepts beside another subject are recognized as their own kind, on real scenes."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.mini.fidelity import ExampleSubject, compose_two, example_subject
from evaluation.mini.own_kind import OwnKindRecognizer
from ldm.data.mini.example_concepts import CONCEPTS
from ldm.data.mini.scenes import SIDE_BY_SIDE, Appearance
from ldm.models.clip_encoder import ClipEncoder

pytestmark = pytest.mark.slow
LEFT = SIDE_BY_SIDE[0][0]
KINDS = ("teddy bear", "mug", "robot", "teapot", "penguin", "candle", "chair", "boat")


@pytest.fixture(scope="module")
def recognizer() -> OwnKindRecognizer:
    return OwnKindRecognizer(ClipEncoder.from_path("models/mini/evaluation_clip"), kinds=KINDS)


def scenes(subject: ExampleSubject, count: int = 6) -> torch.Tensor:
    """Compose scenes of a subject on the left of a mug in its own colors."""
    rng = np.random.default_rng(5)
    mug = ExampleSubject("mug", Appearance(), False)
    return torch.stack([compose_two((subject, mug), rng, 64) for _ in range(count)])


def test_the_concept_and_trained_sprites_in_its_look_are_of_its_kind(recognizer: OwnKindRecognizer) -> None:
    for held_out in (True, False):
        subject = ExampleSubject(*CONCEPTS["teddy"], held_out)
        assert sum(recognizer.is_own_kind("teddy", scenes(subject), [LEFT] * 6)) >= 5


def test_other_kinds_in_its_look_are_not(recognizer: OwnKindRecognizer) -> None:
    _, look = CONCEPTS["teddy"]
    for kind in ("robot", "candle"):
        assert sum(recognizer.is_own_kind("teddy", scenes(ExampleSubject(kind, look, False)), [LEFT] * 6)) <= 1


def test_an_image_without_the_concept_at_the_position_is_not(recognizer: OwnKindRecognizer) -> None:
    right = SIDE_BY_SIDE[1][0]
    assert not any(recognizer.is_own_kind("teddy", scenes(example_subject("teddy")), [right] * 6))


def test_ceiling_is_high(recognizer: OwnKindRecognizer) -> None:
    hits = recognizer.measure_ceiling("teddy")
    assert len(hits) == 8 and np.mean(hits) >= 85


def test_no_images_have_no_answers(recognizer: OwnKindRecognizer) -> None:
    assert recognizer.is_own_kind("teddy", torch.zeros(0, 3, 64, 64), []) == []
