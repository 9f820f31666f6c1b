"""Autoencoders whose latents are taken from a codebook (Esser et al., "Taming Transformers", CVPR 2021)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights
from ldm.common.errors import UserError
from ldm.models.first_stage import FirstStage
from ldm.modules.ema import LitEma

COMMITMENT = 0.25  # beta of the quantizer's loss
SIZE_STEP = 16  # of `batch_resize_range`
LARGEST_FIRST = 5  # steps at the largest size: what does not fit into memory shows at once


class VQModel(FirstStage):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, embed_dim, H/f, W/f), each the nearest of `n_embed` vectors.

    Args (beside those of `FirstStage`):
        n_embed, embed_dim: how many vectors the codebook has, and of how many numbers.
        ckpt_path, ignore_keys: weights to start from, without the keys that begin with one of these.
        batch_resize_range: smallest and largest side; every training batch is resized to one between them.
        remap: .npy file of the codes in use; others are replaced by random ones of these in the codes that are given.
        sane_index_shape: codes come as (B, h, w) rather than in one row.
        use_ema: keep an exponential moving average of the weights; validation looks at it too ("val_ema/...").
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
        self.embed_dim, self.n_embed, self.use_ema = embed_dim, n_embed, use_ema
        self.sizes = None if batch_resize_range is None else _sizes(batch_resize_range)
        if remap is not None and not Path(remap).is_file():
            raise UserError(f"remap {remap}: no such file; give a .npy file of the codes in use")
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=COMMITMENT, remap=remap,
                                         sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.quantize.unread_keys = ("used",)  # the file `remap` has them, and few checkpoints
        if use_ema:
            self.model_ema = LitEma(self)
        loaded = load_weights(self, ckpt_path, ignore_keys) if ckpt_path is not None else set()
        if use_ema and not {f"model_ema.{name}" for name in self.model_ema.state_dict()} <= loaded:
            self.model_ema = LitEma(self)  # the file had no averages: they start from these weights

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Latents before quantization."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Any:
        """(latents, the quantizer's loss, (None, None, codes))."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Latents of the codebook to images."""
        return self._decoded(quant)

    def _decoded(self, quant: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) to images."""
        return self._decoded(self.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, self.embed_dim)))

    def forward(self, x: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """(reconstructions, the quantizer's loss), and the codes where they are asked for."""
        quant, loss, (_, _, codes) = self.quantize(self.encode_to_prequant(x))
        found = self._decoded(quant), loss, codes
        return found if return_pred_indices else found[:2]

    def reconstructed(self, images: Tensor) -> tuple[Tensor, ...]:
        return self(images, return_pred_indices=True)

    def pictures(self, batch: Mapping[str, Tensor], split: str) -> Tensor:
        images = super().pictures(batch, split)
        if self.sizes is None or split != "train":
            return images
        first = self.global_step < LARGEST_FIRST
        size = self.sizes[-1 if first else int(torch.randint(len(self.sizes), ()))]
        return images if size == images.shape[2] else F.interpolate(images, size=size, mode="bicubic")

    def trained_parameters(self) -> list[nn.Parameter]:
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for part in parts for parameter in part.parameters()]

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within it the model has its averaged weights, where it keeps any."""
        if not self.use_ema:
            yield
            return
        with self.model_ema.averaged(self):
            yield

    def on_train_batch_end(self, *_: Any) -> None:
        if self.use_ema:
            self.model_ema(self)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        if self.use_ema:
            with self.ema_scope():
                self.step(batch, "val_ema")
        return loss

    def shown(self, images: Tensor) -> Tensor:
        with self.ema_scope():
            return super().shown(images)


class VQModelInterface(VQModel):
    """The same for diffusion: latents are quantized when they are decoded, so that diffusion works on smooth ones."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantization, (B, embed_dim, H/f, W/f)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Such latents to images, by way of the codebook unless `force_not_quantize`."""
        return self._decoded(h if force_not_quantize else self.quantize(h)[0])


def _sizes(limits: Sequence[int]) -> range:
    if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
        raise UserError(f"batch_resize_range {list(limits)}: give the smallest and the largest side")
    return range(limits[0], limits[1] + 1, SIZE_STEP)
