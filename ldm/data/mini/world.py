"""The parts of the mini world: kinds of subjects, their sprites, colors and patterns.

A sprite is the emoji image of a kind in one of six emoji sets. `scripts/mini/fetch_sprites.py` fetches them into
`models/mini/world/sprites/<kind>/<set>.webp`; `models/mini/world/README.md` lists sources and licenses. For half of the
kinds, the sprite of one set is held out: no model of the mini world sees it in training. These are the concepts to
learn, and the test set.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.common.paths import PROJECT_ROOT

WORLD = PROJECT_ROOT / "models" / "mini" / "world"
EMOJI_SETS = ("fluent", "noto", "twemoji", "flat", "noto_v1", "emojione")


@dataclass(frozen=True)
class Kind:
    """A kind of subject.

    Attributes:
        codepoint: its code point in the emoji sets.
        words: words that captions use for it, the usual one first.
    """

    codepoint: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.words[0]


KINDS = tuple(Kind(codepoint, words) for codepoint, *words in (
    # toys, tools and other artifacts
    ("1f9f8", "teddy bear", "teddy"), ("1fad6", "teapot"), ("1f392", "backpack"), ("1f916", "robot"),
    ("1f3b8", "guitar"), ("2602", "umbrella"), ("1f3e0", "house"), ("1f388", "balloon"), ("1f941", "drum"),
    ("1f3bb", "violin"), ("1f528", "hammer"), ("1f511", "key"), ("1f56f", "candle"), ("23f0", "clock"),
    ("1f4f7", "camera"), ("1f4d5", "book"), ("1fa91", "chair"), ("1f514", "bell"), ("1f451", "crown"),
    ("1f3a9", "hat"), ("1f45f", "shoe", "sneaker"), ("1f4fa", "television", "tv"), ("1f3c6", "trophy"),
    ("1f381", "gift", "present"), ("2615", "mug", "cup"), ("1f3fa", "vase"), ("1f3c0", "basketball"),
    ("1f45c", "handbag"), ("1f3f0", "castle"), ("26fa", "tent"), ("26c4", "snowman"),
    # animals
    ("1f408", "cat"), ("1f415", "dog"), ("1f407", "rabbit", "bunny"), ("1f989", "owl"), ("1f427", "penguin"),
    ("1f986", "duck"), ("1f422", "turtle"), ("1f418", "elephant"), ("1f41f", "fish"), ("1f98b", "butterfly"),
    ("1f40e", "horse"), ("1f404", "cow"), ("1f416", "pig"), ("1f411", "sheep"), ("1f413", "rooster"),
    ("1f438", "frog"), ("1f981", "lion"), ("1f405", "tiger"), ("1f412", "monkey"), ("1f992", "giraffe"),
    ("1f993", "zebra"), ("1f42a", "camel"), ("1f40c", "snail"), ("1f41d", "bee"), ("1f41e", "ladybug"),
    ("1f980", "crab"), ("1f419", "octopus"), ("1f42c", "dolphin"), ("1f433", "whale"), ("1f40d", "snake"),
    ("1f40a", "crocodile"), ("1f996", "dinosaur"), ("1f99c", "parrot"), ("1f9a2", "swan"), ("1f9a9", "flamingo"),
    ("1f98a", "fox"), ("1f43c", "panda"), ("1f984", "unicorn"),
    # food
    ("1f34e", "apple"), ("1f382", "cake"), ("1f344", "mushroom"), ("1f34c", "banana"), ("1f353", "strawberry"),
    ("1f951", "avocado"), ("1f349", "watermelon"), ("1f34d", "pineapple"), ("1f350", "pear"), ("1f34b", "lemon"),
    ("1f955", "carrot"), ("1f346", "eggplant"), ("1f354", "burger", "hamburger"), ("1f355", "pizza"),
    ("1f369", "donut"), ("1f9c0", "cheese"),
    # vehicles
    ("1f697", "car"), ("1f680", "rocket"), ("26f5", "sailboat", "boat"), ("1f68c", "bus"), ("1f682", "train"),
    ("1f69a", "truck"), ("1f69c", "tractor"), ("1f6b2", "bicycle", "bike"), ("2708", "airplane", "plane"),
    ("1f681", "helicopter"),
    # plants
    ("1f335", "cactus"), ("1f337", "tulip"), ("1f33b", "sunflower"), ("1f334", "palm tree"), ("1f333", "tree"),
))
KIND_NAMES = tuple(kind.name for kind in KINDS)

# (kind, emoji set) of the sprites that no model is trained on.
HELD_OUT = {(name, "twemoji") for name in (
    "teddy bear", "teapot", "backpack", "robot", "umbrella", "house", "drum", "hammer", "candle", "camera", "chair",
    "crown", "shoe", "trophy", "mug", "handbag", "snowman", "cat", "rabbit", "owl", "duck", "elephant", "butterfly",
    "cow", "sheep", "frog", "tiger", "giraffe", "camel", "bee", "crab", "dolphin", "snake", "dinosaur", "swan", "fox",
    "unicorn", "cake", "mushroom", "strawberry", "watermelon", "pear", "carrot", "burger", "donut", "car", "sailboat",
    "train", "tractor", "airplane", "tulip", "palm tree")}
# Sprites that show only a head where the other sets show the whole animal, or that resemble no other set's.
EXCLUDED = {("dog", "emojione"), ("pig", "emojione"), ("tiger", "emojione"), ("monkey", "emojione"),
            ("camel", "emojione"), ("camel", "noto_v1")}

COLORS = {
    "red": (214, 48, 49), "orange": (240, 140, 40), "yellow": (247, 208, 60), "green": (60, 165, 75),
    "blue": (52, 110, 220), "purple": (140, 75, 190), "pink": (245, 130, 175), "grey": (140, 145, 150),
}
PATTERNS = ("striped", "spotted")
PATTERN_CYCLES = 2.2  # periods of a pattern over a sprite: wide enough for latents that are eight pixels apart


@cache
def load_sprite(kind: str, emoji_set: str) -> Image.Image:
    """Load the RGBA sprite of `kind` in an emoji set, without its transparent margin."""
    return Image.open(sprite_file(kind, emoji_set)).convert("RGBA")


def sprite_file(kind: str, emoji_set: str) -> Path:
    """Return the path of a sprite's file."""
    return WORLD / "sprites" / kind.replace(" ", "_") / f"{emoji_set}.webp"


