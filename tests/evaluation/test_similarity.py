"""Scores against cosines of `transformers`, and on images whose colors are their embeddings."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_clips import SIDE, write_clip
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from evaluation.metrics import registry, scoring
from evaluation.metrics.registry import METRICS, Metric
from evaluation.metrics.scoring import ConceptScorer, estimate_means
from evaluation.metrics.similarity import ImageBatch, cut_out_objects
from ldm.data.images import to_tensor
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.clip_images import normalize_for_clip

COLORS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}
LEFT_HALF = torch.arange(8).expand(1, 8, 8) < 4


class ColorClip:
    """The embedding of an image is its mean color, with gray as zero; that of a text is the color of this name."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean((2, 3)), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([COLORS[text] for text in texts]), dim=1)


class LeftSegmenter:
    """Finds an object in the left half of every image that is not dark.

    Attributes:
        texts: all texts that it was asked for.
    """

    def __init__(self, probability: float = 0.8) -> None:
        self.probability, self.texts = probability, set()

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> Tensor:
        self.texts.add(text)
        is_bright = torch.tensor([float(to_tensor(image).amax() > -0.5) for image in images])
        is_left = torch.arange(size[1]).expand(*size) < size[1] // 2
        return self.probability * is_bright[:, None, None] * is_left + 0.001


def two_colors(left: str, right: str) -> Tensor:
    """Return (1, 3, 8, 8) with one color in each half."""
    halves = (torch.tensor(COLORS[name])[:, None, None].expand(3, 8, 8) for name in (left, right))
    return torch.where(LEFT_HALF, *halves)[None]


def test_cosines_agree_with_transformers(tmp_path: Path) -> None:
    clip = ClipEncoder.from_path(write_clip(tmp_path))
    noise = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    photos, images, texts = noise[:3], noise[3:], ["a cat", "a dog in the snow"]
    with torch.no_grad():
        tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
        outputs = clip.model(**tokens, pixel_values=normalize_for_clip(noise))
    image_embeds, text_embeds = F.normalize(outputs.image_embeds, dim=1), F.normalize(outputs.text_embeds, dim=1)
    for index, scores in enumerate(ConceptScorer(clip, photos, "cat")(images, texts)):
        assert scores["text"] == pytest.approx(100 * float(image_embeds[3 + index] @ text_embeds[index]), abs=1e-3)
        expected = sum(float(image_embeds[3 + index] @ image_embeds[photo]) for photo in range(3)) / 3
        assert scores["image"] == pytest.approx(100 * expected, abs=1e-3) and scores["object"] is None


def test_object_similarity_ignores_the_background() -> None:
    segmenter = LeftSegmenter()
    scorer = ConceptScorer(ColorClip(), two_colors("red", "green"), "toy", segmenter)
    same, other = scorer(torch.cat([two_colors("red", "blue"), two_colors("green", "red")]), ["red", "green"])
    assert (same["object"], other["object"]) == (pytest.approx(100, abs=1e-3), pytest.approx(0, abs=1e-3))
    assert same["image"] == pytest.approx(50, abs=1e-3) and other["image"] == pytest.approx(100, abs=1e-3)
    assert same["text"] == other["text"] == pytest.approx(100 / 2 ** 0.5, abs=1e-3)
    assert segmenter.texts == {"toy"}


def test_given_masks_replace_the_segmenter_on_photos() -> None:
    right = (~LEFT_HALF).float()[None]
    scorer = ConceptScorer(ColorClip(), two_colors("red", "green"), "toy", LeftSegmenter(), masks=right)
    assert scorer(two_colors("green", "blue"), ["red"])[0]["object"] == pytest.approx(100, abs=1e-3)


def test_images_without_an_object_have_no_object_similarity() -> None:
    dark = torch.full((1, 3, 8, 8), -1.0)
    scorer = ConceptScorer(ColorClip(), torch.cat([two_colors("red", "green"), dark]), "toy", LeftSegmenter())
    assert len(scorer.references.object_embeddings) == 1
    scores = scorer(torch.cat([dark, two_colors("red", "blue")]), ["red", "red"])
    assert scores[0]["object"] is None and scores[1]["object"] == pytest.approx(100, abs=1e-3)
    blind = ConceptScorer(ColorClip(), two_colors("red", "green"), "toy", LeftSegmenter(probability=0.01))
    assert blind.references.object_embeddings is None
    assert blind(two_colors("red", "red"), ["red"])[0]["object"] is None


def test_photos_are_compared_with_each_other_but_not_with_themselves() -> None:
    photos = torch.cat([two_colors("red", "red"), two_colors("green", "green"), two_colors("yellow", "yellow")])
    scores = ConceptScorer(ColorClip(), photos, "toy", LeftSegmenter()).score_photos()
    expected = 100 * 2 / 3 / 2 ** 0.5
    assert scores["image"] == pytest.approx(scores["object"], abs=1e-3) == pytest.approx(expected, abs=1e-3)
    single = ConceptScorer(ColorClip(), photos[:1], "toy").score_photos()
    assert (single["text"], single["image"], single["object"]) == (None, None, None)


def test_scores_do_not_depend_on_the_number_of_images() -> None:
    scorer = ConceptScorer(ColorClip(), two_colors("red", "green"), "toy", LeftSegmenter())
    images = torch.cat([two_colors("red", "blue"), two_colors("green", "yellow")] * 20)
    texts = ["red", "yellow"] * 20
    assert scorer(images, texts)[38:] == scorer(images[:2], texts[:2])
    assert scorer(images[:0], []) == []
    with pytest.raises(ValueError, match="1 texts for 40 images"):
        scorer(images, ["red"])


@given(peak=st.floats(0.06, 1), share=st.floats(0.01, 0.99))
def test_an_object_is_where_the_probability_is_half_of_its_maximum(peak: float, share: float) -> None:
    probabilities = torch.zeros(1, 1, 2, 2)
    probabilities[0, 0, 0] = torch.tensor([peak, peak * share])
    objects, found = cut_out_objects(torch.full((1, 3, 2, 2), 0.5), probabilities)
    is_object = [True, bool(torch.tensor(peak * share) >= torch.tensor(peak) / 2), False, False]
    assert found.all() and objects[0, 0].flatten().tolist() == [0.5 * one for one in is_object]


def test_a_new_metric_needs_one_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(batch: ImageBatch) -> list[float]:
        return batch.images.mean((1, 2, 3)).tolist()

    metrics = (*METRICS, Metric("bright", "mean brightness", brightness, unit="levels"))
    for module in (registry, scoring):
        monkeypatch.setattr(module, "METRICS", metrics)
    scorer = ConceptScorer(ColorClip(), two_colors("red", "green"), "toy")
    scores = scorer(two_colors("red", "blue"), ["red"])
    assert scores[0]["bright"] == pytest.approx(1 / 3) and scorer.score_photos()["bright"] is None
    estimates = estimate_means(scores, ["red"])
    assert metrics[-1].cell(estimates) == "0.3 levels" and metrics[-1].column == "mean_brightness"
    assert METRICS[2].cell(estimates) == "-"
