"""Teaching a concept: Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image Personalization".

SIGGRAPH 2023 (arXiv 2305.01644). The base model is frozen; learned are one word embedding and one value vector per
cross-attention layer. The edit itself is in `ldm.modules.rank_one`; prompts for sampling in `prompts.py`.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.data.images import to_tensor
from ldm.data.personalized import PersonalizedBase
from ldm.data.templates import fill
from ldm.errors import UserError
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.objectives import mask_on_latents
from ldm.models.diffusion.prompts import check_super_category, word_vector
from ldm.models.optimisation import optimizer_and_schedule
from ldm.modules.attention import name_text_layers
from ldm.modules.concept import Concept, base_fingerprint, is_placeholder
from ldm.modules.context import PromptContext
from ldm.modules.covariance import cached_covariance, encoder_fingerprint, load_covariance
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.learned_concept import LOCKINGS, LearnedConcept
from ldm.modules.rank_one import invert_covariance
from ldm.modules.segmentation import ZeroShotSegmenter, cached_masks
from ldm.util import blamed_on

log = logging.getLogger(__name__)


class Perfusion(LatentDiffusion):
    """A frozen latent diffusion model that learns one concept, or draws learned ones.

    Args (beside those of `LatentDiffusion`):
        super_category: what kind of thing the concept is, in one or several plain words.
        placeholder: the concept's own word in prompts.
        bias, temperature: beta and tau of the gate in training, and the concept's defaults in sampling.
        embedding_lr, value_lr: learning rates of the word embedding and of the target outputs.
        locking: "local" (keys locked to the super-category) or "trained" (keys learned like values, an ablation).
        target_input_decay: of the moving average i*.
        covariance: file of the text encoder's covariance C; None: computed once from default captions and cached.
        segmenter: folder or hub name of a CLIPSeg that makes the masks of the zero-shot mask loss; None: no masks,
            unless the data bring their own.
        seed: of noise and timesteps, by default the run's; each step draws from (seed, step), so that a resumed run
            repeats them.
    """

    most_devices = 1

    def __init__(self, super_category: str | None = None, placeholder: str = "<concept>", bias: float = 0.75,
                 temperature: float = 0.1, embedding_lr: float = 0.006, value_lr: float = 0.03,
                 locking: str = "local", target_input_decay: float = 0.99, covariance: str | None = None,
                 segmenter: str | None = None, seed: int | None = None, **latent_diffusion: Any) -> None:
        if not is_placeholder(placeholder):
            raise UserError(f"placeholder {placeholder!r}: must be a word without white space, such as <my-teddy>")
        if locking not in LOCKINGS:
            raise UserError(f"locking {locking!r} is unknown; choose one of {', '.join(LOCKINGS)}")
        for name, value in (("temperature", temperature), ("embedding_lr", embedding_lr), ("value_lr", value_lr)):
            if value <= 0:
                raise UserError(f"{name} {value} must be above 0")
        if not 0 <= target_input_decay < 1:
            raise UserError(f"target_input_decay {target_input_decay} must be at least 0 and below 1; 0.99 is usual")
        if covariance is not None and not Path(covariance).is_file():  # before weights, which take longer to load
            raise UserError(f"covariance {covariance}: no such file; compute it with scripts/compute_covariance.py, "
                            "or set null")
        super().__init__(**{**latent_diffusion, "use_ema": False})  # nothing is trained that has an average
        self.super_category = None if super_category is None else " ".join(super_category.split())
        self.placeholder = placeholder
        self.bias, self.temperature = bias, temperature
        self.embedding_lr, self.value_lr = embedding_lr, value_lr
        self.locking, self.target_input_decay = locking, target_input_decay
        self.covariance, self.segmenter, self.seed = covariance, segmenter, seed
        self.concept: LearnedConcept | None = None
        self.strict_loading = False  # a run's checkpoints hold the concept, not the base model
        self.load_initial_weights()
        self.requires_grad_(False)
        self.text_layers = name_text_layers(self.model.diffusion_model)
        self._inverse_covariance: Tensor | None = None

    def inverse_covariance(self) -> Tensor:
        """C^-1 of the text encoder, (d, d); read or computed at the first call."""
        if self._inverse_covariance is None:
            encoder = self.cond_stage_model
            covariance = cached_covariance(encoder) if self.covariance is None else load_covariance(
                self.covariance, encoder_fingerprint(encoder))
            self._inverse_covariance = invert_covariance(covariance)
        return self._inverse_covariance.to(self.device)

    # Preparation

    def setup(self, stage: str | None = None) -> None:
        if stage != "fit" or self.concept is not None:
            return
        data = self._photos()
        if self._initial_weights[0] is None:
            raise UserError("no base model to teach: name its checkpoint with --actual_resume, or in the config as "
                            "model.params.ckpt_path")
        if not self.super_category:
            raise UserError("no super-category: say what kind of thing it is, for example --init_word \"teddy bear\"")
        self.seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        self.to(self.trainer.strategy.root_device)  # Lightning does so only after this, too late for what follows
        encoder = self.cond_stage_model
        check_super_category(encoder, self.super_category)
        start = word_vector(encoder, self.super_category)
        encoder.tokenize([fill(template, self.super_category) for template in data.templates])  # whether they fit
        tokens = encoder.tokenize([fill(t, self.placeholder) for t in data.templates], [self.placeholder])
        if not bool((self._concept_positions(tokens).sum(1) == 1).all()):
            raise UserError(f"placeholder {self.placeholder!r}: stands in the training sentences by itself; "
                            "give a word of its own, such as <my-teddy>")
        encodings = encoder.encode_tokens(tokens, start)
        super_input = encodings[self._concept_positions(tokens)].mean(0)
        self.concept = LearnedConcept(start, super_input, self.text_layers, self.locking)
        self.inverse_covariance()
        self._make_masks(data)
        self._encode_photos(data)

    def _photos(self) -> PersonalizedBase:
        data = getattr(self.trainer, "datamodule", None)
        photos = getattr(data, "datasets", {}).get("train")
        if not isinstance(photos, PersonalizedBase):
            raise UserError("Perfusion learns from photos: "
                            "data.params.train must be an ldm.data.personalized.PersonalizedBase")
        return photos

    def _make_masks(self, data: PersonalizedBase) -> None:
        if data.has_masks or self.segmenter is None:
            return
        segmenter = ZeroShotSegmenter.from_path(self.segmenter, self.device)
        log.info("masks of %s by %s", self.super_category, self.segmenter)
        folder = Path(self.trainer.default_root_dir) / "masks"
        data.set_masks(cached_masks(data.paths, segmenter, self.super_category, folder, data.size))

    @torch.no_grad()
    def _encode_photos(self, data: PersonalizedBase) -> None:
        """Every photo through the first stage once, as it is and mirrored; steps draw from what it says anew."""
        encoded = []
        for photo in data.images:
            image = to_tensor(photo).to(self.device)
            with blamed_on(f"photos of {data.size} pixels (data.params.train.params.size) do not fit the first stage"):
                posterior = self.first_stage_model.encode(torch.stack([image, image.flip(-1)]))
            gaussian = isinstance(posterior, DiagonalGaussianDistribution)
            encoded.append(posterior.parameters if gaussian else torch.cat([posterior, posterior - torch.inf], 1))
        self._moments = torch.stack(encoded)
        self._check_latents(self._moments.shape[2] // 2, *self._moments.shape[3:])

    def _check_latents(self, channels: int, height: int, width: int) -> None:
        """Raises a UserError where the U-Net cannot have latents as the first stage gives them, or of `image_size`."""
        if channels != self.channels:
            raise UserError(f"channels {self.channels} (model.params), but the first stage's latents have {channels}; "
                            "give its number")
        step = 2 ** (len(getattr(self.model.diffusion_model, "channel_mult", (1,))) - 1)
        odd = [side for side in (height, width, *self.latent_shape[1:]) if side % step]
        if odd:
            raise UserError(f"latents of {odd[0]} a side, by size (data.params.train.params) or image_size "
                            f"(model.params), but the U-Net takes multiples of {step}; change it")

    def _concept_positions(self, tokens: Tensor) -> Tensor:
        """(B, N) booleans: where the placeholder's token stands."""
        return tokens == len(self.cond_stage_model.token_table)

    # Training

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        return [self.concept.embedding, *self.concept.values()]

    def configure_optimizers(self) -> dict[str, Any]:
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam([{"params": [self.concept.embedding], "lr": self.embedding_lr},
                                      {"params": self.concept.values(), "lr": self.value_lr}], fused=True)
        return optimizer_and_schedule(optimizer, self.scheduler_config)

    def prompt_context(self, prompts: list[str], average: bool = False) -> PromptContext:
        """The concept's prompts under the edit as it now is; `average` moves i* by them first."""
        encoder = self.cond_stage_model
        distinct = sorted(set(prompts))
        tokens = encoder.tokenize(distinct, [self.placeholder]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # C^-1 would magnify what half precision rounds off
            encoding = encoder.encode_tokens(tokens, self.concept.embedding)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        if average:
            here = self._concept_positions(tokens)
            parts = self.trainer.accumulate_grad_batches  # each moves i* by its share of the step
            self.concept.move_target_input(encoding[rows][here[rows]], self.target_input_decay ** (1 / parts))
        return self.concept.edit(self.bias, self.temperature).context(encoding, self.inverse_covariance()).select(rows)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches  # of the gradient that this step adds up
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step + part * 15_485_863)
        moments = self._moments.to(self.device)[batch["index"], batch["flipped"].long()]
        z = self.scale_factor * DiagonalGaussianDistribution(moments).sample(generator)
        noise = torch.randn(z.shape, generator=generator).to(z)
        t = torch.randint(self.num_timesteps, (len(z),), generator=generator).to(z.device)
        context = self.prompt_context(list(batch["caption"]), average=True)
        weight = mask_on_latents(batch["mask"].to(z), z.shape[-2:])
        loss, numbers = self.p_losses(z, context, t, noise, weight)
        self.log_dict({f"train/{name}": value for name, value in numbers.items()}, batch_size=len(z))
        self.log("train/embedding_distance", self.concept.distance(), prog_bar=True, batch_size=len(z))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(z))
        return loss

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The base model's latents are scaled already."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key.startswith("concept.")}

    # Use

    def learned(self) -> Concept:
        """What has been learned so far."""
        return self.concept.to_concept(
            placeholder=self.placeholder, super_category=self.super_category, bias=float(self.bias),
            temperature=float(self.temperature), steps=int(self.global_step), base=base_fingerprint(self.text_layers))

    def configure_callbacks(self) -> list[pl.Callback]:
        from ldm.training.concept_progress import ConceptSaver

        return [ConceptSaver()]
