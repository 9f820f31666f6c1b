"""Scenes of the mini world, composed on the fly: one or two subjects on a background, with exact captions and masks."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.common.errors import UserError
from ldm.common.words import with_article
from ldm.data.mini.attribute_captions import bind_attributes
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import (
    COLORS,
    EMOJI_SETS,
    KIND_NAMES,
    KINDS,
    PATTERNS,
    load_sprite,
    pattern_mask,
    recolor,
    sprite_sets,
)

PLAIN_TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
TEMPLATE_SHARES = (0.5, 0.15, 0.1, 0.25)
BACKGROUND_NAMES = tuple(BACKGROUNDS)
VARIANTS_PER_BACKGROUND = 48
# Relation -> position (x, y) and extent of the subject named first and of the second, and the relation's frequency.
# Positions and extents are fractions of the image. "and" and "next to" name the left subject first.
SIDE_BY_SIDE = (((0.27, 0.56), 0.48), ((0.73, 0.56), 0.48))
RELATIONS = {
    "and": (SIDE_BY_SIDE, 0.3), "next to": (SIDE_BY_SIDE, 0.3), "left of": (SIDE_BY_SIDE, 0.12),
    "right of": (SIDE_BY_SIDE[::-1], 0.12), "on top of": ((((0.5, 0.27), 0.42), ((0.5, 0.72), 0.48)), 0.16)}
SIZES = {"small": 0.42, "big": 0.87}  # extents that captions name
EXTENT = 0.71  # of a subject whose size is not named
CLOSE_UP = 0.54  # side of the window that shows one of two subjects with a little of its surroundings


@dataclass(frozen=True)
class Appearance:
    """Color of a subject, and its pattern in a second color. None: the sprite's own color, no pattern."""

    color: str | None = None
    pattern: str | None = None
    second_color: str | None = None


@dataclass
class SceneSubject:
    """One subject of a scene.

    Attributes:
        kind: name of its kind.
        emoji_set: emoji set that its sprite comes from.
        appearance: its color and pattern.
        center: (x, y) of its center, in [0, 1].
        extent: its longer side, as a fraction of the image.
        angle: its rotation in degrees, counter-clockwise.
        flip: whether it is mirrored.
        phase: shift of its pattern.
    """

    kind: str
    emoji_set: str
    appearance: Appearance = field(default_factory=Appearance)
    center: tuple[float, float] = (0.5, 0.56)
    extent: float = EXTENT
    angle: float = 0.0
    flip: bool = False
    phase: float = 0.0


@dataclass
class Scene:
    """The contents of an image, and its caption.

    Attributes:
        background: its name.
        variant: which variant of the background, 0 to `VARIANTS_PER_BACKGROUND` - 1.
        subjects: one or two.
        words: the words for the subjects in the caption.
        absent: name of a kind that is not in the scene.
        style: caption template of its style, a key of `STYLES`; None for a plain scene.
        caption: caption of the scene.
        close_up: index of the only subject that is visible and has a word; None if all are.
    """

    background: str
    variant: int
    subjects: list[SceneSubject]
    words: list[str]
    absent: str
    style: str | None = None
    caption: str = ""
    close_up: int | None = None

    @property
    def visible_subjects(self) -> list[SceneSubject]:
        """The subjects in the image, which `words` are for."""
        return self.subjects if self.close_up is None else [self.subjects[self.close_up]]


@lru_cache(maxsize=64)
def background_variants(background: str, size: int, count: int = VARIANTS_PER_BACKGROUND) -> tuple[Image.Image, ...]:
    """Paint `count` variants of a background. They are the same on every machine."""
    paint, _ = BACKGROUNDS[background]
    first_seed = BACKGROUND_NAMES.index(background) * 1000
    return tuple(paint(np.random.default_rng(first_seed + variant), size) for variant in range(count))


@lru_cache(maxsize=4096)
def recolored_sprite(kind: str, emoji_set: str, appearance: Appearance, phase: float) -> Image.Image:
    """Return the RGBA sprite in its color and pattern, with its own outline."""
    sprite = load_sprite(kind, emoji_set)
    if appearance == Appearance():
        return sprite
    pixels = np.asarray(sprite, dtype=np.float32)
    rgb = recolor(pixels[..., :3], COLORS[appearance.color]) if appearance.color else pixels[..., :3]
    if appearance.pattern:
        share = pattern_mask(appearance.pattern, *pixels.shape[:2], phase)[..., None]
        rgb = rgb * (1 - share) + recolor(pixels[..., :3], COLORS[appearance.second_color]) * share
    return Image.fromarray(np.concatenate([rgb, pixels[..., 3:]], axis=-1).clip(0, 255).astype(np.uint8), "RGBA")


