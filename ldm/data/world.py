"""What there is in the mini world: kinds of things, their drawings, colours and patterns.

The drawings are cut from three picture sets by `scripts/fetch_drawings.py` and lie in `models/mini/world/drawings/`
as `<kind>/<set>.webp`; sources and licences stand in `models/mini/world/README.md`. One set's drawing of some kinds is
held out: no model of the mini world is ever shown it. Those are the concepts to learn, and the test set.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

WORLD = Path(__file__).resolve().parents[2] / "models" / "mini" / "world"
SETS = ("fluent", "noto", "twemoji")


@dataclass(frozen=True)
class Kind:
    """A kind of thing: its code point in the picture sets, and the words that captions use, the usual one first."""

    codepoint: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[0]


KINDS = tuple(Kind(codepoint, words) for codepoint, *words in (
    ("1f9f8", "teddy bear", "teddy"), ("1fad6", "teapot"), ("1f408", "cat"), ("1f415", "dog"),
    ("1f407", "rabbit", "bunny"), ("1f989", "owl"), ("1f427", "penguin"), ("1f986", "duck"),
    ("1f422", "turtle"), ("1f418", "elephant"), ("1f41f", "fish"), ("1f98b", "butterfly"),
    ("1f697", "car"), ("1f680", "rocket"), ("26f5", "sailboat", "boat"), ("1f34e", "apple"),
    ("1f382", "cake"), ("1f344", "mushroom"), ("1f335", "cactus"), ("1f3b8", "guitar"),
    ("2602-fe0f", "umbrella"), ("1f392", "backpack"), ("1f916", "robot"), ("1f3e0", "house"),
))
KIND_NAMES = tuple(kind.name for kind in KINDS)

HELD_OUT = {(name, "twemoji") for name in (
    "teddy bear", "teapot", "cat", "robot", "backpack", "car", "mushroom", "owl")}

COLOURS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (247, 208, 60), "green": (60, 165, 75),
    "blue": (52, 110, 220), "purple": (140, 75, 190), "pink": (245, 130, 175), "grey": (140, 145, 150),
}
PATTERNS = ("striped", "spotted")
CYCLES = 2.2  # of a pattern over a drawing: wide enough for latents that are eight pixels apart


@cache
def drawing(kind: str, source: str) -> Image.Image:
    """The RGBA drawing of `kind` in picture set `source`, trimmed to what is opaque."""
    return Image.open(WORLD / "drawings" / kind.replace(" ", "_") / f"{source}.webp").convert("RGBA")


def drawings_of(kind: str, held_out: bool = False) -> list[str]:
    """The picture sets whose drawing of `kind` models are trained on, or those that are held out."""
    return [source for source in SETS if ((kind, source) in HELD_OUT) == held_out]


def recolour(rgb: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(H, W, 3) float in [0, 255]: the drawing's lights and shades, from dark to pale, in one colour."""
    light = rgb @ np.array([0.3, 0.59, 0.11], dtype=np.float32) / 255.0
    spread = np.clip((light - 0.5) * 1.3 + 0.55, 0.0, 1.0)[..., None]
    middle = np.asarray(colour, dtype=np.float32)
    dark, bright = middle * 0.15, middle * 0.35 + 255 * 0.65
    return np.where(spread < 0.6, dark + (middle - dark) * (spread / 0.6),
                    middle + (bright - middle) * ((spread - 0.6) / 0.4))


def pattern_mask(pattern: str, height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """(H, W) in [0, 1]: where a pattern paints its second colour; it scales with the drawing's size."""
    rows = (np.arange(height, dtype=np.float32)[:, None] / height + phase) * CYCLES
    columns = (np.arange(width, dtype=np.float32)[None] / width + phase) * CYCLES
    wave = {"striped": np.sin(2 * np.pi * rows) + 0.0 * columns,
            "spotted": np.cos(2 * np.pi * rows) + np.cos(2 * np.pi * columns) - 0.9}[pattern]
    return np.clip(wave * 2.5 + 0.5, 0.0, 1.0)
