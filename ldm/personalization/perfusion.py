"""Train a concept with Perfusion: Tewel et al., "Key-Locked Rank One Editing for Text-to-Image Personalization".

SIGGRAPH 2023 (arXiv 2305.01644). The base model is frozen. Trained are one word embedding and one value vector o*_V per
cross-attention layer. The loss is `concept_losses` in `ldm.personalization.base`. The edit itself is in
`ldm.modules.rank_one`; `ldm.concepts.prompt_encoder` applies saved concepts to prompts.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.concepts.concept import Concept
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.trainable_concept import LOCKINGS, TrainableConcept
from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.context import PromptContext
from ldm.modules.covariance import cached_covariance, load_covariance_for
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import PROJECTIONS, invert_covariance
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.checks import check_positive
from ldm.personalization.concept_names import as_list
from ldm.util import to_device


class Perfusion(PersonalizationMethod):
    """A frozen latent diffusion model that learns concepts, or generates with learned ones.

    Args (beside those of `PersonalizationMethod`, whose segmenter makes the masks of the zero-shot mask loss):
        bias, temperature: beta and tau of the gate in training, and the concept's defaults for generation.
        inference_bias: the concept's default bias for generation; None: `bias`.
        embedding_lr, value_lr: learning rates of the word embedding and of the target outputs.
        locking: "local" (keys locked to the super-category) or "trained" (keys learned like values, an ablation).
        used_layers: the layers in which generation uses the learned o*_V, by name or by leading parts of names such as
            `output_blocks` or `output_blocks.3`. The other layers are trained as well, and so absorb the layout and
            style of the photos, but generation uses the super-category's output W_V i_super there. None: all layers,
            as in the paper.
        projection: "full" (the paper's Eq. 3) or "gated", see `ldm.modules.rank_one`; concepts keep it.
        target_input_decay: decay of the moving average i*, at least 0 and below 1.
        covariance: file of the text encoder's covariance C. None: computed once from default captions and cached.

    Raises:
        UserError: a param is unknown or out of range, or the covariance file is missing.
    """

    method = "perfusion"
    method_name = "Perfusion"

    def __init__(self, bias: float = 0.75, temperature: float = 0.1, embedding_lr: float = 0.006,
                 value_lr: float = 0.03, locking: str = "local", projection: str = "full",
                 target_input_decay: float = 0.99, covariance: str | None = None, inference_bias: float | None = None,
                 used_layers: str | Sequence[str] | None = None, **personalization: Any) -> None:
        for name, value, known in (("locking", locking, LOCKINGS), ("projection", projection, PROJECTIONS)):
            if value not in known:
                raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        check_positive(temperature=temperature, embedding_lr=embedding_lr, value_lr=value_lr)
        if not 0 <= target_input_decay < 1:
            raise UserError(f"target_input_decay {target_input_decay} must be at least 0 and below 1; 0.99 is usual")
        if covariance is not None and not resolve_path(covariance).is_file():  # before the weights, which take longer
            raise UserError(f"covariance {covariance}: no such file; compute it with scripts/compute_covariance.py, "
                            "or set null")
        super().__init__(**personalization)
        self.bias, self.temperature = bias, temperature
        self.inference_bias = bias if inference_bias is None else inference_bias
        self.embedding_lr, self.value_lr = embedding_lr, value_lr
        self.locking, self.projection = locking, projection
        self.used_layers = self._find_layers(as_list(used_layers or ()))
        self.target_input_decay, self.covariance = target_input_decay, covariance
        self._inverse_covariance: Tensor | None = None

    def _find_layers(self, prefixes: Sequence[str]) -> list[str]:
        """Return the layers with these names or leading parts of a name: `output_blocks.1` does not match 10.

        Raises:
            UserError: a prefix matches no layer.
        """
        def matches(name: str, prefix: str) -> bool:
            return f"{name}.".startswith(f"{prefix.rstrip('.')}.")

        for prefix in prefixes:
            if not any(matches(name, prefix) for name in self.text_layers):
                raise UserError(f"used_layers: no layer that reads text is called {prefix}; there are "
                                f"{', '.join(self.text_layers)}")
        return [name for name in self.text_layers if any(matches(name, prefix) for prefix in prefixes)]

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

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> TrainableConcept:
        encoder = self.cond_stage_model
        # v starts at the super-category's word embedding.
        embedding = word_vector(encoder, super_category)
        # i* starts at i_super, the super-category's encoding averaged over all training prompts.
        tokens = self.training_tokens(dataset)
        super_input = encoder.encode_tokens(tokens, embedding)[self.concept_positions(tokens)].mean(0)
        self.inverse_covariance()
        return TrainableConcept(embedding, super_input, self.text_layers, self.locking)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [concept.embedding for concept in self.concepts], "lr": self.embedding_lr},
                {"params": [value for concept in self.concepts for value in concept.values()], "lr": self.value_lr}]

    def training_context(self, prompts: list[str]) -> PromptContext:
        return self.prompt_context(prompts, update_target_inputs=True)

    def prompt_context(self, prompts: list[str], update_target_inputs: bool = False) -> PromptContext:
        """Encode B prompts, each under the current edit of the concept that it names.

        Args:
            prompts: each with the placeholder of one concept.
            update_target_inputs: first move the i* of these concepts towards their tokens' encodings.
        """
        tokens, encoding, rows = self.encode_distinct(prompts, [concept.embedding for concept in self.concepts])
        # A concept's token is numbered past the vocabulary, so it is the largest of its prompt.
        largest, positions = tokens.max(1)
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
            own = (named == index).nonzero()[:, 0]
            contexts.append(edit.context(encoding[self._to_device(own)]))
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
        concept = self.concepts[index]
        return concept.to_concept(
            self.inverse_covariance(), word_parts=dict(self.cond_stage_model.word_parts),
            placeholder=self.placeholders[index], super_category=self.super_categories[index],
            bias=float(self.inference_bias), temperature=float(self.temperature), projection=self.projection,
            used_layers=self.used_layers, steps=int(self.global_step),
            **self.base_model.stored)

    def sampling_encoder(self, concepts: Sequence[Concept]) -> ConceptPromptEncoder:
        return ConceptPromptEncoder(self.cond_stage_model, self.text_layers, concepts, self.inverse_covariance,
                                    self.base_model)
