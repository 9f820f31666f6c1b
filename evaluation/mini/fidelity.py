"""Subject fidelity: whether images show an example concept with its own attributes. Only the mini world can tell.

The attributes of an example concept are its kind and its appearance, such as a teddy bear with purple and yellow
stripes. Scenes can be composed of every kind in every appearance, on backgrounds that no photo of a concept shows. The
mean descriptor of such scenes is a prototype. There are prototypes of each concept's kind in the sprites' own colors,
in each single color and in the appearances of all concepts; each for the sprites that models were trained on, and for
the held-out sprite in the concept's photos. An image matches a concept's attributes if the nearest of all prototypes
has its kind and its appearance. It matches exactly if the prototype is also of the held-out sprite. A subject beside
another is classified in its window, by prototypes of windows.

A descriptor is the embedding of a CLIP, which distinguishes kinds, beside a color histogram, which distinguishes
appearances. (By the embedding alone, only 55 of 100 scenes with trained sprites in a concept's appearance are
classified as that appearance.) The distance is that of Fisher's discriminant ("The Use of Multiple Measurements in
Taxonomic Problems", 1936): directions in which scenes of the same class differ count less, among them the colors of
backgrounds.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.mini.world_prompts import window_at
from ldm.common.progress import show_progress
from ldm.data.images import to_tensor
from ldm.data.mini.example_concepts import CONCEPTS, PHOTO_BACKGROUNDS
from ldm.data.mini.scenes import (
    BACKGROUND_NAMES,
    EXTENT,
    RELATIONS,
    SIDE_BY_SIDE,
    VARIANTS_PER_BACKGROUND,
    Appearance,
    SceneSubject,
    compose,
)
from ldm.data.mini.styles import STYLES
from ldm.data.mini.world import COLORS, KIND_NAMES, PATTERNS, sprite_sets
from ldm.modules.color_shares import color_shares

UNSEEN_BACKGROUNDS = tuple(name for name in BACKGROUND_NAMES if name not in PHOTO_BACKGROUNDS)
PROTOTYPE_SEED, CEILING_SEED = 1, 2
RIDGE = 0.1  # of the within-class covariance, in units of its mean eigenvalue: generated images differ from scenes
BORDER = 8  # an eighth of the image on every side shows the background
# Names of the ceilings.
SPRITES = {True: "concepts", False: "trained sprites in their appearances,"}  # by `ExampleSubject.held_out`
ALONE, BESIDE = "alone", "beside another subject"
OTHERS = "others classified as a concept"
PAIRS = "two concepts side by side, both"
Position = tuple[float, float]


@dataclass(frozen=True)
class ExampleSubject:
    """A class of subjects: a kind in an appearance, with the sprites of training or with the held-out one."""

    kind: str
    appearance: Appearance
    held_out: bool

    @property
    def concept(self) -> str | None:
        """Name of the concept with this kind and appearance, if any."""
        return next((name for name, attributes in CONCEPTS.items() if attributes == (self.kind, self.appearance)), None)

    @property
    def label(self) -> str:
        """Such as "teddy bear, purple", followed by ", held out" if it has the held-out sprite."""
        look = self.appearance
        attributes = [attribute for attribute in (look.color, look.pattern, look.second_color) if attribute]
        return f"{self.kind}, {' '.join(attributes or ['plain'])}{', held out' if self.held_out else ''}"

    @property
    def emoji_sets(self) -> list[str]:
        """The emoji sets of its sprites."""
        return sprite_sets(self.kind, self.held_out)


def example_subject(name: str) -> ExampleSubject:
    """Return the class of the subject in the photos of an example concept."""
    return ExampleSubject(*CONCEPTS[name], held_out=True)


def candidate_subjects() -> list[ExampleSubject]:
    """Return all classes: the kinds of all concepts in their own colors, in each color and as each concept looks."""
    appearances = [Appearance(), *map(Appearance, COLORS), *(appearance for _, appearance in CONCEPTS.values())]
    subjects = []
    for kind, _ in CONCEPTS.values():
        for appearance in appearances:
            subjects += [ExampleSubject(kind, appearance, held_out) for held_out in (False, True)]
    return subjects


def first_subject_position(prompt: str) -> Position | None:
    """Return the position of the subject that a prompt names first, if it names another one; None if it is alone."""
    positions = [layout[0][0] for relation, (layout, _) in RELATIONS.items() if f" {relation} " in prompt]
    return positions[0] if positions else None


def keeps_attributes(prompt: str) -> bool:
    """Return whether a prompt leaves a concept its own colors: it names no color, pattern or style."""
    styled = any(prompt.startswith(style.partition("{}")[0]) for style in STYLES)
    return not styled and not {*COLORS, *PATTERNS} & set(prompt.split())


def compose_alone(subject: ExampleSubject, rng: np.random.Generator, size: int) -> Tensor:
    """Compose a scene (3, size, size) in [-1, 1] of this subject alone."""
    return _compose([_scene_subject(subject, rng, (0.5, 0.55), EXTENT, 1.0)], rng, size)


def compose_window(subject: ExampleSubject, rng: np.random.Generator, size: int) -> Tensor:
    """Compose a scene of this subject beside another kind, and return its window (3, size, size) in [-1, 1]."""
    layout = SIDE_BY_SIDE if rng.random() < 0.5 else SIDE_BY_SIDE[::-1]
    kinds = [name for name in KIND_NAMES if name != subject.kind and sprite_sets(name)]
    other = ExampleSubject(kinds[rng.integers(len(kinds))], Appearance(), held_out=False)
    return window_at(compose_two((subject, other), rng, size, layout), layout[0][0])


def compose_two(subjects: Sequence[ExampleSubject], rng: np.random.Generator, size: int,
                layout: Sequence[tuple[Position, float]] = SIDE_BY_SIDE, background: str | None = None) -> Tensor:
    """Compose a scene (3, size, size) in [-1, 1] of two subjects.

    Args:
        layout: position and extent of each; the first one is on the left if it is not given.
        background: None: a random one that no photo shows.
    """
    scene_subjects = [_scene_subject(subject, rng, *spot, 0.4) for subject, spot in zip(subjects, layout, strict=True)]
    return _compose(scene_subjects, rng, size, background)


def compose_pair(first: str, second: str, background: str | None, rng: np.random.Generator, size: int) -> Tensor:
    """Compose a scene of two concepts, the first one on the left; arguments and result as for `compose_two`."""
    return compose_two([example_subject(name) for name in (first, second)], rng, size, background=background)


def _scene_subject(subject: ExampleSubject, rng: np.random.Generator, center: Position, extent: float, freedom: float
           ) -> SceneSubject:
    """Choose a sprite of a class, and a position and extent near those given."""
    offset = rng.uniform(-0.03, 0.03, 2) * freedom
    emoji_sets = subject.emoji_sets
    return SceneSubject(subject.kind, emoji_sets[rng.integers(len(emoji_sets))], subject.appearance,
                        (center[0] + offset[0], center[1] + offset[1]), extent * rng.uniform(0.9, 1.1),
                        float(rng.uniform(-6, 6)))


def _compose(subjects: Sequence[SceneSubject], rng: np.random.Generator, size: int, background: str | None = None
             ) -> Tensor:
    background = background or UNSEEN_BACKGROUNDS[rng.integers(len(UNSEEN_BACKGROUNDS))]
    image, _ = compose(background, int(rng.integers(VARIANTS_PER_BACKGROUND)), subjects, size)
    return to_tensor(image)


def color_histogram(images: Tensor) -> Tensor:
    """Return the square roots of a soft color histogram of each image's middle. Their distances are Hellinger's.

    Args:
        images: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, 64), of length 1: 4 x 4 x 4 levels of red, green and blue.
    """
    height, width = images.shape[-2:]
    middle = images[..., height // BORDER:height - height // BORDER, width // BORDER:width - width // BORDER]
    return color_shares(F.avg_pool2d(middle, 2).flatten(2))


class Prototypes:
    """Classifies vectors by the nearest class mean, in the metric of Fisher's discriminant.

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

    def classify(self, embeddings: Tensor) -> Tensor:
        """Return the class of each of (N, d) embeddings, as indices (N,)."""
        return torch.cdist(embeddings @ self.whitening, self.means).argmin(1)


