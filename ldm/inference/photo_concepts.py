"""Predict concepts from folders of photos, without training."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.common.errors import UserError
from ldm.common.words import super_category_words
from ldm.concepts.concept import Concept
from ldm.concepts.model_spec import current_date
from ldm.concepts.trainable_concept import TrainableConcept
from ldm.data.concept_photos import ConceptPhotos
from ldm.inference.encoding import base_model_of, inverse_covariance_of
from ldm.models.concept_encoder import encode_photos, load_concept_encoder
from ldm.modules.attention import name_text_layers
from ldm.modules.noun_encodings import mean_encoding
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.modules.subject_masks import find_subject
from ldm.personalization.checks import check_positive, check_words
from ldm.personalization.concept_names import check_distinct_placeholders
from ldm.personalization.photo_masks import log_summary

NO_MODEL = ("this base model has no encoder of photos (`encoder` in the section `inference` of its config); train a "
            "concept with main.py")


class PhotoReader:
    """Predicts concepts of one base model from photos. Encoder and segmenter are loaded once.

    Args:
        model: a text-to-image `LatentDiffusion`.
        encoder: folder of the encoder.
        segmenter: folder or hub name of a CLIPSeg, for photos without masks.
        covariance: file of the text encoder's covariance C; None: computed from default captions and cached.

    Raises:
        UserError: there is no encoder, or it is of another base model.
    """

    def __init__(self, model: Any, encoder: str | Path | None, segmenter: str, covariance: str | None = None) -> None:
        if encoder is None:
            raise UserError(NO_MODEL)
        self.model, self.segmenter_name = model, segmenter
        self.base_model = base_model_of(model)
        self.encoder = load_concept_encoder(encoder, model.betas.device, self.base_model.fingerprint)
        self.inverse_covariance = inverse_covariance_of(model, covariance)()
        self.text_layers = name_text_layers(model.model.diffusion_model)
        self._segmenter: ZeroShotSegmenter | None = None

    def read(self, folder: str | Path, super_category: str, placeholder: str, masks: str | Path | None = None,
             strength: float | None = None) -> Concept:
        """Return the concept of the subject in a folder's photos. The log says what it looks like.

        Args:
            folder: 1 to 20 photos.
            super_category: what kind of subject it is.
            placeholder: its own word in prompts.
            masks: folder of masks; None: the subject is segmented.
            strength: how far from the super-category; None: the encoder's own.

        Raises:
            UserError: photos, masks or words cannot be used, or the subject is in no photo.
        """
        settings, words = self.encoder.settings, super_category_words(super_category)
        check_distinct_placeholders([placeholder])
        strength = settings.strength if strength is None else strength
        check_positive(strength=strength)
        photos = ConceptPhotos(folder, min(self.model.pixel_size), placeholder_token=placeholder, mask_root=masks,
                               templates=settings.templates)
        text_encoder = self.model.cond_stage_model
        check_words(text_encoder, [photos], [words])
        self._add_masks(photos, words)
        log_summary(photos)
        vector, super_input = mean_encoding(text_encoder, words, photos.templates)
        move = encode_photos(self.encoder, photos, text_encoder, words, super_input)
        concept = TrainableConcept(vector, super_input, self.text_layers)
        concept.start_values_at(super_input + strength * move, self.text_layers)
        return concept.to_concept(
            self.inverse_covariance.to(super_input.device), word_parts=dict(text_encoder.word_parts),
            placeholder=placeholder, super_category=words, bias=settings.bias, temperature=settings.temperature,
            projection=settings.projection, used_layers=list(settings.used_layers), date=current_date(),
            **self.base_model.stored)

    def _add_masks(self, photos: ConceptPhotos, words: str) -> None:
        """Segment the subject in the photos that have no mask."""
        if all(photo.mask is not None for photo in photos.photos):
            return
        if self._segmenter is None:
            self._segmenter = ZeroShotSegmenter.from_path(self.segmenter_name, self.model.betas.device,
                                                          "paint masks yourself (--masks FOLDER)")
        found = [None if photo.mask is not None else find_subject(self._segmenter, photo.image, words, photos.size)
                 for photo in photos.photos]
        photos.set_subject_masks([None if mask is None or not mask.any() else mask for mask in found])
