"""Prompts for subjects whose looks have names: what a concept encoder of a model of photos is trained on.

Prompt `index` depends on the seed and the index alone, so a set of images can grow.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.common.prompt_file import SLOT
from ldm.common.words import replace_word
from ldm.data.kinds import EVERYDAY_KINDS

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "beige",
          "turquoise", "dark blue", "dark red", "dark green", "light blue", "light green", "golden", "silver")
PATTERNS = ("striped", "spotted", "checkered", "polka dot", "floral")
MATERIALS = ("wooden", "metal", "glass", "plush", "knitted", "ceramic", "leather", "plastic", "stone", "paper")
BACKGROUNDS = ("", "on a table", "on the beach", "in the snow", "in a forest", "on a street", "in a garden",
               "on a wooden floor", "on a sofa", "in a kitchen", "in a meadow", "on a rock", "in front of a wall",
               "on a plain background", "in a park", "on a shelf", "on a carpet", "at night", "by a lake", "in a room")
# Looks of things are not those of people, and some kinds are a material or a part.
WITHOUT_LOOKS = {"man", "woman", "boy", "girl", "baby", "old man", "old woman", "person", "face", "hand", "clown",
                 "soldier", "knight", "chef", "dancer", "cartoon character", "logo", "stone", "ice cream"}
LOOK_KINDS = tuple(kind for kind in EVERYDAY_KINDS if kind not in WITHOUT_LOOKS)
# Shares of the looks: none, color, two colors in a pattern, material, colored material.
SHARES = (0.05, 0.35, 0.3, 0.1, 0.2)


@dataclass(frozen=True)
class LookPrompt:
    """A subject and where it is.

    Attributes:
        kind: such as "teddy bear".
        look: such as "red and white striped"; "" for the kind as the model generates it.
        background: such as "on a table", or "".
    """

    kind: str
    look: str
    background: str

    @property
    def text(self) -> str:
        """The prompt: "a photo of an orange cup on a table"."""
        noun = f"{self.look} {self.kind}".strip()
        return f"{replace_word(noun, SLOT, f'a photo of a {SLOT}')} {self.background}".strip()


def look_words() -> list[str]:
    """Return words of looks to tell a user what is seen: "" for a usual one, colors, materials, colored patterns."""
    return ["", *COLORS, *MATERIALS, *(f"{color} {pattern}" for color in COLORS for pattern in PATTERNS)]


def look_prompt(seed: int, index: int) -> LookPrompt:
    """Return prompt `index` of the set of this seed."""
    rng = np.random.default_rng((seed, index))
    kind = LOOK_KINDS[rng.integers(len(LOOK_KINDS))]
    return LookPrompt(kind, _choose_look(rng), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


def _choose_look(rng: np.random.Generator) -> str:
    color, second = (COLORS[index] for index in rng.choice(len(COLORS), 2, replace=False))
    pattern, material = PATTERNS[rng.integers(len(PATTERNS))], MATERIALS[rng.integers(len(MATERIALS))]
    looks = ("", color, f"{color} and {second} {pattern}", material, f"{color} {material}")
    return looks[rng.choice(len(looks), p=SHARES)]
