"""Training presets in plain words: shares of the steps that a config has, or configs of their own."""
from __future__ import annotations

from typing import NamedTuple

from ldm.common.paths import resolve_path


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

class ConfigPreset(NamedTuple):
    """A preset that trains by a config of its own.

    Attributes:
        label: what the page shows.
        config: its path, from the project's root.
    """

    label: str
    config: str


# Usual training config -> presets of the same base model.
CONFIG_PRESETS = {"configs/perfusion.yaml": {
    "seconds": ConfigPreset("In seconds: an encoder looks at the photos, and a few steps follow",
                            "configs/perfusion-fast.yaml"),
    "closer": ConfigPreset("Closer: also learns from scenes with other things", "configs/perfusion-scenes.yaml"),
}}


def config_presets(base: str) -> dict[str, ConfigPreset]:
    """Return the presets with configs of their own for the base model of a training config."""
    return next((presets for usual, presets in CONFIG_PRESETS.items() if resolve_path(usual) == resolve_path(base)), {})


def preset_labels(base: str) -> dict[str, str]:
    """Return the presets of a training config: names and what the page shows."""
    return {name: preset.label for name, preset in {**PRESETS, **config_presets(base)}.items()}


def preset_steps(preset: str, config_steps: int) -> int:
    """Return the training steps of a preset."""
    return max(1, round(PRESETS[preset].share * config_steps))


def suggest_placeholder(super_category: str) -> str:
    """Return a word for a concept of this kind, such as "<my-teddy-bear>"."""
    words = "".join(letter if letter.isalnum() else " " for letter in super_category.lower()).split()
    return f"<my-{'-'.join(words) or 'concept'}>"
