"""Text-to-image models that see further input channels: inpainting, depth and upscaling, as Stability AI has them.

The names are those of the public configs of Stable Diffusion 2. Depth estimators and models of low-resolution images,
which those configs name, are not part of this package; a user's own can take their place.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.common.errors import UserError
from ldm.models.autoencoder import image_batch
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.frozen import freeze
from ldm.util import instantiate_from_config

FIRST_LAYERS = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


def widen_input(stored: Tensor, own: Tensor, channels: int | None = None) -> Tensor:
    """Return a layer's stored weights for more input channels, which get weights of zero.

    Args:
        stored: (out, in, kh, kw).
        own: (out, more, kh, kw), the shape that is needed.
        channels: how many of the stored input channels are kept; None: all.
    """
    if stored.shape == own.shape:
        return stored
    widened = torch.zeros_like(own)
    widened[:, :stored.shape[1] if channels is None else channels] = stored[:, :channels].to(own)
    return widened


class LatentFinetuneDiffusion(LatentDiffusion):
    """A base class of models whose U-Net sees further channels beside the latents.

    Args (in addition to those of `LatentDiffusion`):
        concat_keys: what of a batch becomes channels.
        finetune_keys: weights that get the further channels when `ckpt_path` is a model without them; None: none.
        keep_finetune_dims: number of input channels that the checkpoint has.
        c_concat_log_start, c_concat_log_end: the channels to decode for the log; None and None: nothing.
    """

    def __init__(self, concat_keys: Sequence[str], finetune_keys: Sequence[str] | None = FIRST_LAYERS,
                 keep_finetune_dims: int = 4, c_concat_log_start: int | None = None,
                 c_concat_log_end: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.cond_stage_trainable:
            raise UserError(f"cond_stage_trainable: {type(self).__name__} cannot train the condition's encoder")
        self.concat_keys = tuple(concat_keys)
        self.finetune_keys = finetune_keys
        self.keep_dims = keep_finetune_dims
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end

    def adapt_weight(self, key: str, stored: Tensor, own: Tensor) -> Tensor:
        if key not in (self.finetune_keys or ()):
            return super().adapt_weight(key, stored, own)
        return widen_input(stored, own, self.keep_dims)

    def further_channels(self, batch: Mapping[str, Any], key: str, z: Tensor, bs: int | None) -> Tensor:
        """Return what `batch[key]` adds to the channels of latents z (B, C, h, w): (B, c, h, w)."""
        raise NotImplementedError

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, cond_key: str | None = None, bs: int | None = None,
                  return_first_stage_outputs: bool = False) -> tuple[Any, ...]:
        """Return latents and condition of a batch, and on request images, reconstructions and texts."""
        z, c, *others = super().get_input(batch, self.first_stage_key, return_first_stage_outputs=True,
                                          force_c_encode=True, return_original_cond=True, bs=bs)
        channels = torch.cat([self.further_channels(batch, key, z, bs) for key in self.concat_keys], dim=1)
        conditions = {"c_concat": [channels], "c_crossattn": [c]}
        return (z, conditions, *others) if return_first_stage_outputs else (z, conditions)

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> Sequence[Any]:
        return self.get_input(batch, self.first_stage_key, bs=count, return_first_stage_outputs=True)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, *args: Any, **kwargs: Any
                   ) -> dict[str, Tensor]:
        """Return what the base class does, and the decoded channels if `c_concat_log_start` or its end is set.

        Inpainting and the rows of all T steps are never shown.
        """
        options = {**kwargs, "inpaint": False, "plot_progressive_rows": False}
        shown = super().log_images(batch, N, n_row, *args, **options)
        if self.c_concat_log_start is not None or self.c_concat_log_end is not None:
            channels = self.get_input(batch, self.first_stage_key, bs=N)[1]["c_concat"][0]
            decoded = self.decode_first_stage(channels[:, self.c_concat_log_start:self.c_concat_log_end])
            shown["c_concat_decoded"] = decoded
        return shown


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """An inpainting model. Its channels are a mask, 1 where the image is new, and the latents of the masked image.

    Args (in addition to those of `LatentFinetuneDiffusion`):
        masked_image_key: the one of `concat_keys` that is an image.
    """

    def __init__(self, concat_keys: Sequence[str] = ("mask", "masked_image"), masked_image_key: str = "masked_image",
                 *args: Any, **kwargs: Any) -> None:
        super().__init__(concat_keys, *args, **kwargs)
        if masked_image_key not in concat_keys:
            raise UserError(f"masked_image_key {masked_image_key}: must be one of concat_keys, {list(concat_keys)}")
        self.masked_image_key = masked_image_key

    def further_channels(self, batch: Mapping[str, Any], key: str, z: Tensor, bs: int | None) -> Tensor:
        images = image_batch(batch, key)[:bs].to(self.device)
        if key == self.masked_image_key:
            return self.get_first_stage_encoding(self.encode_first_stage(images))
        return F.interpolate(images, size=z.shape[-2:])

    @torch.no_grad()
    def log_images(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        shown = super().log_images(*args, **kwargs)
        return {**shown, "masked_image": image_batch(_logged_batch(*args, **kwargs), self.masked_image_key)}


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """A model that sees the depth of the image, which another model estimates.

    Args (in addition to those of `LatentFinetuneDiffusion`):
        depth_stage_config: config of the estimator: images to depth (B, 1, H, W).
    """

    def __init__(self, depth_stage_config: Mapping[str, Any], concat_keys: Sequence[str] = ("midas_in",), *args: Any,
                 **kwargs: Any) -> None:
        super().__init__(concat_keys, *args, **kwargs)
        self.depth_model = instantiate_from_config(depth_stage_config)
        self.depth_stage_key = self.concat_keys[0]

    def further_channels(self, batch: Mapping[str, Any], key: str, z: Tensor, bs: int | None) -> Tensor:
        depth = self.depth_model(batch[key][:bs].to(self.device))
        depth = F.interpolate(depth, size=z.shape[2:], mode="bicubic", align_corners=False)
        return scale_to_signed(depth, offset=0.001)

    @torch.no_grad()
    def log_images(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        shown = super().log_images(*args, **kwargs)
        images = _logged_batch(*args, **kwargs)[self.depth_stage_key]
        return {**shown, "depth": scale_to_signed(self.depth_model(images.to(self.device)))}


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """A model that sees a small image, perhaps with noise.

    Args (in addition to those of `LatentFinetuneDiffusion`):
        reshuffle_patch_size: number of parts per side that become channels; None: none.
        low_scale_config: config of a model that returns the small images' channels and the level of their noise.
        low_scale_key: the one of `concat_keys` that this model reads.
    """

    def __init__(self, concat_keys: Sequence[str] = ("lr",), reshuffle_patch_size: int | None = None,
                 low_scale_config: Mapping[str, Any] | None = None, low_scale_key: str | None = None, *args: Any,
                 **kwargs: Any) -> None:
        super().__init__(concat_keys, *args, **kwargs)
        self.reshuffle_patch_size = reshuffle_patch_size
        self.low_scale_key = low_scale_key
        self.low_scale_model = None if low_scale_config is None else freeze(instantiate_from_config(low_scale_config))

    def further_channels(self, batch: Mapping[str, Any], key: str, z: Tensor, bs: int | None) -> Tensor:
        images = image_batch(batch, key)[:bs].to(self.device)
        parts = self.reshuffle_patch_size
        if parts is not None:
            split = images.unflatten(3, (parts, -1)).unflatten(2, (parts, -1))  # (B, C, p1, h, p2, w)
            images = split.permute(0, 2, 4, 1, 3, 5).flatten(1, 3)
        return images

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, cond_key: str | None = None, bs: int | None = None,
                  return_first_stage_outputs: bool = False) -> tuple[Any, ...]:
        z, conditions, *others = super().get_input(batch, k, cond_key, bs, return_first_stage_outputs)
        if self.low_scale_model is not None and self.low_scale_key in self.concat_keys:
            channels, level = self.low_scale_model(conditions["c_concat"][0])
            conditions = {**conditions, "c_concat": [channels], "c_adm": level}
        return (z, conditions, *others)

    @torch.no_grad()
    def log_images(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        shown = super().log_images(*args, **kwargs)
        return {**shown, "lr": image_batch(_logged_batch(*args, **kwargs), self.concat_keys[0])}


def _logged_batch(batch: Mapping[str, Any], *_: Any, **__: Any) -> Mapping[str, Any]:
    """Return the batch among the arguments of `log_images`."""
    return batch


def scale_to_signed(maps: Tensor, offset: float = 0.0) -> Tensor:
    """Scale each of B maps (B, 1, H, W) to [-1, 1]; `offset` is added to its range."""
    lowest, highest = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return 2 * (maps - lowest) / (highest - lowest + offset) - 1
