"""Teaching a concept: Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image Personalization".

SIGGRAPH 2023 (arXiv 2305.01644). The base model is frozen; learned are one word embedding and one value vector per
cross-attention layer. The edit itself is in `ldm.modules.rank_one`; prompts for sampling in `prompts.py`.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.trainable_concept import LOCKINGS, TrainableConcept
from ldm.data.personalized import PersonalizedBase
from ldm.modules.context import PromptContext
from ldm.modules.covariance import cached_covariance, encoder_fingerprint, load_covariance
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import PROJECTIONS, energy, invert_covariance
from ldm.personalization.base import PersonalizationMethod, as_list, check_positive
from ldm.util import to_device


class Perfusion(PersonalizationMethod):
    """A frozen latent diffusion model that learns concepts, or draws learned ones.

    Args (beside those of `PersonalizationMethod`, whose segmenter makes the masks of the zero-shot mask loss):
        bias, temperature: beta and tau of the gate in training, and the concept's defaults in sampling.
        inference_bias: the default in sampling where it is another than in training.
        embedding_lr, value_lr: learning rates of the word embedding and of the target outputs.
        locking: "local" (keys locked to the super-category) or "trained" (keys learned like values, an ablation).
        used_layers: the layers, by their names or whole first parts of them such as `output_blocks` or
            `output_blocks.3`, whose target outputs for values concepts are drawn with. The others' are learned as well,
            and so take up how the photos are laid out and drawn; in their stead concepts are drawn with the
            super-category's. None: all are used, as in the paper.
        projection: "full", by the paper's Eq. 3, or "gated" (see `ldm.modules.rank_one`); concepts keep it.
        target_input_decay: of the moving average i*.
        covariance: file of the text encoder's covariance C; None: computed once from default captions and cached.
    """

    def __init__(self, bias: float = 0.75, temperature: float = 0.1, embedding_lr: float = 0.006,
                 value_lr: float = 0.03, locking: str = "local", projection: str = "full",
                 target_input_decay: float = 0.99, covariance: str | None = None, inference_bias: float | None = None,
                 used_layers: str | Sequence[str] | None = None, **concept_learner: Any) -> None:
        for name, value, known in (("locking", locking, LOCKINGS), ("projection", projection, PROJECTIONS)):
            if value not in known:
                raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        check_positive(temperature=temperature, embedding_lr=embedding_lr, value_lr=value_lr)
        if not 0 <= target_input_decay < 1:
            raise UserError(f"target_input_decay {target_input_decay} must be at least 0 and below 1; 0.99 is usual")
        if covariance is not None and not Path(covariance).is_file():  # before weights, which take longer to load
            raise UserError(f"covariance {covariance}: no such file; compute it with scripts/compute_covariance.py, "
                            "or set null")
        super().__init__(**concept_learner)
        self.bias, self.temperature = bias, temperature
        self.inference_bias = bias if inference_bias is None else inference_bias
        self.embedding_lr, self.value_lr = embedding_lr, value_lr
        self.locking, self.projection = locking, projection
        self.used_layers = self._layers_called(as_list(used_layers or ()))
        self.target_input_decay, self.covariance = target_input_decay, covariance
        self._inverse_covariance: Tensor | None = None

    def _layers_called(self, beginnings: Sequence[str]) -> list[str]:
        """The layers whose names are these or begin with them and a dot: `output_blocks.1` is not in a name with 10.

        Raises:
            UserError: none does with one of them.
        """
        def called(name: str, beginning: str) -> bool:
            return f"{name}.".startswith(f"{beginning.rstrip('.')}.")

        for beginning in beginnings:
            if not any(called(name, beginning) for name in self.text_layers):
                raise UserError(f"used_layers: no layer that reads text is called {beginning}; there are "
                                f"{', '.join(self.text_layers)}")
        return [name for name in self.text_layers if any(called(name, beginning) for beginning in beginnings)]

    def inverse_covariance(self) -> Tensor:
        """C^-1 of the text encoder, (d, d); read or computed at the first call."""
        if self._inverse_covariance is None:
            encoder = self.cond_stage_model
            covariance = cached_covariance(encoder) if self.covariance is None else load_covariance(
                self.covariance, encoder_fingerprint(encoder))
            self._inverse_covariance = invert_covariance(covariance)
        self._inverse_covariance = self._inverse_covariance.to(self.device)
        return self._inverse_covariance

    def make_concept(self, data: PersonalizedBase, super_category: str) -> TrainableConcept:
        encoder = self.cond_stage_model
        start = word_vector(encoder, super_category)
        tokens = self.training_tokens(data)
        super_input = encoder.encode_tokens(tokens, start)[self.concept_positions(tokens)].mean(0)
        self.inverse_covariance()
        return TrainableConcept(start, super_input, self.text_layers, self.locking)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [concept.embedding for concept in self.concepts], "lr": self.embedding_lr},
                {"params": [value for concept in self.concepts for value in concept.values()], "lr": self.value_lr}]

    def prompt_context(self, prompts: list[str], average: bool = False) -> PromptContext:
        """Each prompt under the edit, as it now is, of the concept that it names; `average` moves i* by them first."""
        tokens, encoding, rows = self.encoded(prompts, [concept.embedding for concept in self.concepts])
        last, where = tokens.max(1)
        named = last - len(self.cond_stage_model.token_table)  # a concept's token is numbered past the vocabulary
        places = named.unique().tolist()
        if average:
            for place in places:
                own = rows[named[rows] == place]
                decay = self.target_input_decay ** (1 / self.parts)  # each part moves i* by its share of the step
                self.concepts[place].move_target_input(encoding[self._here(own), self._here(where[own])], decay)
            self._exchange_target_inputs()
        edited = [self.concepts[place].edit(self.bias, self.temperature, self.projection).context(
            encoding[self._here((named == place).nonzero()[:, 0])], self.inverse_covariance()) for place in places]
        sorted_by_concept = named.argsort(stable=True)
        return PromptContext.cat(edited).select(self._here(sorted_by_concept.argsort()[rows]))

    def _here(self, index: Tensor) -> Tensor:
        return to_device(index, self.device)

    def _exchange_target_inputs(self) -> None:
        """Every device gets the i* of the concepts that others learn; optimisers keep the rest the same everywhere."""
        devices = self.trainer.world_size
        for place, concept in enumerate(self.concepts if devices > 1 else ()):
            torch.distributed.broadcast(concept.target_input, src=place % devices)

    def step_context(self, prompts: list[str]) -> PromptContext:
        return self.prompt_context(prompts, average=True)

    def export_concept(self, place: int = 0) -> Concept:
        target = self.concepts[place].target_input
        # not finite where training diverged: saving says so
        known = float(energy(target[None], self.inverse_covariance())) if target.isfinite().all() else None
        return self.concepts[place].to_concept(
            placeholder=self.placeholders[place], super_category=self.super_categories[place],
            bias=float(self.inference_bias), temperature=float(self.temperature), projection=self.projection,
            used_layers=self.used_layers, steps=int(self.global_step), base=self.base, target_energy=known)
