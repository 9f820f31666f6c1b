"""Subjects of composed scenes with masks, kinds and looks: what the concept encoder is trained on.

A target of the encoder is what words say about a look, not an image. So layout and background cannot be learned.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ldm.data.mini.scenes import Appearance, SceneDataset, compose
from ldm.data.mini.world import COLORS, KIND_NAMES, PATTERNS

DARKEST, PALEST = 0.5, 0.4  # factor of the darkest subjects, and share of white in the palest ones
EXACT, TOO_LARGE = 0.35, 0.6  # of the masks, up to which share they are exact, or too large; the others are too small
FEWEST_PIXELS = 20


def look_words(look: Appearance) -> str:
    """Return the words of captions for a look: "purple and yellow striped", "red", or "" for the sprite's own."""
    if look.pattern:
        return f"{look.color} and {look.second_color} {look.pattern}"
    return look.color or ""


def all_looks() -> list[str]:
    """Return the words of every look that has a name, that of the sprite's own colors ("") first."""
    looks = ["", *COLORS]
    for color in COLORS:
        for pattern in PATTERNS:
            looks += [look_words(Appearance(color, pattern, second)) for second in COLORS if second != color]
    return looks


class ComposedSubjects(SceneDataset):
    """The first subjects of scenes, in looks that words can name, with masks such as a segmenter makes.

    Items are dicts:
        image: (3, size, size) float32 in [-1, 1]
        mask:  (1, size, size) in [0, 1], of the subject
        kind:  str, the word for the subject
        look:  str, the words for its look; "" if it has its own colors
        index: int, the item's index

    If `with_pixels` is false, items have the index only, for a model that has computed their features.

    Args (beside those of `SceneDataset`):
        lightness: share of the subjects that are darker or paler than their colors. Sprites differ in it.
        without_kinds: names of kinds that are left out.

    Raises:
        UserError: `kinds` or `without_kinds` name what does not exist.
    """

    def __init__(self, lightness: float = 0.5, without_kinds: Sequence[str] = (), kinds: Sequence[str] | None = None,
                 **scenes: Any) -> None:
        included = [kind for kind in kinds or KIND_NAMES if kind not in without_kinds]
        super().__init__(kinds=[*included, *(set(without_kinds) - set(KIND_NAMES))], **scenes)
        self.lightness = lightness
        self.with_pixels = True

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.with_pixels:
            return {"index": index}
        scene = self.plan(index)
        image, masks = compose(scene.background, scene.variant, scene.subjects, self.size, scene.style)
        rng = np.random.default_rng((self.seed, index, 1))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        exact = torch.from_numpy(masks[0])
        pixels = change_lightness(pixels, exact, rng, self.lightness)
        return {
            "image": 2 * pixels - 1,
            "mask": degrade_mask(exact, rng)[None],
            "kind": scene.words[0],
            "look": look_words(scene.subjects[0].appearance),
            "index": index,
        }

    def _choose_appearance(self, rng: np.random.Generator) -> Appearance:
        """Choose a look. A pattern on the sprite's own colors has no name, so another look is chosen in its place."""
        look = super()._choose_appearance(rng)
        while look.pattern and not look.color:
            look = super()._choose_appearance(rng)
        return look


def change_lightness(pixels: Tensor, mask: Tensor, rng: np.random.Generator, share: float) -> Tensor:
    """Make a share of the subjects darker or paler: pixels (3, H, W) in [0, 1] where a mask (H, W) is."""
    if rng.random() >= share:
        return pixels
    if rng.random() < 0.5:
        changed = pixels * float(rng.uniform(DARKEST, 1))
    else:
        changed = torch.lerp(pixels, torch.ones_like(pixels), float(rng.uniform(0, PALEST)))
    return torch.lerp(pixels, changed, mask)


def degrade_mask(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a mask (H, W) as a segmenter makes it: often a little too large or too small, and soft at its border."""
    kind, pixels = rng.random(), int(rng.integers(1, 3))
    if kind < EXACT:
        return mask
    change = ndimage.binary_dilation if kind < TOO_LARGE else ndimage.binary_erosion
    changed = change(mask.numpy() > 0.5, iterations=pixels)
    if changed.sum() < FEWEST_PIXELS:
        return mask
    soft = ndimage.gaussian_filter(changed.astype(np.float32), float(rng.uniform(0.3, 1.2)))
    return torch.from_numpy(soft / soft.max())
