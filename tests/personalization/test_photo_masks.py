"""Photos as people have them become crops, masks and one honest line."""
from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.known_photos import make_known_phone_folder, photo_of
from PIL import Image

from ldm.common.paths import PROJECT_ROOT
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.mini.scenes import background_variants
from ldm.personalization.photo_masks import log_summary, make_missing_masks

SEGMENTER = str(PROJECT_ROOT / "models/mini/segmenter")
SIZE = 64


def overlap(found: torch.Tensor, truth: np.ndarray) -> float:
    inside, expected = found[0] >= 0.5, torch.from_numpy(truth)
    return float((inside & expected).sum() / (inside | expected).sum())


def cropped_truth(data: ConceptPhotos, index: int, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the true mask in the crop of a photo, and the share of the subject that the crop shows."""
    photo = data.photos[index]
    square = photo.square(data.crop == "subject", data.size)
    whole = Image.fromarray(truth).convert("L").resize(photo.image.size)
    inside = np.asarray(square.crop(whole, data.size)) > 127
    shown = np.asarray(whole.crop((square.left, square.top, square.left + square.side, square.top + square.side))) > 127
    return inside, shown.sum() / (np.asarray(whole) > 127).sum()


@pytest.mark.slow
def test_a_phones_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truths = make_known_phone_folder(tmp_path / "photos", "teapot")
    data = ConceptPhotos(tmp_path / "photos", size=SIZE, placeholder_token="<pot>")
    make_missing_masks([data], ["teapot"], SEGMENTER, tmp_path / "masks", torch.device("cpu"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_summary(data)
    summary, *others = caplog.messages
    assert "6 photos used of 11 files" in summary and "6 cropped around the subject" in summary
    for name in ("IMG_0001.MOV", "IMG_0001.AAE", "notes.txt", "Thumbs.db", "originals"):
        assert name in summary
    assert "PANO.jpeg (19 % of it)" in summary
    assert len(others) == 1 and "IMG_0003 copy.jfif" in others[0] and "IMG_0003.jpg" in others[0]
    assert data.photos[0].note == "on a table"
    assert {path.name for path in data.paths} == set(truths)
    for index, path in enumerate(data.paths):
        truth, share = cropped_truth(data, index, truths[path.name])
        assert share > 0.95, path.name
        assert overlap(data.mask(index), truth) > 0.6, path.name


def test_photos_without_the_subject_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    for background in ("table", "meadow"):
        photo_of("mug", background)[0].save(tmp_path / "photos" / f"{background}.png")
    background_variants("forest", 128)[0].save(tmp_path / "photos/empty.png")
    data = ConceptPhotos(tmp_path / "photos", size=SIZE, placeholder_token="<mug>")
    make_missing_masks([data], ["mug"], SEGMENTER, tmp_path / "masks", torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        log_summary(data)
    assert "2 photos used of 3 files" in caplog.text and "empty.png (the subject is not found in it)" in caplog.text


def test_without_the_subject_in_any_photo_all_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    background_variants("forest", 128)[0].save(tmp_path / "photos/empty.png")
    data = ConceptPhotos(tmp_path / "photos", size=SIZE)
    make_missing_masks([data], ["mug"], SEGMENTER, tmp_path / "masks", torch.device("cpu"))
    log_summary(data)
    assert len(data.photos) == 1 and not data.has_masks
    assert "finds no mug in any photo" in caplog.text


@pytest.mark.slow
def test_a_run_on_a_phones_folder(tmp_path: Path) -> None:
    make_known_phone_folder(tmp_path / "photos", "teapot")
    run = subprocess.run(
        [sys.executable, "main.py", "--base", "configs/perfusion.yaml", "--data_root", str(tmp_path / "photos"),
         "--init_word", "teapot", "--placeholder", "<pot>", "--max_steps", "1", "--logdir", str(tmp_path / "logs"),
         "--crop", "center", "data.params.train.params.size=64"],
        cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stderr.splitlines() if line.startswith("<pot>:"))
    assert "5 photos used of 11 files" in line and "5 cropped to the square in the center" in line
    assert "PANO.jpeg (the subject is not in its center square)" in line
    assert next((tmp_path / "logs").glob("*/images/masks.png")).is_file()