def paste_subject(scene: Image.Image, subject: SceneSubject) -> np.ndarray:
    """Paste a subject into the image of a scene and return its mask, (H, W) float32 in [0, 1]."""
    side = scene.width
    sprite = recolored_sprite(subject.kind, subject.emoji_set, subject.appearance, subject.phase)

    # Resize, flip and rotate the sprite.
    scale = subject.extent * side / max(sprite.size)
    sprite = sprite.resize([max(2, round(s * scale)) for s in sprite.size], Image.Resampling.BILINEAR, reducing_gap=2.0)
    if subject.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if subject.angle:
        sprite = sprite.rotate(subject.angle, Image.Resampling.BILINEAR, expand=True)

    corner = [round(c * side - s / 2) for c, s in zip(subject.center, sprite.size, strict=True)]
    scene.paste(sprite, corner, sprite)
    mask = Image.new("L", scene.size)
    mask.paste(sprite.getchannel("A"), corner)
    return np.asarray(mask, dtype=np.float32) / 255.0


def compose(background: str, variant: int, subjects: Sequence[SceneSubject], size: int = 64,
            style: str | None = None) -> tuple[Image.Image, np.ndarray]:
    """Compose the image of a scene.

    Returns:
        The image, and one mask per subject, (subjects, size, size) in [0, 1]. Later subjects hide earlier ones.
    """
    scene = background_variants(background, size)[variant % VARIANTS_PER_BACKGROUND].copy()
    masks: list[np.ndarray] = []
    for subject in subjects:
        mask = paste_subject(scene, subject)
        masks = [earlier * (1 - mask) for earlier in masks] + [mask]
    return (STYLES[style](scene) if style else scene), np.stack(masks)


