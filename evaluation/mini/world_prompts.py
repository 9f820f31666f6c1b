"""What the base model is asked to draw, and how what comes out is recognised: kinds of things and places.

Prompts are captions of `SceneDataset` for scenes of plain things in their own colours. Since captions are put together
from few words, training has seen most of such captions; the pictures are held out by their seeds, and the scenes that
ceilings are measured on by seeds that no training used and, of drawings that no model was shown, by those as well.

A thing alone is looked for in the whole picture. Of two things, each is looked for in its own window: the picture is
cut where the prompt says that they are (two squares side by side, or one above the other), and both count as recognised
where the two windows are recognised as the two kinds, whichever is where. Real scenes are cut in the same way.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.mini.recognise import closest
from ldm.data.images import to_tensor
from ldm.data.mini.backgrounds import PLACES
from ldm.data.mini.scenes import (
    PLACE_NAMES,
    PLAIN_TEMPLATES,
    RELATIONS,
    Scene,
    SceneDataset,
    close_up_box,
    compose,
    with_article,
)
from ldm.data.mini.world import KIND_NAMES, KINDS

WORLD = Path(__file__).resolve().parents[2] / "configs" / "mini" / "text2img.yaml"
FIRST_SEED = 10_000  # of scenes here; the seeds of training and validation in configs/mini/ lie below
PLAIN = {"coloured": 0.0, "patterned": 0.0, "sized": 0.0, "styled": 0.0, "empty_caption": 0.0}


@dataclass(frozen=True)
class Asked:
    """A prompt with the seed to draw it from, what has to be in the picture, and the scene it describes.

    Attributes:
        kinds: names of one kind or two.
        place: None where the prompt does not say.
    """

    prompt: str
    seed: int
    kinds: tuple[str, ...]
    place: str | None
    scene: Scene


def scenes(seed: int, things: int, held_out: bool = False) -> SceneDataset:
    """Plain scenes as the text-to-image model is trained to draw them, with one thing or two in each."""
    world = OmegaConf.to_container(OmegaConf.load(WORLD).data.params.validation.params, resolve=True)
    kept = {key: value for key, value in world.items() if key not in ("seed", "length", "held_out", "two_things")}
    return SceneDataset(**{**kept, **PLAIN}, seed=FIRST_SEED + seed, two_things=float(things == 2), held_out=held_out)


def asked(count: int, seed: int, things: int, held_out: bool = False) -> list[Asked]:
    """`count` prompts with the scenes they describe; a seed gives the same ones on every machine."""
    source = scenes(seed, things, held_out)
    return [_asked(source.plan(index), 1000 * seed + index) for index in range(count)]


def _asked(scene: Scene, seed: int) -> Asked:
    place = scene.place if scene.caption.endswith(PLACES[scene.place][1]) else None
    return Asked(scene.caption, seed, tuple(thing.kind for thing in scene.things), place, scene)


def real_pictures(wanted: Sequence[Asked], size: int = 64) -> Tensor:
    """(N, 3, size, size) in [-1, 1]: the scenes that the prompts describe."""
    return torch.stack([to_tensor(compose(a.scene.place, a.scene.variant, a.scene.things, size, a.scene.style)[0])
                        for a in wanted])


def kind_texts() -> list[list[str]]:
    """For each kind its texts: all its words in every plain template, and as a photo in every place."""
    templates = [*PLAIN_TEMPLATES, *(f"{PLAIN_TEMPLATES[0]} {wheres[0]}" for _, wheres in PLACES.values())]
    return [[template.format(with_article(word)) for word in kind.words for template in templates] for kind in KINDS]


def place_texts() -> list[list[str]]:
    """For each place its texts: all that is said of it, with a photo of every kind there."""
    return [[f"a photo of {with_article(name)} {where}" for name in KIND_NAMES for where in wheres]
            for _, wheres in PLACES.values()]


def windows(pictures: Tensor, wanted: Sequence[Asked]) -> Tensor:
    """(2 N, 3, H, W): of each picture (N, 3, H, W) the windows of the things named first and second, enlarged."""
    return torch.stack([window_at(picture, centre) for picture, one in zip(pictures, wanted, strict=True)
                        for centre in _spots(one.scene)])


def _spots(scene: Scene) -> list[tuple[float, float]]:
    """Where two things are meant to stand, without the small shifts of this scene."""
    middles = [thing.centre for thing in scene.things]
    layouts = [spots for spots, _ in RELATIONS.values()]
    best = min(layouts, key=lambda spots: sum((x - a) ** 2 + (y - b) ** 2
                                              for (x, y), ((a, b), _) in zip(middles, spots, strict=True)))
    return [centre for centre, _ in best]


def window_at(picture: Tensor, centre: tuple[float, float]) -> Tensor:
    """(3, H, W): the window of a picture (3, H, W) around a spot of it, (x, y) in [0, 1], enlarged to the whole."""
    height, width = picture.shape[-2:]
    left, top, right, bottom = close_up_box(centre, width, height)
    part = picture[None, :, top:bottom, left:right]
    return F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0].clamp(-1, 1)


@dataclass(frozen=True)
class Answers:
    """What was recognised in the pictures of some prompts; of two things, in the order of the words."""

    kinds: list[tuple[str, ...]]
    places: list[str]

    def kind_hits(self, wanted: Sequence[Asked]) -> list[float]:
        """100 for each picture in which all kinds are recognised, else 0."""
        return [100.0 * (sorted(found) == sorted(one.kinds)) for found, one in zip(self.kinds, wanted, strict=True)]

    def place_hits(self, wanted: Sequence[Asked]) -> list[float]:
        """100 or 0 for each picture whose prompt names a place."""
        return [100.0 * (found == one.place) for found, one in zip(self.places, wanted, strict=True) if one.place]

    def records(self, wanted: Sequence[Asked], pictures: str) -> list[dict[str, Any]]:
        """A line for a CSV file for each picture."""
        return [{"pictures": pictures, "prompt": one.prompt, "seed": one.seed, "kinds": " + ".join(one.kinds),
                 "recognised": " + ".join(kinds), "place": one.place or "", "recognised place": place}
                for one, kinds, place in zip(wanted, self.kinds, self.places, strict=True)]


class WorldRecogniser:
    """Recognises the kinds and the places of the mini world by the embeddings of a CLIP.

    Args:
        embedder: has `embed_images` and `embed_classes` as `evaluation.mini.recognise.ClipEncoder` does.
    """

    def __init__(self, embedder: Any) -> None:
        self.embedder = embedder

    @functools.cached_property
    def kinds(self) -> Tensor:
        """(100, d), one embedding for each kind; not everyone who asks for places asks for them."""
        return self.embedder.embed_classes(kind_texts(), "texts about kinds")

    @functools.cached_property
    def places(self) -> Tensor:
        """(20, d), one embedding for each place."""
        return self.embedder.embed_classes(place_texts(), "texts about places")

    def places_in(self, pictures: Tensor) -> list[str]:
        """Where pictures (N, 3, H, W) in [-1, 1] are."""
        return self._nearest_places(self.embedder.embed_images(pictures))

    def answers(self, pictures: Tensor, wanted: Sequence[Asked]) -> Answers:
        """What is in pictures (N, 3, H, W) in [-1, 1] of N prompts, all with one thing or all with two."""
        whole = self.embedder.embed_images(pictures)
        things = len(wanted[0].kinds)
        parts = whole if things == 1 else self.embedder.embed_images(windows(pictures, wanted))
        kinds = [KIND_NAMES[number] for number in closest(parts, self.kinds).tolist()]
        return Answers([tuple(kinds[i:i + things]) for i in range(0, len(kinds), things)], self._nearest_places(whole))

    def _nearest_places(self, embeddings: Tensor) -> list[str]:
        return [PLACE_NAMES[number] for number in closest(embeddings, self.places).tolist()]
