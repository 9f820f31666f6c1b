"""Latent diffusion (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022)."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.embedding_manager import EmbeddingManager
from ldm.concepts.fingerprint import base_fingerprint
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.pixel_diffusion import DDPM
from ldm.models.diffusion.wrapper import Condition
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.sampling.ddim import DDIM
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)


class LatentDiffusion(DDPM):
    """A diffusion model on the latents of a frozen first stage, conditioned on the output of a second module.

    Args (in addition to those of `DDPM`):
        first_stage_config: config of the autoencoder; it is never trained here.
        cond_stage_config: config of the condition's encoder, or "__is_unconditional__".
        num_timesteps_cond: accepted for the public configs; must be 1.
        cond_stage_key: key of a batch's condition, such as "caption".
        cond_stage_trainable: whether the condition's encoder is trained as well.
        concat_mode: without a `conditioning_key`: "concat" instead of "crossattn".
        cond_stage_forward: name of the encoder's method to call; None: `encode` if it has one, else `forward`.
        scale_factor: factor of the latents, chosen so that their variance is about 1.
        scale_by_std: measure that factor on the first batch instead.
        personalization_config: config of an `EmbeddingManager`. Its vectors are then trained (Textual Inversion), and
            everything else is frozen. Subclasses do not support it.
        embedding_reg_weight: weight, in the loss, of the squared distance of these vectors from their start.
        object_weight: weight of an object's error, relative to the background's, for batches that mark objects by
            "objects" (B, 1, H, W) in [0, 1]; a model learns objects faster with it.

    Raises:
        UserError: if params are not supported or contradict each other.
    """

    def __init__(self, first_stage_config: Mapping[str, Any], cond_stage_config: Mapping[str, Any] | str,
                 num_timesteps_cond: int | None = None, cond_stage_key: str = "image",
                 cond_stage_trainable: bool = False, concat_mode: bool = True, cond_stage_forward: str | None = None,
                 conditioning_key: str | None = None, scale_factor: float = 1.0, scale_by_std: bool = False,
                 personalization_config: Mapping[str, Any] | None = None, embedding_reg_weight: float = 0.0,
                 object_weight: float = 1.0, **ddpm: Any) -> None:
        if num_timesteps_cond not in (None, 1):
            raise UserError(f"num_timesteps_cond {num_timesteps_cond}: only 1 is supported")
        unconditional = cond_stage_config == "__is_unconditional__"
        if conditioning_key is None and not unconditional:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **ddpm)
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.cond_stage_trainable = cond_stage_trainable
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        # The frozen autoencoder, without the loss (and its discriminator) that trained it
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        if hasattr(self.first_stage_model, "loss"):
            self.first_stage_model.loss = None
        # The condition's encoder
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if self.cond_stage_model is not None and not cond_stage_trainable:
            self.cond_stage_model.eval().requires_grad_(False)
        self.embedding_reg_weight = embedding_reg_weight
        self.object_weight = object_weight
        self.embedding_manager: EmbeddingManager | None = None
        self._personalization_config = personalization_config
        if personalization_config is not None and type(self) is not LatentDiffusion:
            raise UserError("personalization_config: is for Textual Inversion, with target "
                            "ldm.models.diffusion.ddpm.LatentDiffusion; leave it out")

    def _finish_construction(self) -> None:
        super()._finish_construction()
        if self._personalization_config is not None:
            self._personalize(self._personalization_config)

    def _personalize(self, config: Mapping[str, Any]) -> None:
        """Freeze everything, and add the vectors of an `EmbeddingManager`, which start from the loaded words."""
        if not isinstance(self.cond_stage_model, PromptEncoder):
            raise UserError("personalization_config: needs a model that encodes prompts; leave it out")
        self.cond_stage_trainable = False
        self.strict_loading = False
        self.requires_grad_(False).cond_stage_model.eval()
        self.embedding_manager = instantiate_from_config(config, embedder=self.cond_stage_model)

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit" and self.embedding_manager is not None and self._initial_weights[0] is None:
            raise UserError("no base model to train on: name its checkpoint with --actual_resume, or in the config as "
                            "model.params.ckpt_path")

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Set the mode of the parts that are trained. Frozen parts stay in evaluation mode."""
        super().train(mode)
        if hasattr(self, "first_stage_model"):
            self.first_stage_model.eval()
        if getattr(self, "cond_stage_model", None) is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    # Latents and conditions

    @torch.no_grad()
    def encode_first_stage(self, images: Tensor, generator: torch.Generator | None = None,
                           sample: bool = True) -> Tensor:
        """Return the scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        If the first stage returns a posterior, they are sampled from it, or are its mode if `sample` is False.
        """
        encoded = self.first_stage_model.encode(images)
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.sample(generator) if sample else encoded.mode()
        return self.scale_factor * encoded

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return the images (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w)."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def get_learned_conditioning(self, c: Any) -> Tensor | PromptContext:
        """Return the encoded condition (such as a list of B prompts), (B, N, d)."""
        stage = self.cond_stage_model
        if self.embedding_manager is not None:
            return self.embedding_manager(stage, [c] if isinstance(c, str) else c)
        method = self.cond_stage_forward or ("encode" if hasattr(stage, "encode") else "__call__")
        encoded = getattr(stage, method)(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def get_input(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        z = self.encode_first_stage(image_batch(batch, self.first_stage_key))
        if self.cond_stage_model is None:
            return z, None
        raw = batch[self.cond_stage_key]
        trains_encoding = self.cond_stage_trainable or self.embedding_manager is not None
        with torch.set_grad_enabled(trains_encoding and torch.is_grad_enabled()):
            return z, self.get_learned_conditioning(list(raw) if isinstance(raw, list | tuple) else raw)

    # Training

    def loss_weight(self, batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
        if self.object_weight == 1 or "objects" not in batch:
            return None
        objects = torch.nn.functional.interpolate(batch["objects"], size=tuple(size), mode="area")
        return 1 + (self.object_weight - 1) * objects

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0:
            z = self.encode_first_stage(image_batch(batch, self.first_stage_key)) / self.scale_factor
            self.scale_factor.fill_(1.0 / z.std())
            log.info("scale_factor %.4f, from the standard deviation of the first batch's latents",
                     self.scale_factor.item())

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = super().shared_step(batch)
        if self.embedding_manager is not None and self.embedding_reg_weight:
            distance = self.embedding_manager.distance()
            loss = loss + self.embedding_reg_weight * distance
            terms |= {"loss": loss.detach(), "embedding_distance": distance.detach()}
        return loss, terms

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        if self.embedding_manager is not None:
            return list(self.embedding_manager.parameters())
        encoder = self.cond_stage_model.parameters() if self.cond_stage_trainable else ()
        return [*super().trained_parameters(), *encoder]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the loss of the first stage, which is unused here, and what Textual Inversion freezes."""
        saved = "" if self.embedding_manager is None else "embedding_manager."
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items()
                                    if key.startswith(saved) and not key.startswith("first_stage_model.loss.")}

    def on_train_end(self) -> None:
        """Write the vectors of an `EmbeddingManager` to a small file in the log folder."""
        if self.embedding_manager is not None and self.trainer.is_global_zero:
            base = base_fingerprint(name_text_layers(self.model.diffusion_model))
            path = self.embedding_manager.save(Path(self.trainer.default_root_dir) / "embeddings.safetensors", base,
                                               self.global_step)
            log.info("vectors of %s: %s", ", ".join(self.embedding_manager.placeholders), path)

    # Sampling

    @torch.no_grad()
    def sample_images(self, cond: Condition, batch_size: int, steps: int = 50, scale: float = 1.0,
                      unconditional: Condition = None, eta: float = 0.0,
                      generators: Sequence[torch.Generator] | None = None, verbose: bool = False) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1], sampled by DDIM.

        Args:
            scale: scale of classifier-free guidance, 1 for none; others need an `unconditional` condition.
            generators: one per image, the sources of its noise; None: the global one.
        """
        latents = self.sample_latents(cond, batch_size, steps, scale, unconditional, eta, generators, verbose)
        images = [self.decode_first_stage(z) for z in latents.split(1)]  # decoding needs the most memory of all
        return torch.cat(images).clamp(-1, 1)

    def sample_latents(self, cond: Condition, batch_size: int, steps: int = 50, scale: float = 1.0,
                       unconditional: Condition = None, eta: float = 0.0,
                       generators: Sequence[torch.Generator] | None = None, verbose: bool = False) -> Tensor:
        """Return scaled latents (B, C, h, w). Arguments as for `sample_images`."""
        latents, _ = DDIM(self).sample(
            steps, batch_size, self.latent_shape, cond, eta=eta, verbose=verbose, generators=generators,
            unconditional_guidance_scale=scale, unconditional_conditioning=unconditional)
        return latents

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, ddim_steps: int = 50,
                   unconditional_guidance_scale: float = 3.0) -> dict[str, Tensor]:
        """Return images of the batch, their reconstructions, and samples for the batch's conditions."""
        images = image_batch(batch, self.first_stage_key)[:N]
        shown = {"inputs": images, "reconstructions": self.decode_first_stage(self.encode_first_stage(images))}
        cond, unconditional, scale = None, None, 1.0
        if self.cond_stage_model is not None:
            raw = batch[self.cond_stage_key][:N]
            cond = self.get_learned_conditioning(list(raw) if isinstance(raw, list | tuple) else raw)
            # Only prompts have an unconditional counterpart, the empty prompt.
            if isinstance(raw, list | tuple):
                unconditional, scale = self.get_learned_conditioning([""] * len(raw)), unconditional_guidance_scale
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(images))]
        with self.ema_scope():
            shown["samples"] = self.sample_images(cond, len(images), ddim_steps, scale, unconditional,
                                                  generators=generators)
        return shown
