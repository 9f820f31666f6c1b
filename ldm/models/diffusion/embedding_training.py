"""Textual Inversion inside a latent diffusion model, as the LDM family's configs have it (`personalization_config`).

An `EmbeddingManager` holds vectors that stand for placeholders in prompts. They are trained, and all else is frozen
unless `unfreeze_model` is set. The methods for comparison with Perfusion are in `ldm.personalization` instead.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.embedding_manager import EmbeddingManager
from ldm.concepts.fingerprint import base_fingerprint
from ldm.models.diffusion.logged_images import LogsLatentDiffusion
from ldm.models.frozen import freeze
from ldm.modules.attention import name_text_layers
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

LATEST, AT_STEP = "embeddings.pt", "embeddings_gs-{}.pt"  # the family's files beside the checkpoints
LOG_OPTIONS = {"inpaint": False, "plot_progressive_rows": False, "plot_diffusion_rows": False,
               "unconditional_guidance_scale": 5.0}
GUIDED_BY_SCALE, GUIDED = "samples_cfg_scale_5.00", "samples_scaled"
CONCEPTS = "embeddings.safetensors"  # our own, which the generation scripts read


class TrainsEmbeddings:
    """Mixin for models with an `embedding_manager`, which may be None.

    Attributes:
        is_personalized: whether the config has a `personalization_config`.
        trains_pairs: whether a step takes two batches, photos and images of the super-category (DreamBooth).
        unfreeze_model: whether the network and the condition's encoder are trained as well.
        model_lr: the learning rate of these two.
        embedding_reg_weight: weight, in the loss, of the squared distance of the vectors from their start.
    """

    embedding_manager: nn.Module | None
    is_personalized = False

    def personalize(self, config: Mapping[str, Any]) -> None:
        """Add the vectors, which start from words of the loaded encoder, and freeze what is not trained.

        For DreamBooth (`reg_weight` is given) there are no vectors.
        """
        if not hasattr(self.cond_stage_model, "encode"):
            raise UserError("personalization_config: needs a model that encodes prompts; leave it out")
        self.is_personalized = True
        if self.unfreeze_model:
            self.cond_stage_model.requires_grad_(True)  # encoders of prompts freeze themselves
        if self.trains_pairs:
            return
        if not self.unfreeze_model:
            self.strict_loading = False  # a run's checkpoints hold what was learned, not the base model
            self.requires_grad_(False)
            freeze(self.cond_stage_model)
            freeze(self.model)
        self.embedding_manager = self.instantiate_embedding_manager(config, self.cond_stage_model)
        for parameter in self.embedding_manager.embedding_parameters():
            parameter.requires_grad_(True)

    def instantiate_embedding_manager(self, config: Mapping[str, Any], embedder: nn.Module) -> nn.Module:
        """Return the manager that a config describes, with the vectors of its `embedding_manager_ckpt` if it has one.

        Classes of the family leave that file to the model; loading it twice does no harm.
        """
        manager = instantiate_from_config(config, embedder=embedder)
        path = (config.get("params") or {}).get("embedding_manager_ckpt")
        if path:
            manager.load(path)
        return manager

    def setup(self, stage: str | None = None) -> None:
        """Refuse to train vectors on a model with random weights."""
        if stage == "fit" and self.embedding_manager is not None and not self.has_initial_weights:
            raise UserError("no base model to train on: name its checkpoint with --actual_resume, or in the config as "
                            "model.params.ckpt_path")

    # The loss

    def regularize(self, loss: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and terms with the distance of the vectors from their start added."""
        if self.embedding_manager is None or not self.embedding_reg_weight > 0:
            return loss, terms
        distance = self.embedding_manager.embedding_to_coarse_loss().mean()
        loss = loss + self.embedding_reg_weight * distance
        split = "train" if self.training else "val"
        return loss, {**terms, f"{split}/loss_emb_reg": distance.detach(), f"{split}/loss": loss.detach()}

    # Images for the log

    @torch.no_grad()
    @wraps(LogsLatentDiffusion.log_images)
    def log_images(self, batch: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return what the base class does. If personalized, rows are off by default and guided samples on."""
        if not self.is_personalized:
            return super().log_images(batch, *args, **options)
        shown = super().log_images(batch, *args, **{**LOG_OPTIONS, **options})
        return {GUIDED if key == GUIDED_BY_SCALE else key: images for key, images in shown.items()}

    # What is optimized

    def embedding_parameter_groups(self, others: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Return the vectors and, if they are not frozen, the weights of the model as groups of an optimizer."""
        groups = [{"params": list(self.embedding_manager.embedding_parameters()), "lr": self.learning_rate}]
        if self.unfreeze_model:
            groups.append({"params": list(others), "lr": self.model_lr})
        return groups

    def configure_opt_embedding(self) -> torch.optim.Optimizer:
        """Freeze all but the vectors, and return their optimizer."""
        freeze(self.cond_stage_model)
        freeze(self.model)
        vectors = list(self.embedding_manager.embedding_parameters())
        return torch.optim.AdamW([vector.requires_grad_(True) for vector in vectors], lr=self.learning_rate)

    def configure_opt_model(self) -> torch.optim.Optimizer:
        """Unfreeze network, encoder and vectors, and return their optimizer."""
        weights = [*self.cond_stage_model.parameters(), *self.model.parameters()]
        vectors = list(self.embedding_manager.embedding_parameters())
        for parameter in (*weights, *vectors):
            parameter.requires_grad_(True)
        groups = [{"params": vectors, "lr": self.learning_rate}, {"params": weights}]
        return torch.optim.AdamW(groups, lr=self.model_lr)

    # Files

    def saved_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.embedding_manager is None or self.unfreeze_model:
            return super().saved_weights(weights)
        return {key: value for key, value in weights.items() if key.startswith("embedding_manager.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.embedding_manager is None or self._trainer is None or not self.trainer.is_global_zero:
            return
        folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name in (LATEST, AT_STEP.format(self.global_step)):
                self.embedding_manager.save(str(Path(folder) / name))

    def on_train_end(self) -> None:
        """Write the vectors to a small file in the log folder."""
        if isinstance(self.embedding_manager, EmbeddingManager) and self.trainer.is_global_zero:
            base = base_fingerprint(name_text_layers(self.model.diffusion_model))
            path = self.embedding_manager.save(Path(self.trainer.default_root_dir) / CONCEPTS, base, self.global_step)
            log.info("vectors of %s: %s", ", ".join(self.embedding_manager.placeholders), path)
