"""Encoders of images for Stable unCLIP, and the noise that is added to their embeddings (Stability AI).

Source: Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents".
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.unet_blocks import Timestep
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.encoders.clip_features import FrozenClipImageEmbedder


class ClipImageEmbedder(FrozenClipImageEmbedder):
    """Encode images (B, 3, H, W) in [-1, 1] by CLIP to (B, d), and drop some of the embeddings.

    Args:
        model, jit, device, antialias: see `FrozenClipImageEmbedder`.
        ucg_rate: share of the embeddings that are set to zero, so that a model also learns to do without.
    """

    def __init__(self, model: str | nn.Module, jit: bool = False, device: str | torch.device = "cpu",
                 antialias: bool = True, ucg_rate: float = 0.0) -> None:
        super().__init__(model, jit, device, antialias)
        self.ucg_rate = ucg_rate

    def forward(self, x: Tensor, no_dropout: bool = False) -> Tensor:
        features = super().forward(x).to(x.dtype)
        if self.ucg_rate <= 0 or no_dropout:
            return features
        return torch.bernoulli((1 - self.ucg_rate) * torch.ones(len(features), device=x.device))[:, None] * features


class FrozenOpenCLIPImageEmbedder(ClipImageEmbedder):
    """Encode images by the vision tower of an OpenCLIP.

    The tower is built without weights. A Stable unCLIP checkpoint holds them, with keys `embedder.model.…`.

    Args:
        arch: name of an architecture that `open_clip` knows.
        version: the pretrained weights that the public models started from; ignored, kept for the public configs.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        max_length: ignored, kept for the public configs.
        freeze: whether to take the tower's parameters out of training.
        layer: must be "pooled".
        antialias, ucg_rate: see `ClipImageEmbedder`.

    Raises:
        UserError: if there is no such architecture or layer.
    """

    awaits_weights = True

    def __init__(self, arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: str = "cuda",
                 max_length: int = 77, freeze: bool = True, layer: str = "pooled", antialias: bool = True,
                 ucg_rate: float = 0.0) -> None:
        if layer != "pooled":
            raise UserError(f"FrozenOpenCLIPImageEmbedder: layer {layer!r} is not supported; use pooled")
        if open_clip.get_model_config(arch) is None:
            raise UserError(f"arch {arch!r}: open_clip has no such architecture; use ViT-H-14, as Stable unCLIP does")
        clip = open_clip.create_model(arch)
        del clip.transformer  # reads texts; checkpoints do not have it
        super().__init__(clip, antialias=antialias, ucg_rate=ucg_rate)
        self.max_length, self.layer = max_length, layer
        if freeze:
            self.freeze()

    def freeze(self) -> None:
        """Take all parameters out of training."""
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, no_dropout: bool = False) -> Tensor:
        return super().forward(image, no_dropout)

    def encode_with_vision_transformer(self, img: Tensor) -> Tensor:
        """Return the embeddings (B, d) of images, none of them dropped."""
        return self(img, no_dropout=True)

    def encode(self, text: Tensor) -> Tensor:
        """Return the embeddings (B, d) of images, which the public code calls `text` here."""
        return self(text)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Noise image embeddings (B, d), and return their levels of noise as embeddings of a timestep.

    Args:
        clip_stats_path: file with mean and standard deviation of embeddings, (d,) each; None: 0 and 1.
        timestep_dim: d.
        args, kwargs: see `ImageConcatWithNoiseAugmentation`.
    """

    def __init__(self, *args: Any, clip_stats_path: str | Path | None = None, timestep_dim: int = 256, **kwargs: Any
                 ) -> None:
        super().__init__(*args, **kwargs)
        mean, std = torch.zeros(timestep_dim), torch.ones(timestep_dim)
        if clip_stats_path is not None:
            mean, std = torch.load(clip_stats_path, map_location="cpu", weights_only=True)
        self.register_buffer("data_mean", mean[None], persistent=False)
        self.register_buffer("data_std", std[None], persistent=False)
        self.time_embed: nn.Module = Timestep(timestep_dim)

    def scale(self, x: Tensor) -> Tensor:
        """Return embeddings of mean 0 and variance 1."""
        return (x - self.data_mean) / self.data_std

    def unscale(self, x: Tensor) -> Tensor:
        """Undo `scale`."""
        return x * self.data_std + self.data_mean

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return noised embeddings (B, d), and the embeddings (B, timestep_dim) of their levels of noise."""
        noised, level = super().forward(self.scale(x), noise_level)
        return self.unscale(noised), self.time_embed(level)
