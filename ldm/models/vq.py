"""Autoencoders whose latents come from a codebook (Esser et al., "Taming Transformers", CVPR 2021)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights
from ldm.common.errors import UserError
from ldm.models.first_stage import FirstStage
from ldm.models.initial_weights import LoadsInitialWeights

COMMITMENT = 0.25  # beta of the quantizer's loss
SIZE_STEP = 16  # between the sizes of `batch_resize_range`
LARGEST_FIRST = 5  # steps at the largest size, so that a lack of memory shows at once


class VQModel(LoadsInitialWeights, FirstStage):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, embed_dim, H/f, W/f), each the nearest of `n_embed` vectors.

    Args (in addition to those of `FirstStage`):
        n_embed, embed_dim: number of vectors in the codebook, and their width.
        ckpt_path, ignore_keys: initial weights, without the keys that begin with one of `ignore_keys`.
        batch_resize_range: smallest and largest side; every training batch is resized to a random size between them.
        remap: .npy file of the codes in use. Codes are then indices into it, and unused codes become random ones.
        sane_index_shape: return codes as (B, h, w) instead of one flat row.
        use_ema: keep an exponential moving average of the weights; validation logs it as well, as "val_ema/...".
    """

    def __init__(self, ddconfig: Mapping[str, Any], lossconfig: Mapping[str, Any], n_embed: int, embed_dim: int,
                 ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), image_key: str = "image",
                 colorize_nlabels: int | None = None, monitor: str | None = None,
                 batch_resize_range: Sequence[int] | None = None, scheduler_config: Mapping[str, Any] | None = None,
                 lr_g_factor: float = 1.0, remap: str | None = None, sane_index_shape: bool = False,
                 use_ema: bool = False) -> None:
        super().__init__(ddconfig, lossconfig, double_z=False, image_key=image_key, monitor=monitor,
                         scheduler_config=scheduler_config, colorize_nlabels=colorize_nlabels,
                         lr_g_factor=lr_g_factor)
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.batch_resize_range = batch_resize_range
        self.sizes = None if batch_resize_range is None else _size_range(batch_resize_range)
        if remap is not None and not Path(remap).is_file():
            raise UserError(f"remap {remap}: no such file; give a .npy file of the codes in use")
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=COMMITMENT, remap=remap,
                                         sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.quantize.unread_keys = ("used",)  # comes from the file `remap`, and few checkpoints have it
        self.keep_averages(use_ema)
        self.set_initial_weights(ckpt_path, ignore_keys=ignore_keys)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = ()) -> None:
        self.restart_averages(load_weights(self, path, ignore_keys, self.optional_keys()))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Return the latents of images before quantization, contiguous."""
        return self.quant_conv(self.encoder(x)).contiguous()

    def encode(self, x: Tensor) -> Any:
        """Return (quantized latents, the quantizer's loss, (None, None, codes))."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Return the images of quantized latents."""
        return self._decode_latents(quant)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Return the images of codes (B, h, w)."""
        quant = self.quantize.get_codebook_entry(code_b.flatten(), (*code_b.shape, self.embed_dim))
        return self._decode_latents(quant)

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Return (reconstructions, the quantizer's loss), and the codes with `return_pred_indices`."""
        quant, loss, (_, _, codes) = self.quantize(self.encode_to_prequant(input))
        reconstructions = self._decode_latents(quant)
        return (reconstructions, loss, codes) if return_pred_indices else (reconstructions, loss)

    def reconstruct(self, images: Tensor) -> tuple[Tensor, ...]:
        return self(images, return_pred_indices=True)

    def input_images(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        images = super().input_images(batch, split)
        if self.sizes is None or split != "train":
            return images
        if self.global_step < LARGEST_FIRST:
            size = self.sizes[-1]
        else:
            size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return images if size == images.shape[2] else F.interpolate(images, size=size, mode="bicubic")

    def trained_parameters(self) -> list[nn.Parameter]:
        modules = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for module in modules for parameter in module.parameters()]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], only_inputs: bool = False, plot_ema: bool = False,
                   N: int | None = None, **_: Any) -> dict[str, Tensor]:
        """Return inputs and reconstructions; with `plot_ema` also those with the averaged weights."""
        images = self.logged_inputs(batch, N)
        shown = {"inputs": self.to_rgb(images)}
        if only_inputs:
            return shown
        shown["reconstructions"] = self.to_rgb(self(images)[0])
        if plot_ema:
            with self.ema_scope():
                shown["reconstructions_ema"] = self.to_rgb(self(images)[0])
        return shown


class VQModelInterface(VQModel):
    """A `VQModel` for diffusion: `decode` quantizes instead of `encode`, so that diffusion works on smooth latents."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents of images before quantization, (B, embed_dim, H/f, W/f)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Return the images of such latents, quantized first unless `force_not_quantize`."""
        return self._decode_latents(h if force_not_quantize else self.quantize(h)[0])


def _size_range(limits: Sequence[int]) -> range:
    if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
        raise UserError(f"batch_resize_range {list(limits)}: give the smallest and the largest side")
    return range(limits[0], limits[1] + 1, SIZE_STEP)
