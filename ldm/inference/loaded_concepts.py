"""The concepts that a pipeline has loaded: from files, from values, or predicted from photos."""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.fingerprint import check_base
from ldm.concepts.storage import read_concepts
from ldm.inference.encoding import base_model_of
from ldm.inference.model_config import DEFAULT_SEGMENTER, InferenceDefaults, segmenter_of

if TYPE_CHECKING:
    from ldm.inference.photo_concepts import PhotoReader


class LoadedConcepts:
    """Base class of the pipeline: loads and unloads concepts.

    Args:
        model: a text-to-image `LatentDiffusion`.
        config: its config, if it is known.
        defaults: what suits the model.

    Attributes:
        concepts: the loaded concepts.
    """

    def __init__(self, model: Any, config: DictConfig | None, defaults: InferenceDefaults) -> None:
        self.model, self.config, self.defaults = model, config, defaults
        self.concepts: list[AnyConcept] = []
        self._photo_readers: dict[str | None, PhotoReader] = {}

    def load_concepts(self, *concepts: str | Path | AnyConcept) -> list[AnyConcept]:
        """Load concept files, or add `Concept` values, to the concepts that are loaded already.

        If two have the same placeholder, the later one is renamed to `<name-2>`; a log line says so.

        Returns:
            All concepts that are loaded now.

        Raises:
            UserError: a file is not a concept file, or a concept belongs to another base model or method.
        """
        base = base_model_of(self.model)
        merged = read_concepts(concepts, self.concepts)
        for concept in merged:
            check_base(concept, base)
        self.concepts = merged
        return list(merged)

    def load_photos(self, folder: str | Path, super_category: str, placeholder: str = "<it>", *,
                    masks: str | Path | None = None, strength: float | None = None,
                    encoder: str | Path | None = None) -> Concept:
        """Predict a concept from photos in about a second, without training, and add it to the loaded concepts.

            pipe.load_photos("my_drawings/", "teddy bear", "<my-teddy>")
            images = pipe("a photo of a <my-teddy> on the beach").images

        Args:
            folder: 1 to 20 photos of the subject.
            super_category: what kind of subject it is.
            placeholder: its word in prompts.
            masks: folder of masks, white where the subject is; None: the subject is segmented automatically.
            strength: how strong its look is; None: the encoder's own, near 1.
            encoder: folder of the encoder; None: the one that the model's config names.

        Returns:
            The concept, which `ldm.concepts.storage.save_concepts` writes to a file.

        Raises:
            UserError: photos or words cannot be used, the subject is in no photo, or the model has no encoder.
        """
        from ldm.inference.photo_concepts import PhotoReader  # the CLIPs' library takes seconds to load

        name = self.defaults.encoder if encoder is None else str(encoder)
        if name not in self._photo_readers:
            segmenter = DEFAULT_SEGMENTER if self.config is None else segmenter_of(self.config)
            self._photo_readers[name] = PhotoReader(self.model, name, self.defaults.segmenter or segmenter,
                                                    self.defaults.covariance)
        concept = self._photo_readers[name].read(folder, super_category, placeholder, masks, strength)
        self.load_concepts(concept)
        return self.concepts[-1]

    def unload_concepts(self, *placeholders: str) -> None:
        """Unload the concepts with these placeholders, or all concepts if none are given.

        Raises:
            UserError: a placeholder belongs to no loaded concept.
        """
        for word in placeholders:
            if fold_word(word) not in (fold_word(concept.placeholder) for concept in self.concepts):
                raise UserError(f"no loaded concept is called {word}; loaded are "
                                f"{', '.join(concept.placeholder for concept in self.concepts) or 'none'}")
        gone = {fold_word(word) for word in placeholders}
        self.concepts = [concept for concept in self.concepts if gone and fold_word(concept.placeholder) not in gone]