class SubjectFidelity:
    """Recognizes example concepts by their attributes.

    Args:
        embedder: a `ldm.models.clip_encoder.ClipEncoder`, or another with its `embed_images`.
        size: side of the images to classify, and of the scenes, in pixels.
        scenes: number of scenes of each class, alone and in windows.
    """

    def __init__(self, embedder: Any, size: int = 64, scenes: int = 32) -> None:
        self.embedder, self.size = embedder, size
        self.subjects = candidate_subjects()
        progress = show_progress(self._scene_descriptors(scenes, PROTOTYPE_SEED), len(self.subjects), "prototypes")
        alone, windows = zip(*progress, strict=True)
        self.alone, self.windows = Prototypes(torch.stack(alone)), Prototypes(torch.stack(windows))

    def classify(self, images: Tensor, positions: Sequence[Position | None]) -> list[ExampleSubject]:
        """Return what each image shows, as a whole or at a position.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            positions: N positions of a subject beside another one; None for a subject alone.
        """
        if not len(images):
            return []
        crops = torch.stack([image if position is None else window_at(image, position)
                             for image, position in zip(images, positions, strict=True)])
        descriptors = self._describe(crops)
        is_alone = torch.tensor([position is None for position in positions])
        classes = torch.where(is_alone, self.alone.classify(descriptors), self.windows.classify(descriptors))
        return [self.subjects[index] for index in classes.tolist()]

    def classify_pairs(self, images: Tensor) -> list[tuple[ExampleSubject, ExampleSubject]]:
        """Return what each image (N, 3, H, W) in [-1, 1] shows on the left and on the right."""
        left, right = (self.classify(images, [position] * len(images)) for position, _ in SIDE_BY_SIDE)
        return list(zip(left, right, strict=True))

    def measure_ceilings(self, scenes: int = 4) -> dict[str, list[float]]:
        """Classify composed scenes, which no generated image can be expected to beat.

        Args:
            scenes: number of scenes of each class.

        Returns:
            Name of a ceiling -> 100 or 0 for each scene: whether the attributes are recognized in the concept itself
            and in trained sprites with its appearance, alone, in a window and in both of a pair; and whether other
            classes are taken for a concept.
        """
        hits: dict[str, list[float]] = {
            f"{sprites} {where}": [] for sprites in SPRITES.values() for where in (ALONE, BESIDE)}
        hits[OTHERS] = []
        for subject, (alone, windows) in zip(
                self.subjects, self._scene_descriptors(scenes, CEILING_SEED), strict=True):
            for prototypes, descriptors, where in ((self.alone, alone, ALONE), (self.windows, windows, BESIDE)):
                concepts = [self.subjects[index].concept for index in prototypes.classify(descriptors).tolist()]
                if subject.concept is None:
                    hits[OTHERS] += [100.0 * (concept is not None) for concept in concepts]
                else:
                    name = f"{SPRITES[subject.held_out]} {where}"
                    hits[name] += [100.0 * (concept == subject.concept) for concept in concepts]
        hits[PAIRS] = list(self._pair_hits(scenes))
        return hits

    def _pair_hits(self, scenes: int) -> Iterator[float]:
        """Yield 100 or 0 for each of some scenes of each concept and the next one."""
        names = list(CONCEPTS)
        for index, pair in enumerate(zip(names, names[1:] + names[:1], strict=True)):
            rng = np.random.default_rng((CEILING_SEED, len(self.subjects) + index))
            images = torch.stack([compose_pair(*pair, None, rng, self.size) for _ in range(scenes)])
            for recognized in self.classify_pairs(images):
                yield 100.0 * ({subject.concept for subject in recognized} == {*pair})

    def _scene_descriptors(self, scenes: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield descriptors (scenes, d) of each class alone, and of its windows."""
        for index, subject in enumerate(self.subjects):
            rng = np.random.default_rng((seed, index))
            images = [compose_alone(subject, rng, self.size) for _ in range(scenes)]
            images += [compose_window(subject, rng, self.size) for _ in range(scenes)]
            yield self._describe(torch.stack(images)).chunk(2)

    def _describe(self, images: Tensor) -> Tensor:
        """Return descriptors (N, d) of images (N, 3, H, W): CLIP embedding and color histogram, both of length 1."""
        return torch.cat([self.embedder.embed_images(images), color_histogram(images)], 1)
