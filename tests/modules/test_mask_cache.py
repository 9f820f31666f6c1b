"""Segmentations of photos are computed once and read again, whatever happens to the files in between."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.modules.mask_cache import cached_subjects

SIZE = 24


class BrightnessSegmenter:
    """Returns brightness as probabilities, and counts the calls."""

    needs_varied_views = False

    def __init__(self, fingerprint: str = "one") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def segment(self, images: list[Image.Image], text: str) -> torch.Tensor:
        self.calls += 1
        small = [image.convert("L").resize((32, 32), Image.Resampling.BOX) for image in images]
        return torch.stack([torch.from_numpy(np.array(image)) / 255 for image in small])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(found):
        blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 40)).save(path)
    return found


def subjects(paths: list[Path], segmenter: BrightnessSegmenter, text: str, folder: Path, size: int = SIZE
             ) -> list[torch.Tensor]:
    return cached_subjects(paths, [Image.open(path).convert("RGB") for path in paths], segmenter, text, folder, size)


@pytest.mark.parametrize("read_as", ["I;16", "I"])
def test_segmentations_are_computed_once(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         read_as: str) -> None:
    """Pillow reads PNG files of 16 bits as such, or, before 10.3, as integers of 32 bits."""
    segmenter, opened = BrightnessSegmenter(), Image.open
    first = subjects(paths, segmenter, "teddy", tmp_path / "cache")
    assert segmenter.calls == 3 and len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setattr(Image, "open", lambda path: opened(path).convert(read_as) if "cache" in str(path)
                        else opened(path))
    second = subjects(paths, segmenter, "teddy", tmp_path / "cache")
    assert segmenter.calls == 3
    for one, again in zip(first, second, strict=True):
        assert one.shape == (24, 24) and one.max() > 0.5 and torch.equal(one, again)


def test_the_key_covers_photo_text_segmenter_and_size(paths: list[Path], tmp_path: Path) -> None:
    cache, segmenter = tmp_path / "cache", BrightnessSegmenter()
    subjects(paths, segmenter, "teddy", cache)
    subjects(paths, segmenter, "clock", cache)
    subjects(paths, segmenter, "teddy", cache, 16)
    assert segmenter.calls == 9
    other = BrightnessSegmenter("two")
    subjects(paths, other, "teddy", cache)
    assert other.calls == 3
    Image.new("RGB", (40, 40), "white").save(paths[0])
    subjects(paths, segmenter, "teddy", cache)
    assert segmenter.calls == 10
    paths[1] = paths[1].rename(tmp_path / "renamed.png")
    subjects(paths, segmenter, "teddy", cache)
    assert segmenter.calls == 10


def test_broken_files_are_made_again(paths: list[Path], tmp_path: Path) -> None:
    cache, segmenter = tmp_path / "cache", BrightnessSegmenter()
    before = subjects(paths, segmenter, "teddy", cache)
    empty, cut, other = sorted(cache.iterdir())
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    Image.new("L", (24, 24), 255).save(other)
    after = subjects(paths, segmenter, "teddy", cache)
    assert segmenter.calls == 6
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    subjects(paths, segmenter, "teddy", cache)
    assert segmenter.calls == 6
