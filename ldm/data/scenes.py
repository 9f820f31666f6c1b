"""Scenes of the mini world, composed on the fly: one or two things in a place, with exact captions and masks."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.places import PLACES
from ldm.data.world import COLOURS, KINDS, PATTERNS, drawing, drawings_of, pattern_mask, recolour

TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
BACKGROUNDS_PER_PLACE = 48


@dataclass(frozen=True)
class Look:
    """What a drawing wears: a colour, a pattern in a second colour, or neither."""

    colour: str | None = None
    pattern: str | None = None
    second: str | None = None


@dataclass
class Thing:
    """One thing of a scene: which drawing, how it looks, where it stands and how much of the side it takes up."""

    kind: str
    source: str
    look: Look = field(default_factory=Look)
    centre: tuple[float, float] = (0.5, 0.56)
    extent: float = 0.7
    angle: float = 0.0
    flip: bool = False
    phase: float = 0.0


@lru_cache(maxsize=16)
def background_bank(place: str, size: int, count: int = BACKGROUNDS_PER_PLACE) -> tuple[Image.Image, ...]:
    """`count` variants of a place, the same on every machine."""
    paint, _ = PLACES[place]
    first = list(PLACES).index(place) * 1000
    return tuple(paint(np.random.default_rng(first + number), size) for number in range(count))


@lru_cache(maxsize=4096)
def dressed(kind: str, source: str, look: Look, phase: float) -> Image.Image:
    """The drawing in its colour and pattern, its outline unchanged."""
    plain = drawing(kind, source)
    if look == Look():
        return plain
    pixels = np.asarray(plain, dtype=np.float32)
    rgb = recolour(pixels[..., :3], COLOURS[look.colour]) if look.colour else pixels[..., :3]
    if look.pattern:
        share = pattern_mask(look.pattern, *pixels.shape[:2], phase)[..., None]
        rgb = rgb * (1 - share) + recolour(pixels[..., :3], COLOURS[look.second]) * share
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], axis=-1).clip(0, 255).astype(np.uint8), "RGBA")


def place_thing(scene: Image.Image, thing: Thing) -> np.ndarray:
    """Pastes a thing into the scene and returns its mask, (H, W) float32 in [0, 1]."""
    side = scene.width
    sprite = dressed(thing.kind, thing.source, thing.look, thing.phase)
    scale = thing.extent * side / max(sprite.size)
    sprite = sprite.resize([max(2, round(s * scale)) for s in sprite.size], Image.Resampling.BILINEAR, reducing_gap=2.0)
    if thing.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if thing.angle:
        sprite = sprite.rotate(thing.angle, Image.Resampling.BILINEAR, expand=True)
    corner = [round(c * side - s / 2) for c, s in zip(thing.centre, sprite.size, strict=True)]
    scene.paste(sprite, corner, sprite)
    mask = Image.new("L", scene.size)
    mask.paste(sprite.getchannel("A"), corner)
    return np.asarray(mask, dtype=np.float32) / 255.0


def compose(place: str, variant: int, things: Sequence[Thing], size: int = 64) -> tuple[Image.Image, np.ndarray]:
    """The picture of a scene and one mask per thing, (things, size, size), those in front hiding those behind."""
    scene = background_bank(place, size)[variant % BACKGROUNDS_PER_PLACE].copy()
    masks: list[np.ndarray] = []
    for thing in things:
        mask = place_thing(scene, thing)
        masks = [earlier * (1 - mask) for earlier in masks] + [mask]
    return scene, np.stack(masks)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class SceneDataset(Dataset):
    """Endless scenes of the mini world; item `i` of a seed is the same on every machine.

    Items: "image" (3, size, size) float32 in [-1, 1]; "caption"; "mask" (1, size, size) of the thing named first;
    "kind" its index in `KINDS`, "word" its word, "other" the name of a kind that is not in the scene; "place" an index
    in `PLACES`.

    Args:
        size: side of the pictures in pixels.
        length: how many scenes make an epoch.
        seed: another seed gives other scenes.
        two_things: share of scenes with two things side by side.
        patterned: share of things with a striped or spotted pattern in a second colour.
        coloured: share of the others that are in one colour instead of the drawing's own.
        empty_caption: share of captions left empty, for classifier-free guidance.
        jitter: how much places, sizes and angles vary, 0 (not at all) to 1; less makes a world that is learned sooner.
        flips: share of things that are mirrored.
        held_out: compose with the drawings that models never see instead of those they are trained on.
    """

    def __init__(self, size: int = 64, length: int = 100_000, seed: int = 0, two_things: float = 0.2,
                 coloured: float = 0.35, patterned: float = 0.2, empty_caption: float = 0.0,
                 held_out: bool = False, jitter: float = 1.0, flips: float = 0.5) -> None:
        self.size, self.length, self.seed = size, length, seed
        self.two_things, self.coloured, self.patterned = two_things, coloured, patterned
        self.empty_caption, self.jitter, self.flips = empty_caption, jitter, flips
        self.held_out = held_out
        self.kinds = [kind for kind in KINDS if drawings_of(kind.name, held_out)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        place = list(PLACES)[rng.integers(len(PLACES))]
        count = 2 if rng.random() < self.two_things else 1
        chosen = [self.kinds[k] for k in rng.choice(len(self.kinds), count + 1, replace=False)]
        *present, absent = chosen
        things = self._things(rng, [kind.name for kind in present])
        words = [kind.words[0] if rng.random() < 0.8 else kind.words[-1] for kind in present]
        scene, masks = compose(place, int(rng.integers(BACKGROUNDS_PER_PLACE)), things, self.size)
        pixels = torch.from_numpy(np.asarray(scene).copy()).permute(2, 0, 1).float() / 127.5 - 1.0
        return {"image": pixels, "caption": self._caption(rng, things, words, place),
                "mask": torch.from_numpy(masks[0])[None], "kind": KINDS.index(present[0]), "word": words[0],
                "other": absent.name, "place": list(PLACES).index(place)}

    def _look(self, rng: np.random.Generator) -> Look:
        colours = rng.permutation(list(COLOURS))
        if rng.random() < self.patterned:
            first = colours[0] if rng.random() < 0.7 else None
            return Look(first, PATTERNS[rng.integers(len(PATTERNS))], colours[1])
        return Look(colours[0]) if rng.random() < self.coloured else Look()

    def _things(self, rng: np.random.Generator, names: list[str]) -> list[Thing]:
        things = []
        for position, name in enumerate(names):
            alone = len(names) == 1
            across = 0.5 if alone else (0.27, 0.73)[position]
            sources = drawings_of(name, self.held_out)
            things.append(Thing(
                name, sources[rng.integers(len(sources))], self._look(rng),
                centre=(across + self._about(rng, 0, 0.07) * (1.0 if alone else 0.3), self._about(rng, 0.55, 0.05)),
                extent=self._about(rng, 0.71, 0.09) if alone else self._about(rng, 0.48, 0.04),
                angle=self._about(rng, 0, 8), flip=bool(rng.random() < self.flips), phase=int(rng.integers(4)) / 18))
        return things

    def _about(self, rng: np.random.Generator, middle: float, spread: float) -> float:
        return middle + self.jitter * rng.uniform(-spread, spread)

    def _caption(self, rng: np.random.Generator, things: list[Thing], words: list[str], place: str) -> str:
        if rng.random() < self.empty_caption:
            return ""
        phrases = [self._phrase(rng, thing.look, word) for thing, word in zip(things, words, strict=True)]
        if len(phrases) == 2:
            phrases = [f"{phrases[0]} {'next to' if rng.random() < 0.6 else 'and'} {phrases[1]}"]
        caption = TEMPLATES[rng.choice(len(TEMPLATES), p=(0.5, 0.15, 0.1, 0.25))].format(phrases[0])
        if rng.random() < 0.08:
            return caption
        where = PLACES[place][1]
        return f"{caption} {where[rng.integers(len(where))]}"

    @staticmethod
    def _phrase(rng: np.random.Generator, look: Look, word: str) -> str:
        """The thing with most of its looks named: what captions leave out, a model learns to vary by itself."""
        parts = [part for part in (look.colour, look.pattern) if part and rng.random() < 0.8]
        return with_article(" ".join([*parts, word]))