@cache
def available_sets(kind: str) -> frozenset[str]:
    """Return the emoji sets that have a sprite of `kind`. Not every set has every kind."""
    return frozenset(emoji_set for emoji_set in EMOJI_SETS if sprite_file(kind, emoji_set).is_file())


def sprite_sets(kind: str, held_out: bool = False) -> list[str]:
    """Return the emoji sets whose sprite of `kind` is for training or, with `held_out`, held out."""
    available = available_sets(kind)
    return [emoji_set for emoji_set in EMOJI_SETS
            if emoji_set in available and ((kind, emoji_set) in HELD_OUT) == held_out]


def recolor(rgb: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Paint a sprite in shades of one color, and keep its light and dark parts.

    Args:
        rgb: (H, W, 3) float32 in [0, 255].
        color: RGB in [0, 255].

    Returns:
        (H, W, 3) in [0, 255], from dark through `color` to pale.
    """
    # Increase the contrast of the luminance, whose weights are those of ITU-R BT.601 (rounded).
    luminance = rgb @ np.array([0.3, 0.59, 0.11], dtype=np.float32) / 255.0
    level = np.clip((luminance - 0.5) * 1.3 + 0.55, 0.0, 1.0)[..., None]
    middle = np.asarray(color, dtype=np.float32)
    dark, bright = middle * 0.15, middle * 0.35 + 255 * 0.65
    # Levels up to 0.6 go from dark to the color, those above to bright.
    return np.where(level < 0.6, dark + (middle - dark) * (level / 0.6),
                    middle + (bright - middle) * ((level - 0.6) / 0.4))


def pattern_mask(pattern: str, height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """Return where a pattern has its second color.

    Args:
        pattern: one of `PATTERNS`. It scales with the sprite.
        height: height of the sprite.
        width: width of the sprite.
        phase: shift of the pattern, as a fraction of the sprite.

    Returns:
        (height, width) in [0, 1].
    """
    rows = (np.arange(height, dtype=np.float32)[:, None] / height + phase) * PATTERN_CYCLES
    columns = (np.arange(width, dtype=np.float32)[None] / width + phase) * PATTERN_CYCLES
    wave = {"striped": np.sin(2 * np.pi * rows) + 0.0 * columns,
            "spotted": np.cos(2 * np.pi * rows) + np.cos(2 * np.pi * columns) - 0.9}[pattern]
    return np.clip(wave * 2.5 + 0.5, 0.0, 1.0)
