"""Does it bear the concept's own marks? On the mini world that can be recognised.

What is an example concept's own is its kind and its look: a teddy bear with purple and yellow stripes. Real scenes can
be composed of every kind in every look, in places that no photo of a concept shows; the mean description of such
scenes is a prototype. There are prototypes of each concept's kind in its own colours, in each single colour and in the
looks of all concepts, each twice: of the drawings that models know, and of the held-out drawing that the concept's
photos show. A picture bears a concept's marks where the nearest of all prototypes is of its kind in its look; whether
it is that very drawing as well is told apart. A thing beside another is looked for in its window, and there are
prototypes of windows.

A description is the embedding of a CLIP, which tells kinds, beside the colours of the picture, which tell looks: by
the embedding alone, of known drawings in a concept's look only 55 in 100 real scenes are taken for that look. Near is
meant as in Fisher's discriminant ("The Use of Multiple Measurements in Taxonomic Problems", 1936): directions in which
scenes of one and the same thing differ count less, among them the colours of places.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation.mini.world_prompts import window_at
from ldm.data.images import to_tensor
from ldm.data.mini.example_concepts import CONCEPTS, PHOTO_PLACES
from ldm.data.mini.scenes import (
    BACKGROUNDS_PER_PLACE,
    EXTENT,
    PLACE_NAMES,
    RELATIONS,
    SIDE_BY_SIDE,
    Look,
    Thing,
    compose,
)
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import COLOURS, KIND_NAMES, PATTERNS, drawings_of

FREE_PLACES = tuple(place for place in PLACE_NAMES if place not in PHOTO_PLACES)
PROTOTYPE_SEED, CEILING_SEED = 1, 2
RIDGE = 0.1  # of the covariance within a class, in units of its mean eigenvalue: pictures to look at are no real scenes
SHADES, SOFTNESS = 4, 0.3  # of each of red, green and blue in [-1, 1]; a colour counts for the shades next to it, too
MARGIN = 8  # an eighth of the picture on every side is the place's
SHOWN = {True: "concepts", False: "known drawings in their looks,"}  # in real scenes, by `Identity.held_out`
WHERE, OTHERS = ("alone", "beside another thing"), "others taken for a concept"
Spot = tuple[float, float]


@dataclass(frozen=True)
class Identity:
    """Something to tell apart: a kind in a look, by the drawings that models know or by the one that was held out."""

    kind: str
    look: Look
    held_out: bool

    @property
    def concept(self) -> str | None:
        """Name of the concept whose marks it bears, if any."""
        return next((name for name, marks in CONCEPTS.items() if marks == (self.kind, self.look)), None)

    @property
    def label(self) -> str:
        """Such as "teddy bear, purple", and "held out" behind it where it is the drawing of a concept's photos."""
        worn = [part for part in (self.look.colour, self.look.pattern, self.look.second) if part] or ["plain"]
        return f"{self.kind}, {' '.join(worn)}{', held out' if self.held_out else ''}"

    @property
    def drawings(self) -> list[str]:
        return drawings_of(self.kind, self.held_out)


def itself(name: str) -> Identity:
    """The very thing that the photos of an example concept show."""
    return Identity(*CONCEPTS[name], held_out=True)


def identities() -> list[Identity]:
    """The kinds of all concepts in all looks: their own colours, each single colour, and those of the concepts."""
    looks = [Look(), *map(Look, COLOURS), *(look for _, look in CONCEPTS.values())]
    return [Identity(kind, look, held_out) for kind, _ in CONCEPTS.values() for look in looks
            for held_out in (False, True)]


def spot_of(prompt: str) -> Spot | None:
    """Where the thing that a prompt names first stands beside another; None where it is alone."""
    found = [spots[0][0] for relation, (spots, _) in RELATIONS.items() if f" {relation} " in prompt]
    return found[0] if found else None


