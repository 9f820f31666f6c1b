"""Models whose U-Net also reads a vector or a level of noise (`c_adm`), as Stability AI has them.

`ldm.modules.diffusionmodules.upscaling` has the models of small images, `ldm.modules.encoders.image_embedders` those of
image embeddings.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.frozen import freeze
from ldm.util import instantiate_from_config


class LatentUpscaleDiffusion(LatentDiffusion):
    """A model that sees a small, noised image and knows the level of its noise.

    Args (in addition to those of `LatentDiffusion`):
        low_scale_config: config of a model: small images -> channels (B, c, h, w) and levels of noise (B,).
        low_scale_key: key of the small images.
        noise_level_key: must be None, as in the original.
    """

    def __init__(self, *args: Any, low_scale_config: Mapping[str, Any], low_scale_key: str = "LR",
                 noise_level_key: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.cond_stage_trainable or noise_level_key is not None:
            raise UserError("LatentUpscaleDiffusion: cond_stage_trainable and noise_level_key are not supported")
        self.instantiate_low_stage(low_scale_config)
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key

    def instantiate_low_stage(self, config: Mapping[str, Any]) -> None:
        """Set `low_scale_model`, frozen."""
        self.low_scale_model = freeze(instantiate_from_config(config))

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, cond_key: str | None = None, bs: int | None = None,
                  log_mode: bool = False) -> tuple[Any, ...]:
        """Return latents and condition.

        In `log_mode` images, reconstructions, texts, small images, these decoded again, and levels of noise follow.
        """
        z, c, *others = super().get_input(batch, k, force_c_encode=True, bs=bs, return_first_stage_outputs=log_mode,
                                          return_original_cond=log_mode)
        small = image_batch(batch, self.low_scale_key)[:bs].to(self.device)
        channels, level = self.low_scale_model(small)
        conditions = {"c_concat": [channels], "c_crossattn": [c], "c_adm": level}
        if not log_mode:
            return z, conditions
        return (z, conditions, *others, small, self.low_scale_model.decode(channels), level)

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> Sequence[Any]:
        return self.get_input(batch, self.first_stage_key, bs=count, log_mode=True)[:5]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, *args: Any, inpaint: bool = False,
                   **kwargs: Any) -> dict[str, Tensor]:
        """Return what the base class does, and the small images."""
        shown = super().log_images(batch, N, n_row, *args, inpaint=inpaint, **kwargs)
        return {**shown, "x_lr": image_batch(batch, self.low_scale_key)[:N]}


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """A model that reads the embedding of an image besides a text (Stable unCLIP).

    Args (in addition to those of `LatentDiffusion`):
        embedder_config: config of the image encoder: (B, 3, H, W) in [-1, 1] -> (B, d).
        embedding_key: key of the images to embed.
        embedding_dropout: share of embeddings that are set to zero in training.
        freeze_embedder: whether the image encoder stays as it is.
        noise_aug_config: config of a module that noises embeddings: (B, d) -> (B, d), levels of noise (B, e).
    """

    def __init__(self, embedder_config: Mapping[str, Any], embedding_key: str = "jpg", embedding_dropout: float = 0.5,
                 freeze_embedder: bool = True, noise_aug_config: Mapping[str, Any] | None = None, *args: Any,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embed_key, self.embedding_dropout = embedding_key, embedding_dropout
        embedder = instantiate_from_config(embedder_config)
        self.embedder = freeze(embedder) if freeze_embedder else embedder
        self.noise_augmentor = None if noise_aug_config is None else freeze(instantiate_from_config(noise_aug_config))

    def get_input(self, batch: Mapping[str, Any], k: str, cond_key: str | None = None, bs: int | None = None,
                  **kwargs: Any) -> list[Any]:
        """Return latents, condition and what `kwargs` ask for, as the base class does."""
        z, c, *others = super().get_input(batch, k, cond_key=cond_key, bs=bs, **kwargs)
        vector = self.embedder(image_batch(batch, self.embed_key)[:bs].to(self.device))
        if self.noise_augmentor is not None:
            vector = torch.cat(self.noise_augmentor(vector), dim=1)
        if self.training:
            kept = (1.0 - self.embedding_dropout) * torch.ones(len(vector), 1, device=vector.device)
            vector = torch.bernoulli(kept) * vector
        return [z, {"c_crossattn": [c], "c_adm": vector}, *others]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, ddim_steps: int = 50,
                   ddim_eta: float = 0.0, unconditional_guidance_scale: float = 5.0,
                   unconditional_guidance_label: Any = "", use_ema_scope: bool = True, **_: Any) -> dict[str, Tensor]:
        """Return images of a batch, their reconstructions and texts, and samples with guidance."""
        keys = ("inputs", "reconstruction", "conditioning", f"samples_cfg_scale_{unconditional_guidance_scale:.2f}")
        return super().log_images(
            batch, N, n_row, ddim_steps=ddim_steps, ddim_eta=ddim_eta, inpaint=False, quantize_denoised=False,
            plot_progressive_rows=False, plot_diffusion_rows=False, use_ema_scope=use_ema_scope, return_keys=keys,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_guidance_label=unconditional_guidance_label)
