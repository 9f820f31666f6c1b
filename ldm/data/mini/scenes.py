"""Scenes of the mini world, composed on the fly: one or two things in a place, with exact captions and masks."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.data.mini.attribute_captions import aside
from ldm.data.mini.backgrounds import PLACES
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import COLOURS, KIND_NAMES, KINDS, PATTERNS, SETS, drawing, drawings_of, pattern_mask, recolour

PLAIN_TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
TEMPLATE_SHARES = (0.5, 0.15, 0.1, 0.25)
PLACE_NAMES = tuple(PLACES)
BACKGROUNDS_PER_PLACE = 48
# Where two things stand, (centre, extent) of the first and of the second, and how often a caption says it so. "and" and
# "next to" name the left one first, as one reads.
SIDE_BY_SIDE = (((0.27, 0.56), 0.48), ((0.73, 0.56), 0.48))
RELATIONS = {
    "and": (SIDE_BY_SIDE, 0.3), "next to": (SIDE_BY_SIDE, 0.3), "left of": (SIDE_BY_SIDE, 0.12),
    "right of": (SIDE_BY_SIDE[::-1], 0.12), "on top of": ((((0.5, 0.27), 0.42), ((0.5, 0.72), 0.48)), 0.16)}
SIZES = {"small": 0.42, "big": 0.87}  # of the side; a thing of which no size is said takes up 0.71
EXTENT = 0.71
CLOSE_UP = 0.54  # of the side: one of two things with a little of its surroundings


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
    extent: float = EXTENT
    angle: float = 0.0
    flip: bool = False
    phase: float = 0.0


@dataclass
class Scene:
    """All that is in a picture: its place, its things with the words for them, its style, and what is said of it.

    A `close_up` shows one of two things alone, this one; only of it there are words.
    """

    place: str
    variant: int
    things: list[Thing]
    words: list[str]
    absent: str
    style: str | None = None
    caption: str = ""
    close_up: int | None = None

    @property
    def spoken_of(self) -> list[Thing]:
        """The things that the words are for."""
        return self.things if self.close_up is None else [self.things[self.close_up]]


@lru_cache(maxsize=64)
def background_bank(place: str, size: int, count: int = BACKGROUNDS_PER_PLACE) -> tuple[Image.Image, ...]:
    """`count` variants of a place, the same on every machine."""
    paint, _ = PLACES[place]
    first = PLACE_NAMES.index(place) * 1000
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


def compose(place: str, variant: int, things: Sequence[Thing], size: int = 64,
            style: str | None = None) -> tuple[Image.Image, np.ndarray]:
    """The picture of a scene and one mask per thing, (things, size, size), those in front hiding those behind."""
    scene = background_bank(place, size)[variant % BACKGROUNDS_PER_PLACE].copy()
    masks: list[np.ndarray] = []
    for thing in things:
        mask = place_thing(scene, thing)
        masks = [earlier * (1 - mask) for earlier in masks] + [mask]
    return (STYLES[style](scene) if style else scene), np.stack(masks)


def close_up_box(centre: tuple[float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square window in a picture, CLOSE_UP of its shorter side, around (x, y) in [0, 1]
    or as near to it as the window lies inside."""
    side = round(CLOSE_UP * min(width, height))
    left, top = (round(min(max(c * size - side / 2, 0), size - side))
                 for c, size in zip(centre, (width, height), strict=True))
    return left, top, left + side, top + side


