"""Train a concept with Perfusion: Tewel et al., "Key-Locked Rank One Editing for Text-to-Image Personalization".

SIGGRAPH 2023 (arXiv 2305.01644). The base model is frozen. Trained are one word embedding and one value vector o*_V per
cross-attention layer. The loss is `concept_losses` in `ldm.personalization.base`. The edit itself is in
`ldm.modules.rank_one`; `ldm.concepts.prompt_encoder` applies saved concepts to prompts.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.concepts.concept import POOLED, SUPER_CATEGORY, Concept
from ldm.concepts.model_spec import PREDICTION_TYPES, current_date
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.thumbnail import make_thumbnail
from ldm.concepts.trainable_concept import LOCKINGS, TrainableConcept
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.templates import fill_template
from ldm.models.concept_encoder import encode_photos, load_concept_encoder
from ldm.modules.concept_encoder import read_encoder_config
from ldm.modules.context import PromptContext
from ldm.modules.covariance_files import cached_covariance, load_covariance_for
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import PROJECTIONS, invert_covariance
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.checks import check_known, check_positive
from ldm.personalization.concept_names import as_list
from ldm.personalization.copy_paste_scenes import SceneSettings, add_scenes
from ldm.personalization.distinct_prompts import DistinctPrompts, FixedPrompts
from ldm.personalization.initial_words import mean_vector
from ldm.personalization.layer_names import find_layers
from ldm.util import to_device


class Perfusion(PersonalizationMethod):
    """A frozen latent diffusion model that learns concepts, or generates with learned ones.

    Args (beside those of `PersonalizationMethod`, whose segmenter makes the masks of the zero-shot mask loss):
        bias, temperature: beta and tau of the gate in training, and the concept's defaults for generation.
        inference_bias: the concept's default bias for generation; None: `bias`.
        embedding_lr, value_lr: learning rates of the word embedding and of the target outputs. If `embedding_lr` is
            0, the word stays that of the super-category. All prompts are then encoded once, before training, and the
            text encoder leaves the device.
        locking: "local" (keys locked to the super-category) or "trained" (keys learned like values, an ablation).
        trained_layers: the layers whose o*_V (and o*_K) are learned and stored, by name or by leading parts of names
            such as `output_blocks` or `output_blocks.3`. The other layers give the super-category's output W_V i_super,
            in training, too. None: all layers, as in the paper.
        used_layers: the layers in which generation uses the learned o*_V, by name or by leading parts of names such as
            `output_blocks` or `output_blocks.3`. The other layers are trained as well, and so absorb the layout and
            style of the photos, but generation uses the super-category's output W_V i_super there. None: all layers,
            as in the paper.
        other_layers_share: share of what the layers outside of `used_layers` have learned in the concept's o*_V, from
            0 to 1. Not 0: the concept uses all layers, these to that extent, W_V i_super + share (o*_V - W_V i_super).
        pooled: which pooled encoding the U-Net reads in models that have one, such as SDXL: that of the prompt with the
            "super_category" in the concept's place (locked, like the keys), or with the "concept" itself.
        projection: "full" (the paper's Eq. 3) or "gated", see `ldm.modules.rank_one`; concepts keep it.
        target_input_decay: decay of the moving average i*, at least 0 and below 1.
        covariance: file of the text encoder's covariance C. None: computed once from default captions and cached.
        encoder: folder of a concept encoder. It predicts from the photos where o*_V starts. None: o*_V starts at the
            super-category's output W_V i_super.
        encoder_strength: how far from there; None: the encoder's own.
        copy_paste_scenes: number of training scenes in which the subject stands beside something else. They are made
            from photos and base model, see `ldm.personalization.copy_paste_scenes`, and need a segmenter.
        scene_steps, scene_scale: sampling steps and guidance scale of the base model's part in them.
        thumbnail: store the first photo in the concept's file, as a small image that model browsers show.

    Raises:
        UserError: a param is unknown or out of range, the covariance file is missing, or the encoder is none.
    """

    method = "perfusion"
    method_name = "Perfusion"

    def __init__(self, bias: float = 0.75, temperature: float = 0.1, embedding_lr: float = 0.006,
                 value_lr: float = 0.03, locking: str = "local", projection: str = "full",
                 target_input_decay: float = 0.99, covariance: str | None = None, inference_bias: float | None = None,
                 used_layers: str | Sequence[str] | None = None, trained_layers: str | Sequence[str] | None = None,
                 other_layers_share: float = 0.0, pooled: str = "super_category", thumbnail: bool = False,
                 encoder: str | None = None, encoder_strength: float | None = None, copy_paste_scenes: int = 0,
                 scene_steps: int = 30, scene_scale: float = 6.0, **personalization: Any) -> None:
        check_known(locking=(locking, LOCKINGS), projection=(projection, PROJECTIONS), pooled=(pooled, POOLED))
        check_positive(temperature=temperature, value_lr=value_lr)
        if not embedding_lr and personalization.get("init_embedding"):
            raise UserError("init_embedding: with an embedding_lr of 0 the word stays that of the super-category; "
                            "leave one of them out")
        if embedding_lr < 0:
            raise UserError(f"embedding_lr {embedding_lr} must not be below 0")
        if not 0 <= target_input_decay < 1:
            raise UserError(f"target_input_decay {target_input_decay} must be at least 0 and below 1; 0.99 is usual")
        if covariance is not None and not resolve_path(covariance).is_file():  # before the weights, which take longer
            raise UserError(f"covariance {covariance}: no such file; compute it with scripts/compute_covariance.py, "
                            "or set null")
        if not 0 <= other_layers_share <= 1 or other_layers_share and not used_layers:
            raise UserError(f"other_layers_share {other_layers_share}: must be at least 0 and at most 1, and needs "
                            "used_layers")
        check_positive(scene_steps=scene_steps, scene_scale=scene_scale)
        if copy_paste_scenes < 0 or copy_paste_scenes and personalization.get("segmenter") is None:
            raise UserError(f"copy_paste_scenes {copy_paste_scenes}: must not be below 0, and needs a segmenter "
                            "(leave out --masks none)")
        if encoder_strength is not None:
            check_positive(encoder_strength=encoder_strength)
        if encoder is not None:
            read_encoder_config(resolve_path(encoder))  # likewise
        super().__init__(**personalization)
        self.encoder, self.encoder_strength = encoder, encoder_strength
        self.bias, self.temperature = bias, temperature
        self.inference_bias = bias if inference_bias is None else inference_bias
        self.embedding_lr, self.value_lr = embedding_lr, value_lr
        self.locking, self.projection = locking, projection
        self.pooled, self.thumbnail = pooled, thumbnail
        self.trained_layers = find_layers("trained_layers", as_list(trained_layers or ()), self.text_layers)
        learned = self.trained_layers or list(self.text_layers)
        self.used_layers = find_layers("used_layers", as_list(used_layers or ()), learned)
        self.other_layers_share = other_layers_share
        self.target_input_decay, self.covariance = target_input_decay, covariance
        self.scenes = SceneSettings(copy_paste_scenes, scene_steps, scene_scale)
        self._inverse_covariance: Tensor | None = None
        self._fixed_prompts: FixedPrompts | None = None
        self._encoder_rests = False

    def inverse_covariance(self) -> Tensor:
        """Return C^-1 of the text encoder, (d, d); the first call loads or computes it."""
        if self._inverse_covariance is None:
            encoder = self.cond_stage_model
            if self.covariance is None:
                covariance = cached_covariance(encoder)
            else:
                covariance = load_covariance_for(resolve_path(self.covariance), encoder)
            self._inverse_covariance = invert_covariance(covariance)
        self._inverse_covariance = self._inverse_covariance.to(self.device)
        return self._inverse_covariance

    def prepare_photos(self, photos: Sequence[ConceptPhotos], device: torch.device) -> None:
        """Add copy-paste scenes to the photos of each concept, if any are wanted."""
        if not self.scenes.count:
            return
        segmenter = ZeroShotSegmenter.from_path(self.segmenter, device, "leave out copy_paste_scenes")
        was_training = self.training
        self.to(device).eval()
        with self.trainer.precision_plugin.forward_context():
            for dataset, category in zip(photos, self.super_categories, strict=True):
                add_scenes(self, dataset, category, segmenter, self.scenes)
        self.train(was_training)
        if self.is_large:
            self.model.to("cpu")

    def prepare_prompts(self, photos: Sequence[ConceptPhotos], device: torch.device) -> None:
        """Encode the training prompts with the super-categories, as far as training reads these encodings."""
        encoder = self.cond_stage_model
        locks_pooled = encoder.has_pooled and self.pooled == SUPER_CATEGORY
        if self.embedding_lr and not locks_pooled:
            return
        encoder.to(device)
        vectors = [word_vector(encoder, category) for category in self.super_categories]
        self._fixed_prompts = FixedPrompts(self.word_encoder, vectors)
        for dataset in photos:
            self._fixed_prompts.encode(_prompts_of(dataset), device)
        if not self.embedding_lr:
            self.inverse_covariance()
            encoder.to("cpu")
            self._encoder_rests = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Perfusion:
        """Move or convert all parts of the model, but not a text encoder that training no longer needs."""
        resting = {}
        if self._encoder_rests:
            resting = {name: module for name, module in self._modules.items() if module is self.cond_stage_model}
        self._modules.update(dict.fromkeys(resting))
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules.update(resting)

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> TrainableConcept:
        encoder = self.cond_stage_model
        # v starts at the super-category's word embedding, or at a given one.
        embedding = word_vector(encoder, super_category).to(self.device)
        given = self.initial_words[len(self.concepts)]
        # i* starts at i_super, the super-category's encoding averaged over all training prompts.
        tokens = self.training_tokens(dataset)
        if self.embedding_lr:
            encoding = encoder.encode_tokens(tokens, embedding)
        else:
            fixed = self._fixed_prompts.encode(_prompts_of(dataset), self.device)
            tokens, encoding = fixed.tokens, fixed.encoding
        super_input = encoding[self.concept_positions(tokens)].mean(0)
        self.inverse_covariance()
        concept = TrainableConcept(embedding, super_input, self.text_layers, self.locking, self.trained_layers)
        if given is not None:
            start = mean_vector(given).to(embedding)
            concept.start_at(start, encoder.encode_tokens(tokens, start)[self.concept_positions(tokens)].mean(0))
        concept.embedding.requires_grad_(self.embedding_lr > 0)
        concept.origin = {
            "resolution": f"{dataset.size}x{dataset.size}",
            "prediction_type": PREDICTION_TYPES.get(self.parameterization, ""),
            "thumbnail": make_thumbnail(dataset.images[0]) if self.thumbnail else "",
        }
        return concept

    def setup(self, stage: str | None = None) -> None:
        is_prepared = len(self.concepts) > 0
        super().setup(stage)
        if self.encoder is not None and len(self.concepts) and not is_prepared:
            self._start_from_photos(self.encoder)

    def _start_from_photos(self, folder: str) -> None:
        """Start o*_V of each concept where the encoder predicts it: W_V (i_super + strength Delta)."""
        encoder = load_concept_encoder(folder, self.device, self.base_model.fingerprint)
        strength = encoder.settings.strength if self.encoder_strength is None else self.encoder_strength
        for concept, photos, category in zip(self.concepts, self.photos(), self.super_categories, strict=True):
            move = encode_photos(encoder, photos, self.cond_stage_model, category, concept.super_input)
            concept.start_values_at(concept.super_input + strength * move, self.text_layers)

    def parameter_groups(self) -> list[dict[str, Any]]:
        embeddings = {"params": [concept.embedding for concept in self.concepts], "lr": self.embedding_lr}
        values = {"params": [value for concept in self.concepts for value in concept.values()], "lr": self.value_lr}
        return [embeddings, values] if self.embedding_lr else [values]

    def encode_words(self, prompts: Sequence[str]) -> DistinctPrompts:
        """Encode prompts with the concepts' current words; the pooled encoding as `pooled` says."""
        vectors = [concept.embedding for concept in self.concepts]
        if self._fixed_prompts is None:
            return self.word_encoder.encode(prompts, vectors)
        fixed = self._fixed_prompts.encode(prompts, self.device)
        if not self.embedding_lr:
            return fixed
        return replace(self.word_encoder.encode(prompts, vectors, with_pooled=False), pooled=fixed.pooled)

    def training_context(self, prompts: list[str]) -> PromptContext:
        return self.prompt_context(prompts, update_target_inputs=True)

    def prompt_context(self, prompts: list[str], update_target_inputs: bool = False) -> PromptContext:
        """Encode B prompts, each under the current edit of the concept that it names.

        Args:
            prompts: each with the placeholder of one concept.
            update_target_inputs: first move the i* of these concepts towards their tokens' encodings.
        """
        distinct = self.encode_words(prompts)
        encoding, rows = distinct.encoding, distinct.rows
        # A concept's token is numbered past the vocabulary, so it is the largest of its prompt.
        largest, positions = distinct.tokens.max(1)
        named = largest - self.cond_stage_model.vocabulary_size
        indices = named.unique().tolist()
        if update_target_inputs:
            for index in indices:
                own = rows[named[rows] == index]
                self._update_target_input(index, encoding[self._to_device(own), self._to_device(positions[own])])
            self._exchange_target_inputs()
        # Each distinct prompt gets e_perp and the gates of its concept, then every prompt of the batch its row.
        contexts = []
        for index in indices:
            edit = self.concepts[index].edit(self.bias, self.temperature, self.inverse_covariance(), self.projection)
            own = self._to_device((named == index).nonzero()[:, 0])
            pooled = None if distinct.pooled is None else distinct.pooled[own]
            contexts.append(replace(edit.context(encoding[own]), pooled=pooled))
        by_concept = named.argsort(stable=True)
        return PromptContext.cat(contexts).select(self._to_device(by_concept.argsort()[rows]))

    def _update_target_input(self, index: int, encodings: Tensor) -> None:
        """i* <- decay i* + (1 - decay) mean of the encodings (n, d) of the concept's token in the batch.

        Each micro-batch moves i* by its share of the step. Encodings that are not finite leave i* unchanged, since an
        invalid i* would end the run for all of its concepts.
        """
        concept = self.concepts[index]
        finite = encodings.detach().where(encodings.isfinite(), concept.target_input)
        concept.move_target_input(finite, self.target_input_decay ** (1 / self.micro_batches))

    def _to_device(self, indices: Tensor) -> Tensor:
        return to_device(indices, self.device)

    def _exchange_target_inputs(self) -> None:
        """Send each i* from the device that learns it to the others. All other parameters are in sync already."""
        devices = self.trainer.world_size
        for index, concept in enumerate(self.concepts if devices > 1 else ()):
            torch.distributed.broadcast(concept.target_input, src=index % devices)

    def export_concept(self, index: int = 0) -> Concept:
        concept, used_layers = self.concepts[index], self.used_layers
        shares = {}
        if self.other_layers_share:
            shares = {name: self.other_layers_share for name in concept.layer_names if name not in used_layers}
            used_layers = []
        return concept.to_concept(
            self.inverse_covariance(), shares, word_parts=dict(self.cond_stage_model.word_parts),
            placeholder=self.placeholders[index], super_category=self.super_categories[index],
            bias=float(self.inference_bias), temperature=float(self.temperature), projection=self.projection,
            used_layers=used_layers, pooled=self.pooled, steps=int(self.global_step),
            date=current_date(), **self.base_model.stored)

    def sampling_encoder(self, concepts: Sequence[Concept]) -> ConceptPromptEncoder:
        return ConceptPromptEncoder(self.cond_stage_model, self.text_layers, concepts, self.inverse_covariance,
                                    self.base_model)


def _prompts_of(dataset: ConceptPhotos) -> list[str]:
    """Return the training prompts of a concept, with its placeholder."""
    return [fill_template(template, dataset.placeholder_token) for template in dataset.prompts]
