"""What the evaluation commands read, small and random: photos with masks, a CLIP, a segmenter and prompts."""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.tiny_clips import write_clip, write_segmenter


def write_evaluation_files(folder: Path, prompts: str, photo_count: int = 3) -> Path:
    """Write `photos`, `masks` (as noise, too), `clip`, `segmenter` and `prompts.txt` to a folder; return it."""
    generator = np.random.default_rng(0)
    for kind in ("photos", "masks"):
        (folder / kind).mkdir()
        for index in range(photo_count):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{index}.png")
    write_clip(folder / "clip")
    (folder / "segmenter").mkdir()
    write_segmenter(folder / "segmenter")
    (folder / "prompts.txt").write_text(prompts)
    return folder


def command_line(**flags: object) -> list[str]:
    """Return flags as a command line; None leaves one out."""
    return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))