def cut_around(centre: tuple[float, float], picture: Image.Image, mask: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The window of a picture and of a mask around a spot, both enlarged to the size of the whole."""
    box = close_up_box(centre, *picture.size)
    shown = Image.fromarray(mask).resize(picture.size, Image.Resampling.BILINEAR, box)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box), np.asarray(shown)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


class SceneDataset(Dataset):
    """Endless scenes of the mini world; item `i` of a seed is the same on every machine.

    Items: "image" (3, size, size) float32 in [-1, 1]; "caption"; "mask" (1, size, size) of the thing named first,
    "second_mask" that of the other, empty where there is none, "objects" of all things; "kind" the first one's index in
    `KINDS`, "second_kind" the other's, or -1; "word" and "second_word" ("" where there is none) the words for them;
    "other" the name of a kind that is not in the scene; "place" an index in `PLACES`.

    Args:
        size: side of the pictures in pixels.
        length: how many scenes make an epoch.
        seed: another seed gives other scenes.
        two_things: share of scenes with two things in a relation.
        patterned: share of things with a striped or spotted pattern in a second colour.
        coloured: share of the others that are in one colour instead of the drawing's own.
        sized: share of single things that are small or big.
        styled: share of scenes that are a sketch, pixel art or a painting.
        empty_caption: share of captions left empty, for classifier-free guidance.
        jitter: how much places, sizes and angles vary, 0 (not at all) to 1; less makes a world that is learned sooner.
        flips: share of things that are mirrored.
        held_out: compose with the drawings that models never see instead of those they are trained on.
        sources: picture sets to take drawings from (see `ldm.data.mini.world.SETS`); all of them where None. A kind whose
            drawing is in none of them has those of the other sets.
        kinds: names of the kinds of things to compose scenes of, one that is named several times that much more often;
            all of them where None.
        close_ups: share of the scenes with two things that show one of them from close by and speak of it alone. A
            recogniser that looks at parts of pictures needs them.
        second_colours: share of the captions that name a thing's colour and pattern and say the second colour, too ("a
            purple and yellow striped mug"). What no caption names, no value of a word can turn on.
        asides: share of the captions that leave colours and patterns to the noun: "a (purple striped|mug)", for an
            encoder that understands asides (`ldm.modules.encoders.attribute_binding`).

    Raises:
        UserError: `sources` or `kinds` name what does not exist.
    """

    def __init__(self, size: int = 64, length: int = 100_000, seed: int = 0, two_things: float = 0.25,
                 coloured: float = 0.35, patterned: float = 0.15, sized: float = 0.12, styled: float = 0.1,
                 empty_caption: float = 0.0, held_out: bool = False, jitter: float = 1.0, flips: float = 0.5,
                 sources: Sequence[str] | None = None, kinds: Sequence[str] | None = None,
                 close_ups: float = 0.0, second_colours: float = 0.0, asides: float = 0.0) -> None:
        _refuse_unknown("sources", "picture set", sources, SETS)
        _refuse_unknown("kinds", "kind of thing", kinds, KIND_NAMES)
        self.size, self.length, self.seed = size, length, seed
        self.two_things, self.coloured, self.patterned = two_things, coloured, patterned
        self.sized, self.styled = sized, styled
        self.empty_caption, self.jitter, self.flips, self.close_ups = empty_caption, jitter, flips, close_ups
        self.second_colours, self.asides = second_colours, asides
        self.drawings = {name: _preferred(drawings_of(name, held_out), sources) for name in KIND_NAMES}
        named = Counter(kinds or KIND_NAMES)
        self.kinds = [kind for kind in KINDS if self.drawings[kind.name] and kind.name in named]
        counts = np.array([named[kind.name] for kind in self.kinds])
        self.kind_shares = None if (counts == 1).all() else counts / counts.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.plan(index)
        picture, masks = compose(scene.place, scene.variant, scene.things, self.size, scene.style)
        if scene.close_up is not None:
            picture, mask = cut_around(scene.spoken_of[0].centre, picture, masks[scene.close_up])
            masks = mask[None]
        things, two = scene.spoken_of, len(scene.spoken_of) > 1
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0
        return {"image": pixels, "caption": scene.caption, "mask": torch.from_numpy(masks[0])[None],
                "second_mask": torch.from_numpy(masks[1] if two else np.zeros_like(masks[0]))[None],
                "objects": torch.from_numpy(masks.max(0))[None],
                "kind": KIND_NAMES.index(things[0].kind),
                "second_kind": KIND_NAMES.index(things[1].kind) if two else -1,
                "word": scene.words[0], "second_word": scene.words[1] if two else "", "other": scene.absent,
                "place": PLACE_NAMES.index(scene.place)}

    def plan(self, index: int) -> Scene:
        """What is in scene `index` and what is said of it, nothing drawn yet."""
        rng = np.random.default_rng((self.seed, index))
        place = PLACE_NAMES[rng.integers(len(PLACE_NAMES))]
        two = rng.random() < self.two_things
        relation = _choice(rng, tuple(RELATIONS), [share for _, share in RELATIONS.values()]) if two else None
        size = ("small", "big")[rng.integers(2)] if not two and rng.random() < self.sized else None
        style = tuple(STYLES)[rng.integers(len(STYLES))] if rng.random() < self.styled else None
        picks = rng.choice(len(self.kinds), 3 if two else 2, replace=False, p=self.kind_shares)
        *present, absent = [self.kinds[k] for k in picks]
        things = self._things(rng, [kind.name for kind in present], relation, size)
        words = [kind.words[0] if rng.random() < 0.8 else kind.words[-1] for kind in present]
        scene = Scene(place, int(rng.integers(BACKGROUNDS_PER_PLACE)), things, words, absent.name, style)
        if two and self.close_ups and rng.random() < self.close_ups:
            scene.close_up = int(rng.integers(2))
            scene.words = [words[scene.close_up]]
        scene.caption = self._caption(rng, scene, relation, size)
        return scene

    def _look(self, rng: np.random.Generator) -> Look:
        colours = rng.permutation(list(COLOURS))
        if rng.random() < self.patterned:
            first = str(colours[0]) if rng.random() < 0.7 else None
            return Look(first, PATTERNS[rng.integers(len(PATTERNS))], str(colours[1]))
        return Look(str(colours[0])) if rng.random() < self.coloured else Look()

    def _things(self, rng: np.random.Generator, names: Sequence[str], relation: str | None,
                size: str | None) -> list[Thing]:
        spots = RELATIONS[relation][0] if relation else (((0.5, 0.55), SIZES.get(size, EXTENT)),)
        loose = 0.4 if relation else 1.0
        things = []
        for name, ((x, y), extent) in zip(names, spots, strict=True):
            sources = self.drawings[name]
            things.append(Thing(
                name, sources[rng.integers(len(sources))], self._look(rng),
                centre=(x + loose * self._about(rng, 0.07), y + loose * self._about(rng, 0.05)),
                extent=extent * (1 + loose * self._about(rng, 0.12)), angle=self._about(rng, 8),
                flip=bool(rng.random() < self.flips), phase=int(rng.integers(4)) / 18))
        return things

    def _about(self, rng: np.random.Generator, spread: float) -> float:
        return self.jitter * rng.uniform(-spread, spread)

    def _caption(self, rng: np.random.Generator, scene: Scene, relation: str | None, size: str | None) -> str:
        if rng.random() < self.empty_caption:
            return ""
        as_aside = bool(self.asides) and rng.random() < self.asides
        phrases = [_phrase(rng, thing.look, word, size, self.second_colours, as_aside)
                   for thing, word in zip(scene.spoken_of, scene.words, strict=True)]
        template = scene.style or _choice(rng, PLAIN_TEMPLATES, TEMPLATE_SHARES)
        caption = template.format(f" {relation} ".join(phrases))
        if rng.random() < 0.08:
            return caption
        where = PLACES[scene.place][1]
        return f"{caption} {where[rng.integers(len(where))]}"


def _refuse_unknown(param: str, what: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UserError(f"{param}: there is no {what} {unknown[0]!r}; choose from {', '.join(known)}")


def _preferred(drawings: list[str], sources: Sequence[str] | None) -> list[str]:
    return [source for source in drawings if sources is None or source in sources] or drawings


def _choice(rng: np.random.Generator, options: Sequence[str], shares: Sequence[float]) -> str:
    return options[rng.choice(len(options), p=shares)]


def _phrase(rng: np.random.Generator, look: Look, word: str, size: str | None, second_colours: float,
            as_aside: bool) -> str:
    """The thing with most of its looks named: what captions leave out, a model learns to vary by itself."""
    parts = [part for part in (size, look.colour, look.pattern) if part and rng.random() < 0.8]
    if second_colours and look.second and parts[-2:] == [look.colour, look.pattern] and rng.random() < second_colours:
        parts[-1:] = ["and", look.second, look.pattern]
    if as_aside:
        looks = [part for part in parts if part != size]
        parts, word = parts[:len(parts) - len(looks)], aside(" ".join(looks), word)
    return with_article(" ".join([*parts, word]))
