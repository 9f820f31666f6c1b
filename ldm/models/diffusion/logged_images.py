"""The images that a diffusion model shows of itself in the log, under the names of the LDM family."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.diffusion.ancestral_sampling import timesteps_of
from ldm.util import isimage, ismap, log_txt_as_img

TEXT_KEYS = ("caption", "txt")
CLASS_KEYS = ("class_label", "cls")
TEXT_SIZE = 25  # share of an image's height that a line of a logged caption takes, as a divisor


def rows_of_images(states: Sequence[Tensor]) -> Tensor:
    """Return a grid (3, H, W): for each of B images, (B, C, H, W), a row of its states."""
    return make_grid(torch.stack(list(states), dim=1).flatten(0, 1), nrow=len(states))


def pick(shown: dict[str, Tensor], keys: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the entries called `keys`, or all of them if none of the keys exists."""
    chosen = {key: shown[key] for key in keys or () if key in shown}
    return chosen or shown


class LogsDiffusion:
    """Mixin of what both kinds of models log."""

    def noised_states(self, x_start: Tensor) -> list[Tensor]:
        """Return `x_start` (B, C, H, W) with the noise of every `log_every_t`-th timestep and of the last one."""
        steps = [*range(0, self.num_timesteps, self.log_every_t)]
        if steps[-1] != self.num_timesteps - 1:
            steps.append(self.num_timesteps - 1)
        return [self.q_sample(x_start=x_start, t=timesteps_of(x_start, i), noise=torch.randn_like(x_start))
                for i in steps]

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        return rows_of_images(samples)


class LogsPixelDiffusion(LogsDiffusion):
    """Mixin for models of images without a condition."""

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, sample: bool = True,
                   return_keys: Sequence[str] | None = None, **_: Any) -> dict[str, Tensor]:
        """Return images of a batch, their noised versions, and new samples with their states on the way.

        Args:
            N, n_row: number of images, and of those that are shown as rows of noised versions.
            sample: whether to sample; it takes all T steps.
            return_keys: names of the entries to return; None: all.
        """
        images = self.get_input(batch, self.first_stage_key).to(self.device)[:N]
        shown = {"inputs": images, "diffusion_row": rows_of_images(self.noised_states(images[:n_row]))}
        if sample:
            with self.ema_scope("Plotting"):
                samples, states = self.sample(batch_size=len(images), return_intermediates=True)
            shown |= {"samples": samples, "denoise_row": rows_of_images(states)}
        return pick(shown, return_keys)


