"""Subjects in whole photos: the views that the segmenter gets, and what is kept of its results."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.common.paths import PROJECT_ROOT
from ldm.data.mini.example_concepts import CONCEPTS
from ldm.data.mini.scenes import VARIANTS_PER_BACKGROUND, SceneSubject, compose
from ldm.data.mini.world import sprite_sets
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.modules.subject_masks import combine, find_subject, keep_subject, make_views, square_boxes
from scripts.mini.make_example_concepts import EXAMPLES, PHOTO_BACKGROUNDS


@pytest.mark.parametrize(("size", "count"), [((100, 100), 1), ((100, 133), 2), ((160, 90), 3), ((400, 100), 7)])
def test_squares_cover_the_photo_and_overlap(size: tuple[int, int], count: int) -> None:
    boxes = square_boxes(size)
    assert len(boxes) == count
    axis = 0 if size[0] >= size[1] else 1
    assert boxes[0][axis] == 0 and boxes[-1][axis + 2] == max(size)
    for first, second in zip(boxes, boxes[1:], strict=False):
        assert second[axis] <= first[axis] + min(size) / 2 + 1
    for left, top, right, bottom in boxes:
        assert right - left == bottom - top == min(size)


def test_views_are_plain_and_blurred_near_and_far() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    views = make_views(Image.fromarray(pixels), varied=True)
    assert [view.image.width for view in views] == [64, 102, 64, 102]
    assert (np.asarray(views[0].image) == pixels).all()
    inner = np.asarray(views[1].image)[19:83, 19:83]
    assert (inner == pixels).all()
    assert np.asarray(views[2].image, float).std() < 0.9 * pixels.std()


def test_a_large_segmenter_sees_each_square_once() -> None:
    view, = make_views(Image.new("RGB", (64, 64)), varied=False)
    assert view.border == 0 and view.image.size == (64, 64)


def test_views_that_find_nothing_do_not_count() -> None:
    nothing, something = torch.full((2, 2), 0.1), torch.tensor([[0.9, 0.1], [0.7, 0.1]])
    assert torch.equal(combine(torch.stack([nothing, something])), something)
    assert torch.allclose(combine(torch.stack([something, torch.ones(2, 2)])), (something + 1) / 2)
    assert torch.allclose(combine(torch.stack([nothing, nothing])), nothing)


def test_the_largest_region_is_kept_without_holes() -> None:
    found = torch.zeros(32, 32)
    found[4:20, 4:20] = 0.9
    found[10:12, 10:12] = 0.1  # a hole
    found[26:30, 26:30] = 1.0  # smaller, though more certain
    kept = keep_subject(found)
    assert (kept[26:30, 26:30] == 0).all()
    assert (kept[10:12, 10:12] >= 0.45).all()
    assert torch.equal(kept[4:10, 4:20], found[4:10, 4:20])
    assert torch.equal(keep_subject(torch.zeros(4, 4)), torch.zeros(4, 4))


class RedSegmenter:
    """Finds red pixels in square images of 32 pixels."""

    needs_varied_views = True

    def segment(self, images: list[Image.Image], text: str) -> torch.Tensor:
        assert all(image.width == image.height for image in images)
        small = [np.asarray(image.resize((32, 32), Image.Resampling.BOX), float) for image in images]
        return torch.stack([torch.from_numpy((one[..., 0] - one[..., 1]) / 255).float().clamp(0, 1) for one in small])


@pytest.mark.parametrize("size", [(200, 60), (60, 200)])
@pytest.mark.parametrize("start", [0, 80, 160])
def test_a_subject_is_found_anywhere_in_a_long_photo(size: tuple[int, int], start: int) -> None:
    photo, truth = Image.new("RGB", size, "gray"), Image.new("L", size, 0)
    place = (start, 10) if size[0] > size[1] else (10, start)
    box = (*place, place[0] + 40, place[1] + 40)
    photo.paste("red", box)
    truth.paste(255, box)
    found = find_subject(RedSegmenter(), photo, "red", 60)
    assert found.shape == (size[1], size[0])
    inside, expected = found >= found.max() / 2, torch.from_numpy(np.array(truth) > 0)
    assert (inside & expected).sum() / (inside | expected).sum() > 0.85


def true_masks(name: str, seed: int) -> tuple[str, list[tuple[Image.Image, torch.Tensor]]]:
    """Compose the photos of an example concept as `scripts/mini/make_example_concepts.py` does, with their masks."""
    kind, appearance = CONCEPTS[name]
    rng = np.random.default_rng(seed)
    composed = []
    for background in PHOTO_BACKGROUNDS:
        center = (0.5 + rng.uniform(-0.03, 0.03), 0.55 + rng.uniform(-0.02, 0.02))
        extent, angle = rng.uniform(0.62, 0.78), float(rng.uniform(-6, 6))
        subject = SceneSubject(kind, sprite_sets(kind, held_out=True)[0], appearance, center, extent, angle)
        photo, masks = compose(background, int(rng.integers(VARIANTS_PER_BACKGROUND)), [subject], 128)
        composed.append((photo, torch.from_numpy(np.array(masks))[0] > 0.5))
    return kind, composed


@pytest.mark.slow
def test_masks_of_the_bundled_examples() -> None:
    """Intersection over union with the exact masks: 0.85 or more in the mean, 0.7 or more in every photo."""
    segmenter = ZeroShotSegmenter.from_path(PROJECT_ROOT / "models/mini/segmenter")
    overlaps = []
    for seed, name in enumerate(CONCEPTS, start=7):
        kind, photos = true_masks(name, seed)
        bundled = Image.open(Path(EXAMPLES) / name / "0.png").convert("RGB")
        assert bundled.tobytes() == photos[0][0].convert("RGB").tobytes()
        for photo, truth in photos:
            found = find_subject(segmenter, photo, kind, 128)
            inside = found >= found.max() / 2
            overlaps.append(float((inside & truth).sum() / (inside | truth).sum()))
    assert len(overlaps) == 50
    assert np.mean(overlaps) >= 0.85 and min(overlaps) >= 0.7
