"""Whether a concept that stands beside another subject is still of its own kind, among all kinds of the mini world.

A concept that was learned with the layout of its photos can lose its shape where an image has two subjects. A zero-shot
CLIP cannot tell this from likeness: it recognizes the kind of a held-out sprite, such as the one in the photos, in only
a quarter of real scenes. So the window of the subject is classified by prototypes (see `evaluation.mini.fidelity`) of
every kind in its usual look, of every kind in the look of the concept, and of the sprite in the concept's photos.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.mini.fidelity import ExampleSubject, Position, Prototypes, compose_window, example_subject
from evaluation.mini.world_prompts import window_at
from ldm.data.mini.example_concepts import CONCEPTS
from ldm.data.mini.scenes import Appearance
from ldm.data.mini.world import KIND_NAMES, sprite_sets

USUAL_SEED, LOOK_SEED, OWN_SEED, CEILING_SEED = 31, 32, 33, 34
SCENES = 12  # of each class


class OwnKindRecognizer:
    """Recognizes the kind of example concepts beside another subject.

    Args:
        embedder: a `ldm.models.clip_encoder.ClipEncoder`, or another with its `embed_images`.
        size: side of the images to classify, and of the scenes, in pixels.
        kinds: the kinds to choose from; those without sprites are left out.
    """

    def __init__(self, embedder: Any, size: int = 64, kinds: Sequence[str] = KIND_NAMES) -> None:
        self.embedder, self.size = embedder, size
        self.kinds = [kind for kind in kinds if sprite_sets(kind)]
        self._usual: list[Tensor] = []
        self._prototypes: dict[str, tuple[list[str], Prototypes]] = {}

    def is_own_kind(self, concept: str, images: Tensor, positions: Sequence[Position]) -> list[bool]:
        """Return for each image whether the subject at a position is of the concept's kind.

        Args:
            concept: name of an example concept.
            images: (N, 3, H, W) in [-1, 1].
            positions: N positions of the concept's subject.
        """
        if not len(images):
            return []
        kinds, prototypes = self._prototypes_of(concept)
        windows = torch.stack([window_at(image, position) for image, position in zip(images, positions, strict=True)])
        classes = prototypes.classify(self.embedder.embed_images(windows))
        return [kinds[index] == CONCEPTS[concept][0] for index in classes.tolist()]

    def measure_ceiling(self, concept: str, scenes: int = 8) -> list[float]:
        """Return 100 or 0 for each of some real scenes of the concept: whether its kind is recognized."""
        kinds, prototypes = self._prototypes_of(concept)
        classes = prototypes.classify(self._embed(example_subject(concept), (CEILING_SEED, scenes), scenes))
        return [100.0 * (kinds[index] == CONCEPTS[concept][0]) for index in classes.tolist()]

    def _prototypes_of(self, concept: str) -> tuple[list[str], Prototypes]:
        """Return the kinds of all classes, and their prototypes."""
        if not self._usual:
            self._usual = [self._embed(ExampleSubject(kind, Appearance(), False), (USUAL_SEED, index))
                           for index, kind in enumerate(self.kinds)]
        if concept not in self._prototypes:
            own_kind, look = CONCEPTS[concept]
            in_its_look = [self._embed(ExampleSubject(kind, look, False), (LOOK_SEED, index))
                           for index, kind in enumerate(self.kinds)]
            own = self._embed(example_subject(concept), (OWN_SEED,))
            self._prototypes[concept] = ([*self.kinds, *self.kinds, own_kind],
                                         Prototypes(torch.stack([*self._usual, *in_its_look, own])))
        return self._prototypes[concept]

    def _embed(self, subject: ExampleSubject, seed: tuple[int, ...], scenes: int = SCENES) -> Tensor:
        """Embed windows of scenes in which the subject stands beside another one: (scenes, d)."""
        rng = np.random.default_rng(seed)
        return self.embedder.embed_images(torch.stack([compose_window(subject, rng, self.size)
                                                       for _ in range(scenes)]))