def close_up_box(center: tuple[float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box of a square window around a position, moved as far as needed to lie inside of the image.

    Args:
        center: (x, y) in [0, 1].
        width: width of the image.
        height: height of the image.

    Returns:
        (left, top, right, bottom) in pixels. The side is `CLOSE_UP` times the image's shorter side.
    """
    side = round(CLOSE_UP * min(width, height))
    left, top = (round(min(max(c * size - side / 2, 0), size - side))
                 for c, size in zip(center, (width, height), strict=True))
    return left, top, left + side, top + side


def crop_around(center: tuple[float, float], image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Return the window of an image and of a mask around a position, both enlarged to the image's size."""
    box = close_up_box(center, *image.size)
    mask_window = Image.fromarray(mask).resize(image.size, Image.Resampling.BILINEAR, box)
    return image.resize(image.size, Image.Resampling.BICUBIC, box), np.array(mask_window)


class SceneDataset(Dataset):
    """Endless scenes of the mini world. Item `i` of a seed is the same on every machine.

    Items are dicts:
        image:       (3, size, size) float32 in [-1, 1]
        caption:     str
        mask:        (1, size, size) in [0, 1], of the subject named first
        second_mask: the mask of the other subject; all zeros if there is none
        objects:     the mask of all subjects
        kind:        int, index of the first subject's kind in `KINDS`
        second_kind: index of the other's; -1 if there is none
        word:        str, the word for the first subject
        second_word: the word for the other; "" if there is none
        absent_kind: str, name of a kind that is not in the scene
        background:  int, index in `BACKGROUNDS`

    Args:
        size: side of the images, in pixels.
        length: number of scenes in an epoch.
        seed: another seed gives other scenes.
        two_subjects: share of scenes with two subjects in a relation.
        colored: share of subjects without a pattern that have one color instead of the sprite's own.
        patterned: share of subjects with a striped or spotted pattern in a second color.
        sized: share of single subjects that are small or big.
        styled: share of scenes that are a sketch, pixel art or a painting.
        empty_caption: share of captions that are empty, for classifier-free guidance.
        held_out: compose the held-out sprites instead of those for training.
        jitter: how much positions, sizes and angles vary, from 0 (not at all) to 1. A model learns a world with less
            of it sooner.
        flips: share of subjects that are mirrored.
        emoji_sets: sets to take sprites from (see `ldm.data.mini.world.EMOJI_SETS`). None: all. A kind without a sprite
            in any of them takes those of the other sets.
        kinds: names of the kinds of subjects. None: all. A kind that is listed n times is n times as frequent.
        close_ups: share of the scenes with two subjects that show and name only one of them, enlarged. Classifiers of
            parts of images need them.
        second_colors: share of the captions with a subject's color and pattern that name the second color, too ("a
            purple and yellow striped mug"). If no caption named it, no word could express it.
        attribute_captions: share of the captions that bind colors and patterns to the noun: "a (purple striped|mug)",
            for `ldm.modules.encoders.attribute_binding`.

    Raises:
        UserError: `emoji_sets` or `kinds` name what does not exist.
    """

    renamed_params: ClassVar[dict[str, str]] = {
        "two_things": "two_subjects", "coloured": "colored", "sources": "emoji_sets",
        "second_colours": "second_colors", "asides": "attribute_captions"}

    def __init__(self, size: int = 64, length: int = 100_000, seed: int = 0, two_subjects: float = 0.25,
                 colored: float = 0.35, patterned: float = 0.15, sized: float = 0.12, styled: float = 0.1,
                 empty_caption: float = 0.0, held_out: bool = False, jitter: float = 1.0, flips: float = 0.5,
                 emoji_sets: Sequence[str] | None = None, kinds: Sequence[str] | None = None,
                 close_ups: float = 0.0, second_colors: float = 0.0, attribute_captions: float = 0.0) -> None:
        _check_names("emoji_sets", "emoji set", emoji_sets, EMOJI_SETS)
        _check_names("kinds", "kind of subject", kinds, KIND_NAMES)
        self.size, self.length, self.seed = size, length, seed
        self.two_subjects, self.colored, self.patterned = two_subjects, colored, patterned
        self.sized, self.styled = sized, styled
        self.empty_caption, self.jitter, self.flips, self.close_ups = empty_caption, jitter, flips, close_ups
        self.second_colors, self.attribute_captions = second_colors, attribute_captions

        # Choose the sprites and the frequency of each kind.
        self.sprite_sets = {name: _prefer(sprite_sets(name, held_out), emoji_sets) for name in KIND_NAMES}
        counts = Counter(kinds or KIND_NAMES)
        self.kinds = [kind for kind in KINDS if self.sprite_sets[kind.name] and kind.name in counts]
        weights = np.array([counts[kind.name] for kind in self.kinds])
        self.kind_shares = None if (weights == 1).all() else weights / weights.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.plan(index)
        image, masks = compose(scene.background, scene.variant, scene.subjects, self.size, scene.style)
        if scene.close_up is not None:
            image, mask = crop_around(scene.visible_subjects[0].center, image, masks[scene.close_up])
            masks = mask[None]
        subjects = scene.visible_subjects
        two = len(subjects) > 1
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
        return {
            "image": pixels,
            "caption": scene.caption,
            "mask": torch.from_numpy(masks[0])[None],
            "second_mask": torch.from_numpy(masks[1] if two else np.zeros_like(masks[0]))[None],
            "objects": torch.from_numpy(masks.max(0))[None],
            "kind": KIND_NAMES.index(subjects[0].kind),
            "second_kind": KIND_NAMES.index(subjects[1].kind) if two else -1,
            "word": scene.words[0],
            "second_word": scene.words[1] if two else "",
            "absent_kind": scene.absent,
            "background": BACKGROUND_NAMES.index(scene.background),
        }

    def plan(self, index: int) -> Scene:
        """Choose the contents and the caption of scene `index`, without composing its image.

        The order of the random numbers decides what a seed's scenes are: models were trained on these, so keep it.
        """
        rng = np.random.default_rng((self.seed, index))
        background = BACKGROUND_NAMES[rng.integers(len(BACKGROUND_NAMES))]
        two = rng.random() < self.two_subjects
        relation = _choose(rng, tuple(RELATIONS), [share for _, share in RELATIONS.values()]) if two else None
        size = ("small", "big")[rng.integers(2)] if not two and rng.random() < self.sized else None
        style = tuple(STYLES)[rng.integers(len(STYLES))] if rng.random() < self.styled else None

        # Choose the kinds, and one more that is absent.
        chosen = rng.choice(len(self.kinds), 3 if two else 2, replace=False, p=self.kind_shares)
        *present, absent = [self.kinds[k] for k in chosen]
        subjects = self._choose_subjects(rng, [kind.name for kind in present], relation, size)
        words = [kind.words[0] if rng.random() < 0.8 else kind.words[-1] for kind in present]
        variant = int(rng.integers(VARIANTS_PER_BACKGROUND))
        scene = Scene(background, variant, subjects, words, absent.name, style)

        if two and self.close_ups and rng.random() < self.close_ups:
            scene.close_up = int(rng.integers(2))
            scene.words = [words[scene.close_up]]
        scene.caption = self._write_caption(rng, scene, relation, size)
        return scene

    def _choose_appearance(self, rng: np.random.Generator) -> Appearance:
        colors = rng.permutation(list(COLORS))
        if rng.random() < self.patterned:
            first = str(colors[0]) if rng.random() < 0.7 else None
            return Appearance(first, PATTERNS[rng.integers(len(PATTERNS))], str(colors[1]))
        return Appearance(str(colors[0])) if rng.random() < self.colored else Appearance()

    def _choose_subjects(self, rng: np.random.Generator, kinds: Sequence[str], relation: str | None,
                         size: str | None) -> list[SceneSubject]:
        layout = RELATIONS[relation][0] if relation else (((0.5, 0.55), SIZES.get(size, EXTENT)),)
        freedom = 0.4 if relation else 1.0  # two subjects must not overlap
        subjects = []
        for kind, ((x, y), extent) in zip(kinds, layout, strict=True):
            available = self.sprite_sets[kind]
            subjects.append(SceneSubject(
                kind,
                available[rng.integers(len(available))],
                self._choose_appearance(rng),
                center=(x + freedom * self._offset(rng, 0.07), y + freedom * self._offset(rng, 0.05)),
                extent=extent * (1 + freedom * self._offset(rng, 0.12)),
                angle=self._offset(rng, 8),
                flip=bool(rng.random() < self.flips),
                phase=int(rng.integers(4)) / 18))
        return subjects

    def _offset(self, rng: np.random.Generator, spread: float) -> float:
        return self.jitter * rng.uniform(-spread, spread)

    def _write_caption(self, rng: np.random.Generator, scene: Scene, relation: str | None, size: str | None) -> str:
        if rng.random() < self.empty_caption:
            return ""
        bind = bool(self.attribute_captions) and rng.random() < self.attribute_captions
        phrases = [_noun_phrase(rng, subject.appearance, word, size, self.second_colors, bind)
                   for subject, word in zip(scene.visible_subjects, scene.words, strict=True)]
        template = scene.style or _choose(rng, PLAIN_TEMPLATES, TEMPLATE_SHARES)
        caption = template.format(f" {relation} ".join(phrases))
        if rng.random() < 0.08:  # some captions do not name the background
            return caption
        _, phrases = BACKGROUNDS[scene.background]
        return f"{caption} {phrases[rng.integers(len(phrases))]}"


def _check_names(param: str, what: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UserError(f"{param}: there is no {what} {unknown[0]!r}; choose from {', '.join(known)}")


def _prefer(available: list[str], preferred: Sequence[str] | None) -> list[str]:
    """Return the available sets that are preferred; all if none is, or if `preferred` is None."""
    return [emoji_set for emoji_set in available if preferred is None or emoji_set in preferred] or available


def _choose(rng: np.random.Generator, options: Sequence[str], shares: Sequence[float]) -> str:
    return options[rng.choice(len(options), p=shares)]


def _noun_phrase(rng: np.random.Generator, appearance: Appearance, word: str, size: str | None, second_colors: float,
                 bind: bool) -> str:
    """Return a subject's word with its article and most of its attributes. What no caption names, a model varies."""
    named = [attribute for attribute in (size, appearance.color, appearance.pattern)
             if attribute and rng.random() < 0.8]
    names_both = named[-2:] == [appearance.color, appearance.pattern]
    if second_colors and appearance.second_color and names_both and rng.random() < second_colors:
        named[-1:] = ["and", appearance.second_color, appearance.pattern]
    if bind:
        attributes = [attribute for attribute in named if attribute != size]
        named = named[:len(named) - len(attributes)]
        word = bind_attributes(" ".join(attributes), word)
    return with_article(" ".join([*named, word]))
