"""The public path of InstructPix2Pix' model (Brooks, Holynski & Efros 2023, "InstructPix2Pix", CVPR).

Its condition is an image to edit, as input channels, and an instruction, as cross-attention context.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion import latent_diffusion
from ldm.models.diffusion.extra_channels import FIRST_LAYERS, widen_input
from ldm.modules.ema import LitEma

UNCONDITIONAL_SHARE = 0.05  # Sec. 3.2.1: of the text alone, the image alone, and both


class LatentDiffusion(latent_diffusion.LatentDiffusion):
    """A latent diffusion model that edits images.

    A batch holds the edited image (B, 3, H, W) in [-1, 1] under `first_stage_key`, and under `cond_stage_key` a dict of
    `c_concat`, the images to edit (B, 3, H, W), and `c_crossattn`, the instructions.

    Args (in addition to those of the base class):
        load_ema: whether averages in `ckpt_path` are used. Without, averaging starts from the loaded weights.
    """

    def __init__(self, first_stage_config: Mapping[str, Any], cond_stage_config: Mapping[str, Any] | str,
                 num_timesteps_cond: int | None = None, cond_stage_key: str = "image", *args: Any,
                 load_ema: bool = True, **kwargs: Any) -> None:
        self.load_ema = load_ema
        super().__init__(first_stage_config, cond_stage_config, num_timesteps_cond, cond_stage_key, *args, **kwargs)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        super().init_from_ckpt(path, ignore_keys, only_model)
        if self.use_ema and not self.load_ema:
            self.model_ema = LitEma(self.model)

    def adapt_weight(self, key: str, stored: Tensor, own: Tensor) -> Tensor:
        """Extend a first layer for fewer input channels by weights of zero, which ignore the image to edit at first."""
        return widen_input(stored, own) if key in FIRST_LAYERS else super().adapt_weight(key, stored, own)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, return_first_stage_outputs: bool = False,
                  force_c_encode: bool = False, cond_key: str | None = None, return_original_cond: bool = False,
                  bs: int | None = None, uncond: float = UNCONDITIONAL_SHARE) -> list[Any]:
        """Return latents and condition of a batch, [z, c], and on request more, as the base class does.

        Args:
            uncond: the share of samples without instruction, of those without image, and of those without both.
        """
        x = batch[k][:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        given = batch[cond_key or self.cond_stage_key]
        given = {"c_crossattn": list(given["c_crossattn"])[:bs], "c_concat": given["c_concat"][:bs].to(self.device)}
        inputs: list[Any] = [z, self._encode_edit(given, uncond)]
        if return_first_stage_outputs:
            inputs += [x, self.decode_first_stage(z)]
        return [*inputs, given] if return_original_cond else inputs

    def _encode_edit(self, given: Mapping[str, Any], uncond: float) -> dict[str, list[Tensor]]:
        """Return the encoded condition. For classifier-free guidance it is left out for a random part of the batch."""
        images = given["c_concat"]
        random = torch.rand(len(images), device=images.device)
        drops_text = (random < 2 * uncond)[:, None, None]
        keeps_image = 1 - ((random >= uncond).float() * (random < 3 * uncond).float())[:, None, None, None]
        empty = self.get_learned_conditioning([""])
        text = self.get_learned_conditioning(given["c_crossattn"]).detach()
        latents = self.encode_first_stage(images).mode().detach()
        return {"c_crossattn": [torch.where(drops_text, empty, text)], "c_concat": [keeps_image * latents]}

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 4, n_row: int = 4, inpaint: bool = False,
                   plot_progressive_rows: bool = False, plot_diffusion_rows: bool = False, **kwargs: Any
                   ) -> dict[str, Tensor]:
        """Return images of a batch and edited ones, as the base class does, and the images to edit as "reals"."""
        options = {**kwargs, "ddim_steps": None}  # its public code samples by all T steps
        shown = super().log_images(batch, N, n_row, inpaint=inpaint, plot_progressive_rows=plot_progressive_rows,
                                   plot_diffusion_rows=plot_diffusion_rows, **options)
        return {**shown, "reals": batch[self.cond_stage_key]["c_concat"][:N]}

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> list[Any]:
        return self.get_input(batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True,
                              return_original_cond=True, bs=count, uncond=0)