def leaves_marks(prompt: str) -> bool:
    """Whether a prompt leaves a concept its colours: it asks for none, and for no style."""
    styled = any(prompt.startswith(style.partition("{}")[0]) for style in STYLES)
    return not styled and not {*COLOURS, *PATTERNS} & set(prompt.split())


def scene(identity: Identity, rng: np.random.Generator, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: a real picture with nothing else in it."""
    thing = _thing(identity, rng, (0.5, 0.55), EXTENT, 1.0)
    return _composed([thing], rng, size)


def window(identity: Identity, rng: np.random.Generator, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: its window in a real picture in which it stands beside a thing of another kind."""
    spots = SIDE_BY_SIDE if rng.random() < 0.5 else SIDE_BY_SIDE[::-1]
    kinds = [name for name in KIND_NAMES if name != identity.kind and drawings_of(name)]
    other = Identity(kinds[rng.integers(len(kinds))], Look(), held_out=False)
    things = [_thing(one, rng, *spot, 0.4) for one, spot in zip((identity, other), spots, strict=True)]
    return window_at(_composed(things, rng, size), spots[0][0])


def pair(first: str, second: str, place: str | None, rng: np.random.Generator, size: int) -> Tensor:
    """(3, size, size) in [-1, 1]: a real picture of two concepts, that named first on the left; None: at any place."""
    both = [itself(name) for name in (first, second)]
    things = [_thing(one, rng, *spot, 0.4) for one, spot in zip(both, SIDE_BY_SIDE, strict=True)]
    return _composed(things, rng, size, place)


def _thing(identity: Identity, rng: np.random.Generator, centre: Spot, extent: float, loose: float) -> Thing:
    shift, drawings = rng.uniform(-0.03, 0.03, 2) * loose, identity.drawings
    return Thing(identity.kind, drawings[rng.integers(len(drawings))], identity.look,
                 (centre[0] + shift[0], centre[1] + shift[1]), extent * rng.uniform(0.9, 1.1),
                 float(rng.uniform(-6, 6)))


def _composed(things: Sequence[Thing], rng: np.random.Generator, size: int, place: str | None = None) -> Tensor:
    place = place or FREE_PLACES[rng.integers(len(FREE_PLACES))]
    return to_tensor(compose(place, int(rng.integers(BACKGROUNDS_PER_PLACE)), things, size)[0])


def colours(pictures: Tensor) -> Tensor:
    """(N, 64), of length 1: how much of the middle of each picture (N, 3, H, W) in [-1, 1] has which colour.

    Shares of 4 x 4 x 4 shades, and of them the square roots, whose distances are Hellinger's.
    """
    height, width = pictures.shape[-2:]
    inner = pictures[..., height // MARGIN:height - height // MARGIN, width // MARGIN:width - width // MARGIN]
    smooth = F.avg_pool2d(inner, 2).flatten(2)
    shades = torch.linspace(-1, 1, SHADES, device=pictures.device)
    nearness = (-(smooth[..., None] - shades) ** 2 / (2 * SOFTNESS**2)).softmax(-1)
    shares = torch.einsum("npr,npg,npb->nrgb", *nearness.unbind(1)).flatten(1) / smooth.shape[-1]
    return shares.sqrt()


class Prototypes:
    """Classes by some embeddings of each, and what is nearest to one of them.

    Args:
        embeddings: (C, n, d), n of each class.
    """

    def __init__(self, embeddings: Tensor) -> None:
        means = embeddings.mean(1)
        within = (embeddings - means[:, None]).flatten(0, 1)
        covariance = within.T @ within / len(within)
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
        values, vectors = torch.linalg.eigh(covariance + ridge)
        self.whitening = vectors / values.sqrt()
        self.means = means @ self.whitening

    def nearest(self, embeddings: Tensor) -> Tensor:
        """(N,) the class of each of (N, d) embeddings."""
        return torch.cdist(embeddings @ self.whitening, self.means).argmin(1)


class Marks:
    """Recognises example concepts.

    Args:
        embedder: has `embed_images` as `evaluation.mini.recognise.ClipEncoder` does.
        size: side of the scenes in pixels, that of the pictures to look at.
        scenes: how many there are of each identity, alone and in windows.
    """

    def __init__(self, embedder: Any, size: int = 64, scenes: int = 32) -> None:
        self.embedder, self.size = embedder, size
        self.identities = identities()
        whole, cut = zip(*tqdm(self._embedded(scenes, PROTOTYPE_SEED), desc="prototypes", leave=False, disable=None,
                               total=len(self.identities)), strict=True)
        self.whole, self.cut = Prototypes(torch.stack(whole)), Prototypes(torch.stack(cut))

    def nearest(self, pictures: Tensor, spots: Sequence[Spot | None]) -> list[Identity]:
        """What each picture (N, 3, H, W) in [-1, 1] shows, or shows at its spot."""
        if not len(pictures):
            return []
        shown = torch.stack([picture if spot is None else window_at(picture, spot)
                             for picture, spot in zip(pictures, spots, strict=True)])
        seen, alone = self._described(shown), torch.tensor([spot is None for spot in spots])
        rows = torch.where(alone, self.whole.nearest(seen), self.cut.nearest(seen))
        return [self.identities[row] for row in rows.tolist()]

    def both(self, pictures: Tensor) -> list[tuple[Identity, Identity]]:
        """What stands left and right in each picture (N, 3, H, W) in [-1, 1]."""
        left, right = (self.nearest(pictures, [spot] * len(pictures)) for (spot, _) in SIDE_BY_SIDE)
        return list(zip(left, right, strict=True))

    def ceilings(self, scenes: int = 4) -> dict[str, list[float]]:
        """100 or 0 for each of some real scenes: marks recognised on the concept itself and on known drawings in its
        look, alone, in a window and both of a pair; others taken for a concept."""
        hits: dict[str, list[float]] = {f"{shown} {where}": [] for shown in SHOWN.values() for where in WHERE}
        hits[OTHERS] = []
        for one, embedded in zip(self.identities, self._embedded(scenes, CEILING_SEED), strict=True):
            for prototypes, rows, where in zip((self.whole, self.cut), embedded, WHERE, strict=True):
                seen = [self.identities[row].concept for row in prototypes.nearest(rows).tolist()]
                if one.concept is None:
                    hits[OTHERS] += [100.0 * (each is not None) for each in seen]
                else:
                    hits[f"{SHOWN[one.held_out]} {where}"] += [100.0 * (each == one.concept) for each in seen]
        return {**hits, "two concepts side by side, both": list(self._both_hits(scenes))}

    def _both_hits(self, scenes: int) -> Iterator[float]:
        """100 or 0 for each of some real scenes of each concept and the next one."""
        names = list(CONCEPTS)
        for number, both in enumerate(zip(names, names[1:] + names[:1], strict=True)):
            rng = np.random.default_rng((CEILING_SEED, len(self.identities) + number))
            made = torch.stack([pair(*both, None, rng, self.size) for _ in range(scenes)])
            yield from (100.0 * ({one.concept for one in seen} == {*both}) for seen in self.both(made))

    def _embedded(self, scenes: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each identity descriptions (scenes, d) of it alone and of its windows."""
        for number, identity in enumerate(self.identities):
            rng = np.random.default_rng((seed, number))
            made = [draw(identity, rng, self.size) for draw in (scene, window) for _ in range(scenes)]
            yield self._described(torch.stack(made)).chunk(2)

    def _described(self, pictures: Tensor) -> Tensor:
        """(N, d): what a CLIP sees in pictures (N, 3, H, W) in [-1, 1], and their colours; both of length 1."""
        return torch.cat([self.embedder.embed_images(pictures), colours(pictures)], 1)
