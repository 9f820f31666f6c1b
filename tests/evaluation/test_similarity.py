"""Similarities against `transformers`' own cosines, and on pictures whose colours are their embeddings."""
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

from evaluation.metrics.similarity import SimilarityMeter, cut_out
from ldm.data.images import to_tensor
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.clip_images import normalize_for_clip

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "both": (1.0, 1.0, 0.0)}
HALF = torch.arange(8).expand(1, 8, 8) < 4  # the left one


class ColourRecogniser:
    """A picture's embedding is its mean colour, where grey counts as none; a text's is the colour of that name."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean((2, 3)), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.tensor([COLOURS[text] for text in texts]), dim=1)


class LeftSegmenter:
    """Finds the thing in the left half of every picture that is not dark; asked for anything else it finds nothing."""

    def __init__(self, sure: float = 0.8) -> None:
        self.sure, self.asked = sure, set()

    def segment(self, images: Sequence[Image.Image], text: str, size: tuple[int, int]) -> Tensor:
        self.asked.add(text)
        bright = torch.tensor([float(to_tensor(image).amax() > -0.5) for image in images])
        left = torch.arange(size[1]).expand(*size) < size[1] // 2
        return self.sure * bright[:, None, None] * left + 0.001


def painted(left: str, right: str) -> Tensor:
    """(1, 3, 8, 8), one colour in each half."""
    halves = (torch.tensor(COLOURS[name])[:, None, None].expand(3, 8, 8) for name in (left, right))
    return torch.where(HALF, *halves)[None]


def test_cosines_are_those_of_transformers(tmp_path: Path) -> None:
    recogniser = ClipEncoder.from_path(write_clip(tmp_path))
    noise = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    photos, pictures, texts = noise[:3], noise[3:], ["a cat", "a dog in the snow"]
    with torch.no_grad():
        tokens = recogniser.tokenizer(texts, padding=True, return_tensors="pt")
        outputs = recogniser.model(**tokens, pixel_values=normalize_for_clip(noise))
    seen, said = F.normalize(outputs.image_embeds, dim=1), F.normalize(outputs.text_embeds, dim=1)
    found = SimilarityMeter(recogniser, photos, "cat")(pictures, texts)
    for place, one in enumerate(found):
        assert one.text == pytest.approx(100 * float(seen[3 + place] @ said[place]), abs=1e-3)
        expected = sum(float(seen[3 + place] @ seen[photo]) for photo in range(3)) / 3
        assert one.image == pytest.approx(100 * expected, abs=1e-3) and one.object is None


def test_of_objects_the_background_does_not_count() -> None:
    segmenter = LeftSegmenter()
    meter = SimilarityMeter(ColourRecogniser(), painted("red", "green"), "toy", segmenter)
    same, other = meter(torch.cat([painted("red", "blue"), painted("green", "red")]), ["red", "green"])
    assert (same.object, other.object) == (pytest.approx(100, abs=1e-3), pytest.approx(0, abs=1e-3))
    assert same.image == pytest.approx(50, abs=1e-3) and other.image == pytest.approx(100, abs=1e-3)
    assert same.text == other.text == pytest.approx(100 / 2 ** 0.5, abs=1e-3)
    assert segmenter.asked == {"toy"}


def test_given_masks_go_before_the_segmenter() -> None:
    right = (~HALF).float()[None]
    meter = SimilarityMeter(ColourRecogniser(), painted("red", "green"), "toy", LeftSegmenter(), masks=right)
    assert meter(painted("green", "blue"), ["red"])[0].object == pytest.approx(100, abs=1e-3)


def test_where_nothing_is_segmented_there_is_no_figure() -> None:
    dark = torch.full((1, 3, 8, 8), -1.0)
    meter = SimilarityMeter(ColourRecogniser(), torch.cat([painted("red", "green"), dark]), "toy", LeftSegmenter())
    assert len(meter.objects) == 1
    found = meter(torch.cat([dark, painted("red", "blue")]), ["red", "red"])
    assert found[0].object is None and found[1].object == pytest.approx(100, abs=1e-3)
    blind = SimilarityMeter(ColourRecogniser(), painted("red", "green"), "toy", LeftSegmenter(sure=0.01))
    assert blind.objects is None and blind(painted("red", "red"), ["red"])[0].object is None


def test_photos_among_themselves_leave_out_each_with_itself() -> None:
    photos = torch.cat([painted("red", "red"), painted("green", "green"), painted("both", "both")])
    whole, objects = SimilarityMeter(ColourRecogniser(), photos, "toy", LeftSegmenter()).among_photos()
    assert whole == pytest.approx(objects, abs=1e-3) == pytest.approx(100 * 2 / 3 / 2 ** 0.5, abs=1e-3)
    assert SimilarityMeter(ColourRecogniser(), photos[:1], "toy").among_photos() == (None, None)


def test_many_pictures_are_measured_as_few_are() -> None:
    meter = SimilarityMeter(ColourRecogniser(), painted("red", "green"), "toy", LeftSegmenter())
    pictures, texts = torch.cat([painted("red", "blue"), painted("green", "both")] * 20), ["red", "both"] * 20
    assert meter(pictures, texts)[38:] == meter(pictures[:2], texts[:2])
    assert meter(pictures[:0], []) == []
    with pytest.raises(ValueError, match="1 texts for 40 pictures"):
        meter(pictures, ["red"])


@given(peak=st.floats(0.06, 1), share=st.floats(0.01, 0.99))
def test_an_object_is_cut_out_where_it_is_half_as_likely_as_at_best(peak: float, share: float) -> None:
    likely = torch.zeros(1, 1, 2, 2)
    likely[0, 0, 0] = torch.tensor([peak, peak * share])
    shown, found = cut_out(torch.full((1, 3, 2, 2), 0.5), likely)
    kept = [True, bool(torch.tensor(peak * share) >= torch.tensor(peak) / 2), False, False]
    assert found.all() and shown[0, 0].flatten().tolist() == [0.5 * one for one in kept]
