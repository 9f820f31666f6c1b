"""Training presets in plain words, as shares of the steps that a config has."""
from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """How long to train.

    Attributes:
        label: what the page shows.
        share: of the config's steps.
    """

    label: str
    share: float


PRESETS = {
    "quick": Preset("Quick: a first look", 0.5),
    "balanced": Preset("Balanced: the usual", 1.0),
    "thorough": Preset("Thorough: twice as long", 2.0),
}


def preset_steps(preset: str, config_steps: int) -> int:
    """Return the training steps of a preset."""
    return max(1, round(PRESETS[preset].share * config_steps))


def suggest_placeholder(super_category: str) -> str:
    """Return a word for a concept of this kind, such as "<my-teddy-bear>"."""
    words = "".join(letter if letter.isalnum() else " " for letter in super_category.lower()).split()
    return f"<my-{'-'.join(words) or 'concept'}>"
