"""Training presets in plain words: shares of the steps that a config has, or a config with an encoder."""
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

SECONDS, SECONDS_LABEL = "seconds", "In seconds: an encoder looks at the photos, and a few steps follow"
FAST_CONFIGS = {"configs/perfusion.yaml": "configs/perfusion-fast.yaml"}  # config of training -> of the same in seconds


def fast_config(base: str) -> str | None:
    """Return the config that trains with an encoder on the base model of another config; None: there is none."""
    return next((fast for usual, fast in FAST_CONFIGS.items() if resolve_path(usual) == resolve_path(base)), None)


def preset_labels(base: str) -> dict[str, str]:
    """Return the presets of a training config: names and what the page shows."""
    labels = {SECONDS: SECONDS_LABEL} if fast_config(base) else {}
    return labels | {name: preset.label for name, preset in PRESETS.items()}


def preset_steps(preset: str, config_steps: int) -> int:
    """Return the training steps of a preset."""
    return max(1, round(PRESETS[preset].share * config_steps))


def suggest_placeholder(super_category: str) -> str:
    """Return a word for a concept of this kind, such as "<my-teddy-bear>"."""
    words = "".join(letter if letter.isalnum() else " " for letter in super_category.lower()).split()
    return f"<my-{'-'.join(words) or 'concept'}>"