class LogsLatentDiffusion(LogsDiffusion):
    """Mixin for models of latents with conditions."""

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, sample: bool = True, ddim_steps: int | None = 200,
        ddim_eta: float = 1.0, return_keys: Sequence[str] | None = None, quantize_denoised: bool = True,
        inpaint: bool = True, plot_denoise_rows: bool = False, plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True, unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None, use_ema_scope: bool = True, **_: Any,
    ) -> dict[str, Tensor]:
        """Return images of a batch, their reconstructions and conditions, and samples for these conditions.

        Args:
            N, n_row: number of images, and of those that are shown as rows of noised versions.
            sample, inpaint: whether to sample at all, and inside and outside a square in the center.
            ddim_steps, ddim_eta: settings of DDIM; without steps, all T steps of the chain itself.
            return_keys: names of the entries to return; None: all.
            quantize_denoised: sample once more with predictions from the codebook, if the first stage has one.
            plot_denoise_rows, plot_progressive_rows, plot_diffusion_rows: show states on the way as rows: of the
                samples, of predictions in all T steps, which take long, and of the noised batch.
            unconditional_guidance_scale, unconditional_guidance_label: above 1, sample once more with guidance; the
                label stands for "no condition", see `get_unconditional_conditioning`.
            use_ema_scope: whether to sample with the averaged weights.
        """
        batch = batch if isinstance(batch, Mapping) else batch[0]  # of two, the photos
        scope = self.ema_scope if use_ema_scope else nullcontext
        z, c, x, xrec, xc = self.logged_inputs(batch, N)
        count = len(x)
        shown = {"inputs": x, "reconstruction": xrec, **self._show_condition(batch, x, c, xc)}
        if plot_diffusion_rows:
            shown["diffusion_row"] = self._get_denoise_row_from_list(self.noised_states(z[:n_row]))

        def draw(title: str, **settings: Any) -> tuple[Tensor, Any]:
            """Return images of latents sampled for the batch's conditions, and the states on the way."""
            with scope(title):
                latents, states = self.sample_log(cond=c, batch_size=count, ddim=ddim_steps is not None,
                                                  ddim_steps=ddim_steps, eta=ddim_eta, **settings)
            return self.decode_first_stage(latents), states

        if sample:
            shown["samples"], states = draw("Sampling")
            if plot_denoise_rows:
                states = states["x_inter"] if isinstance(states, Mapping) else states
                shown["denoise_row"] = self._get_denoise_row_from_list(states)
            shown |= self._sample_otherwise(draw, c, count, quantize_denoised, unconditional_guidance_scale,
                                            unconditional_guidance_label)
            shown |= self._sample_inpainted(draw, z) if inpaint else {}
        if plot_progressive_rows:
            shown["progressive_row"] = self._show_progress(c, count, scope)
        return pick(shown, return_keys)

    def logged_inputs(self, batch: Mapping[str, Any], count: int) -> Sequence[Any]:
        """Return latents, condition, images, reconstructions and the condition before its encoding."""
        return self.get_input(batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True,
                              return_original_cond=True, bs=count)

    def _sample_otherwise(self, draw: Callable[..., tuple[Tensor, Any]], c: Any, count: int, quantize_denoised: bool,
                          scale: float, label: Any) -> dict[str, Tensor]:
        """Return samples that are quantized, if the first stage has a codebook, and samples with guidance."""
        shown: dict[str, Tensor] = {}
        if quantize_denoised and not isinstance(self.first_stage_model, AutoencoderKL | IdentityFirstStage):
            shown["samples_x0_quantized"], _ = draw("Plotting Quantized Denoised", quantize_denoised=True)
        if scale > 1.0:
            unconditional = self.get_unconditional_conditioning(count, label)
            if isinstance(c, Mapping) and not isinstance(unconditional, Mapping):  # all but the text stays
                unconditional = {**c, "c_crossattn": [unconditional]}
            shown[f"samples_cfg_scale_{scale:.2f}"], _ = draw(
                "Sampling with classifier-free guidance", unconditional_guidance_scale=scale,
                unconditional_conditioning=unconditional)
        return shown

    def _sample_inpainted(self, draw: Callable[..., tuple[Tensor, Any]], z: Tensor) -> dict[str, Tensor]:
        """Return samples of which a square in the center is new, its mask, and samples that keep only the square.

        In CompVis' code both kinds of samples had the same mask, by mistake; this follows Stability AI.
        """
        height, width = z.shape[2:]
        mask = torch.ones(len(z), 1, height, width, device=z.device)
        mask[..., height // 4:3 * height // 4, width // 4:3 * width // 4] = 0
        shown = {"samples_inpainting": draw("Plotting Inpaint", x0=z, mask=mask)[0]}
        return {**shown, "mask": mask, "samples_outpainting": draw("Plotting Outpaint", x0=z, mask=1 - mask)[0]}

    def _show_progress(self, c: Any, count: int, scope: Callable[..., AbstractContextManager[None]]) -> Tensor:
        with scope("Plotting Progressives"):
            _, predictions = self.progressive_denoising(c, shape=self.latent_shape, batch_size=count)
        return self._get_denoise_row_from_list(predictions, desc="Progressive Generation")

    def _show_condition(self, batch: Mapping[str, Any], x: Tensor, c: Any, xc: Any) -> dict[str, Tensor]:
        """Return the conditions of images x as images: text is written, maps get colors."""
        shown: dict[str, Tensor] = {}
        if self.model.conditioning_key is None:
            return shown
        labels = "human_label" if self.cond_stage_key in CLASS_KEYS else self.cond_stage_key
        if hasattr(self.cond_stage_model, "decode"):
            shown["conditioning"] = xc = self.cond_stage_model.decode(c)
        elif self.cond_stage_key in TEXT_KEYS + CLASS_KEYS and labels in batch:
            size = max(1, x.shape[2] // TEXT_SIZE)
            shown["conditioning"] = log_txt_as_img((x.shape[3], x.shape[2]), batch[labels][:len(x)], size=size)
        elif isimage(xc):
            shown["conditioning"] = xc
        if ismap(xc):
            shown["original_conditioning"] = self.to_rgb(xc)
        return shown

    def _get_denoise_row_from_list(self, samples: Sequence[Tensor], desc: str = "",
                                   force_no_decoder_quantization: bool = False) -> Tensor:
        """Return a grid of the decoded states `samples`, one row for each image."""
        keep = force_no_decoder_quantization
        return rows_of_images([self.decode_first_stage(z.to(self.device), force_not_quantize=keep) for z in samples])

    @torch.no_grad()
    def to_rgb(self, x: Tensor) -> Tensor:
        """Return maps (B, C, H, W) as images in [-1, 1]; their channels get random colors, which stay the same."""
        x = x.float()
        if not hasattr(self, "colorize"):
            self.colorize = torch.randn(3, x.shape[1], 1, 1).to(x)
        colored = F.conv2d(x, self.colorize)
        return 2.0 * (colored - colored.min()) / (colored.max() - colored.min()) - 1.0
