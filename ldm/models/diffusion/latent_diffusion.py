"""Latent diffusion (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022)."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import ListConfig
from torch import Tensor, nn

from ldm.checkpoints.absent_parts import FIRST_STAGE, TEXT_ENCODER
from ldm.common.errors import UserError
from ldm.models.diffusion.ancestral_sampling import ConditionalAncestralSampling, first_rows
from ldm.models.diffusion.embedding_training import TrainsEmbeddings
from ldm.models.diffusion.logged_images import CLASS_KEYS, LogsLatentDiffusion
from ldm.models.diffusion.pixel_diffusion import DDPM
from ldm.models.diffusion.pixel_sizes import KnowsPixelSizes
from ldm.models.diffusion.wrapper import Condition, as_context
from ldm.models.first_stage_precision import run_first_stage
from ldm.models.frozen import freeze
from ldm.models.vq import VQModelInterface
from ldm.modules.context import PromptContext
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.encoders.sizes import SIZE_COLUMNS
from ldm.sampling.ddim import DDIM
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

IS_FIRST_STAGE, IS_UNCONDITIONAL = "__is_first_stage__", "__is_unconditional__"  # in place of a `cond_stage_config`
UNENCODED_KEYS = ("coordinates_bbox",)  # conditions that are tensors, but no images


class LatentDiffusion(KnowsPixelSizes, TrainsEmbeddings, ConditionalAncestralSampling, LogsLatentDiffusion, DDPM):
    """A diffusion model on the latents of a frozen first stage, conditioned on the output of a second module.

    Args (in addition to those of `DDPM`):
        first_stage_config: config of the autoencoder; it is never trained here.
        cond_stage_config: config of the condition's encoder, "__is_first_stage__" (the autoencoder encodes conditions
            as well) or "__is_unconditional__".
        num_timesteps_cond: above 1, conditions become noisy as well, see `make_cond_schedule`.
        cond_stage_key: key of a batch's condition, such as "caption".
        cond_stage_trainable: whether the condition's encoder is trained as well.
        concat_mode: without a `conditioning_key`: "concat" instead of "crossattn".
        cond_stage_forward: name of the encoder's method to call; None: `encode` if it has one, else `forward`.
        scale_factor: factor of the latents, chosen so that their variance is about 1.
        scale_by_std: measure that factor on the first batch instead, unless `ckpt_path` has it.
        args: further positional arguments for `DDPM`.
        force_null_conditioning: keep the `conditioning_key`, but give no condition in training.
        personalization_config: config of an `EmbeddingManager`, see `TrainsEmbeddings` for this and the next three.
        embedding_reg_weight, unfreeze_model, model_lr: see there.
        reg_weight: weight of the second of two batches in a training step, images of the super-category (DreamBooth).
            If it is given, no vectors are trained.
        object_weight: weight of an object's error, relative to the background's, for batches that mark objects by
            "objects" (B, 1, H, W) in [0, 1]; a model learns objects faster with it.
        vae_path, text_encoder_path: checkpoint, diffusers folder or part of one whose first stage or text encoder is
            loaded in place of those in `ckpt_path`, which may lack them. Two text encoders may be in two files.
        disable_first_stage_autocast: run the first stage in the precision of its weights, also under autocast. That of
            Stable Diffusion XL overflows in float16.

    Tiled processing (`split_input_params`, `get_fold_unfold`, `delta_border`) of the original is left out.

    Raises:
        UserError: if params are not supported or contradict each other.
    """

    def __init__(self, first_stage_config: Mapping[str, Any], cond_stage_config: Mapping[str, Any] | str,
                 num_timesteps_cond: int | None = None, cond_stage_key: str = "image",
                 cond_stage_trainable: bool = False, concat_mode: bool = True, cond_stage_forward: str | None = None,
                 conditioning_key: str | None = None, scale_factor: float = 1.0, scale_by_std: bool = False,
                 *args: Any, force_null_conditioning: bool = False,
                 personalization_config: Mapping[str, Any] | None = None, embedding_reg_weight: float = 0.0,
                 unfreeze_model: bool = False, model_lr: float = 0.0, reg_weight: float | None = None,
                 object_weight: float = 1.0, vae_path: str | None = None,
                 text_encoder_path: str | Sequence[str] | None = None,
                 disable_first_stage_autocast: bool = False, **kwargs: Any) -> None:
        self.part_paths = {prefix: path for prefix, path in ((FIRST_STAGE, vae_path), (TEXT_ENCODER, text_encoder_path))
                           if path is not None}
        self.num_timesteps_cond = num_timesteps_cond or 1
        self.disable_first_stage_autocast = disable_first_stage_autocast
        self.force_null_conditioning = force_null_conditioning
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == IS_UNCONDITIONAL and not force_null_conditioning:
            conditioning_key = None
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.concat_mode = concat_mode
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.cond_stage_trainable = cond_stage_trainable
        self.clip_denoised = False  # latents have no range
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        # The autoencoder and the condition's encoder
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.num_downs = max(0, len(getattr(getattr(self.first_stage_model, "encoder", None), "down", ())) - 1)
        self.bbox_tokenizer = None
        self.restarted_from_ckpt = False
        self.object_weight = object_weight
        self.embedding_manager: nn.Module | None = None
        self.embedding_reg_weight = embedding_reg_weight
        self.unfreeze_model, self.model_lr = unfreeze_model, model_lr
        self.reg_weight = 1.0 if reg_weight is None else reg_weight
        self.require_present_parts()
        self.trains_pairs = reg_weight is not None
        if personalization_config is not None:
            self.load_initial_weights()  # the vectors start from the encoder's words
            self.personalize(personalization_config)

    def load_initial_weights(self) -> None:
        super().load_initial_weights()
        self.restarted_from_ckpt = self._initial_weights[0] is not None

    def register_schedule(self, given_betas: Sequence[float] | Tensor | None = None, beta_schedule: str = "linear",
                          timesteps: int = 1000, linear_start: float = 1e-4, linear_end: float = 2e-2,
                          cosine_s: float = 8e-3, zero_terminal_snr: bool = False) -> None:
        super().register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s,
                                  zero_terminal_snr)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Set `first_stage_model`, frozen, without the loss (and its discriminator) that trained it."""
        self.first_stage_model = freeze(instantiate_from_config(config))
        if hasattr(self.first_stage_model, "loss"):
            self.first_stage_model.loss = None

    def instantiate_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Set `cond_stage_model`, frozen unless `cond_stage_trainable`; None for an unconditional model."""
        if isinstance(config, str):
            if self.cond_stage_trainable or config not in (IS_FIRST_STAGE, IS_UNCONDITIONAL):
                raise UserError(f"cond_stage_config {config!r} with cond_stage_trainable {self.cond_stage_trainable}: "
                                f"give a config, {IS_FIRST_STAGE} or {IS_UNCONDITIONAL}; these two are never trained")
            self.cond_stage_model = self.first_stage_model if config == IS_FIRST_STAGE else None
            return
        model = instantiate_from_config(config)
        model = model if self.cond_stage_trainable else freeze(model)
        if not isinstance(model, GeneralConditioner):
            self.cond_stage_model = model
            return
        # Its weights have the names of public files; `cond_stage_model` is a plain reference, not a second module.
        self.conditioner = model
        object.__setattr__(self, "cond_stage_model", model)

    # Latents

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None,
                      sample: bool = True) -> Tensor:
        """Return the scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        If the first stage returns a posterior, they are sampled from it, or are its mode if `sample` is False.
        """
        encoded = self.encode_first_stage(images)
        if isinstance(encoded, DiagonalGaussianDistribution):
            encoded = encoded.sample(generator) if sample else encoded.mode()
        return self.scale_factor * encoded

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Return what the first stage's `encode` returns for images: a posterior, or latents that are not scaled."""
        return run_first_stage(self.first_stage_model, self.first_stage_model.encode, x,
                               autocast=not self.disable_first_stage_autocast)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Return scaled latents (B, C, h, w) from what `encode_first_stage` returns; of a posterior, a new sample."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample()
        if not isinstance(encoder_posterior, Tensor):
            raise UserError(f"the first stage encodes images as {type(encoder_posterior).__name__}; diffusion needs a "
                            "posterior or a tensor, so use ldm.models.autoencoder.VQModelInterface for a VQModel")
        return (self.scale_factor * encoder_posterior).contiguous()

    def differentiable_decode_first_stage(self, z: Tensor, predict_cids: bool = False,
                                          force_not_quantize: bool = False) -> Tensor:
        """Return the images (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w).

        Args:
            predict_cids: z are codes (B, h, w) of the codebook, or their logits (B, n, h, w).
            force_not_quantize: latents of a `VQModelInterface` are not replaced by the codebook's.
        """
        if predict_cids:
            codes = z.argmax(dim=1) if z.ndim == 4 else z
            quantizer = self.first_stage_model.quantize
            z = quantizer.get_codebook_entry(codes, shape=None).movedim(-1, 1).contiguous()
        z = 1.0 / self.scale_factor * z
        decode = self.first_stage_model.decode
        if isinstance(self.first_stage_model, VQModelInterface):
            decode = partial(decode, force_not_quantize=predict_cids or force_not_quantize)
        return run_first_stage(self.first_stage_model, decode, z, autocast=not self.disable_first_stage_autocast)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Return what `differentiable_decode_first_stage` does, without gradients."""
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    # Conditions

    @property
    def trains_condition(self) -> bool:
        """Whether conditions are encoded in `forward`, with gradients, instead of in `get_input`."""
        return self.cond_stage_trainable or self.embedding_manager is not None

    def get_learned_conditioning(self, c: Any) -> Tensor | PromptContext:
        """Return the encoded condition (such as a list of B prompts), (B, N, d).

        With a `GeneralConditioner` it is what `GeneralConditioner.condition` returns, of prompts or of a batch that
        also has sizes.
        """
        stage = self.cond_stage_model
        managed = {} if self.embedding_manager is None else {"embedding_manager": self.embedding_manager}
        if isinstance(stage, GeneralConditioner):
            return stage.condition(c, self.pixel_size, **managed)
        method = self.cond_stage_forward or ("encode" if hasattr(stage, "encode") else "__call__")
        encoded = getattr(stage, method)(c, **managed)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    @torch.no_grad()
    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Return the encoding of "no condition" for `batch_size` images.

        Args:
            null_label: what to encode for one image; None: the empty prompt, or the label of the classes' encoder.
                A `GeneralConditioner` has zeros for the empty prompt.
        """
        if isinstance(self.cond_stage_model, GeneralConditioner):
            return self.cond_stage_model.unconditional_condition(batch_size, null_label, self.pixel_size)
        if null_label is None and self.cond_stage_key in CLASS_KEYS:
            labels = self.cond_stage_model.get_unconditional_conditioning(batch_size, device=self.device)
            return self.get_learned_conditioning(labels)
        if null_label is None:
            if not isinstance(self.cond_stage_model, PromptEncoder):
                raise UserError("unconditional_guidance_label: needed, since this model's condition is no prompt")
            null_label = [""]
        label = list(null_label) if isinstance(null_label, ListConfig) else null_label
        encoded = self.get_learned_conditioning(label.to(self.device) if isinstance(label, Tensor) else label)
        if isinstance(encoded, list):
            return [one.expand(batch_size, *one.shape[1:]).to(self.device) for one in encoded]
        return encoded.expand(batch_size, *encoded.shape[1:]).to(self.device)

    def noisy_condition(self, c: Tensor, t: Tensor) -> Tensor:
        """Return a condition with the noise that `make_cond_schedule` gives it at timesteps t (B,)."""
        return self.q_sample(x_start=c, t=self.cond_ids[t.cpu()].to(c.device), noise=torch.randn_like(c.float()))

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, return_first_stage_outputs: bool = False,
                  force_c_encode: bool = False, cond_key: str | None = None, return_original_cond: bool = False,
                  bs: int | None = None, return_x: bool = False) -> list[Any]:
        """Return latents and condition of a batch, [z, c], and on request more.

        Args:
            k: key of the images.
            return_first_stage_outputs: append the images and their reconstructions.
            force_c_encode: encode the condition even if it is trained and `forward` would encode it.
            cond_key: key of the condition; None: `cond_stage_key`.
            return_original_cond: append the condition before its encoding.
            bs: number of images to take; None: all.
            return_x: append the images.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        c = original = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            original = self._original_condition(batch, x, cond_key or self.cond_stage_key)
            c = original
            if force_c_encode or not self.trains_condition:
                c = self.get_learned_conditioning(c)
            c = first_rows(c, bs) if isinstance(c, Mapping) else c[:bs]
        inputs = [z, c]
        if return_first_stage_outputs:
            inputs += [x, self.decode_first_stage(z)]
        if return_x:
            inputs.append(x)
        return [*inputs, original] if return_original_cond else inputs

    def _original_condition(self, batch: Mapping[str, Any], x: Tensor, key: str) -> Any:
        """Return what the condition's encoder reads: images like x, the batch itself for classes, or texts."""
        if key == self.first_stage_key:
            return x
        if key in CLASS_KEYS:
            return batch
        value = batch[key]
        if isinstance(self.cond_stage_model, GeneralConditioner):
            return {key: list(value), **{name: batch[name] for name in SIZE_COLUMNS if name in batch}}
        if isinstance(value, Tensor):
            is_image = value.ndim > 2 and key not in UNENCODED_KEYS
            return (DDPM.get_input(self, batch, key) if is_image else value).to(self.device)
        return list(value) if isinstance(value, tuple) else value

    # Training

    def shared_step(self, batch: Mapping[str, Any], **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x, c = self.get_input(batch, self.first_stage_key)
        weight = self.loss_weight(batch, x.shape[-2:])
        return self(x, c) if weight is None else self(x, c, weight=weight)

    def loss_weight(self, batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
        """Return the weights of the positions' errors, (B, 1, *size), or None if all are 1."""
        if self.object_weight == 1 or "objects" not in batch:
            return None
        objects = F.interpolate(batch["objects"], size=tuple(size), mode="area")
        return 1 + (self.object_weight - 1) * objects

    def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what `p_losses` does for latents x and their condition, at random timesteps.

        Args:
            x: (B, C, h, w).
            c: the encoded condition, or a raw one if its encoder is trained.
        """
        t = self.sample_timesteps(len(x), self.device)
        if self.model.conditioning_key is not None:
            if c is None:
                raise UserError(f"conditioning_key {self.model.conditioning_key}: the batch has no condition")
            if self.trains_condition:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self.noisy_condition(c, t)
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None,
                 weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss at timesteps t, and its terms for the log. Arguments as for `errors_per_sample`."""
        return self.regularize(*self.loss_and_terms(self.errors_per_sample(x_start, cond, t, noise, weight), t))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, or of two: photos and, weighted by `reg_weight`, images of the super-category."""
        if isinstance(batch, Mapping):
            return super().training_step(batch, batch_idx)
        photos, others = batch
        loss, terms = self.shared_step(photos)
        self.log_terms(terms, photos)
        return loss + self.reg_weight * self.shared_step(others)[0]

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure the scale factor on the first batch of a run, if `scale_by_std`."""
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0 and not self.restarted_from_ckpt:
            batch = batch if isinstance(batch, Mapping) else batch[0]
            images = super().get_input(batch, self.first_stage_key).to(self.device)
            z = self.get_first_stage_encoding(self.encode_first_stage(images)) / self.scale_factor
            self.scale_factor.fill_(1.0 / z.std())
            log.info("scale_factor %.4f, from the standard deviation of the first batch's latents",
                     self.scale_factor.item())

    def trained_parameters(self) -> list[nn.Parameter]:
        if self.embedding_manager is not None and not self.unfreeze_model:
            return list(self.embedding_manager.embedding_parameters())
        encoder = self.cond_stage_model.parameters() if self.cond_stage_trainable else ()
        return [*super().trained_parameters(), *encoder]

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.embedding_manager is None:
            return super().parameter_groups()
        return self.embedding_parameter_groups([*self.cond_stage_model.parameters(), *self.model.parameters()])

    def saved_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the loss of the first stage, which is unused here, and what Textual Inversion freezes."""
        weights = {key: value for key, value in weights.items() if not key.startswith("first_stage_model.loss.")}
        return super().saved_weights(weights)

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
        cond, unconditional = as_context(cond), as_context(unconditional)
        latents, _ = DDIM(self).sample(
            steps, batch_size, self.latent_shape, cond, eta=eta, verbose=verbose, generators=generators,
            unconditional_guidance_scale=scale, unconditional_conditioning=unconditional)
        return latents
