"""What every method has in common that teaches a diffusion model one concept from a few photos.

A subclass says what is learned (`make_concept`), how prompts with the concept's word are encoded (`prompt_context`),
and what is kept of it (`learned`). Photos, masks, prompts and the noise of each step are the same for all of them, so
that they can be compared.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Generator, Tensor, nn

from ldm.data.images import to_tensor
from ldm.data.personalized import PersonalizedBase
from ldm.data.templates import fill
from ldm.errors import UserError
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.objectives import mask_on_latents
from ldm.models.diffusion.prompts import check_super_category
from ldm.models.optimisation import optimizer_and_schedule
from ldm.modules.attention import name_text_layers
from ldm.modules.concept import Concept, base_fingerprint, is_placeholder
from ldm.modules.context import PromptContext
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.segmentation import ZeroShotSegmenter, cached_masks
from ldm.modules.tuned_concept import TunedConcept
from ldm.util import blamed_on

log = logging.getLogger(__name__)


def check_above_zero(**values: float) -> None:
    """Raises a UserError that names the first of the params that is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{name} {value} must be above 0")


class ConceptLearner(LatentDiffusion):
    """A frozen latent diffusion model of which something is freed, or to which something is added, to learn a concept.

    Args (beside those of `LatentDiffusion`):
        super_category: what kind of thing the concept is, in one or several plain words.
        placeholder: the concept's own word in prompts.
        segmenter: folder or hub name of a CLIPSeg that makes the masks by which errors are weighed; None: no masks,
            unless the data bring their own.
        seed: of noise and timesteps, by default the run's; each step draws from (seed, step), so that a resumed run
            repeats them.

    Attributes:
        concept: what is learned, beside weights of the base model; None until training is prepared. It has a
            `distance()` for the log.
        base: fingerprint of the base model as it was before training; "" until training is prepared.
    """

    most_devices = 1

    def __init__(self, super_category: str | None = None, placeholder: str = "<concept>",
                 segmenter: str | None = None, seed: int | None = None, **latent_diffusion: Any) -> None:
        if not is_placeholder(placeholder):
            raise UserError(f"placeholder {placeholder!r}: must be a word without white space, such as <my-teddy>")
        super().__init__(**{**latent_diffusion, "use_ema": False})  # nothing is trained that has an average
        self.super_category = None if super_category is None else " ".join(super_category.split())
        self.placeholder, self.segmenter, self.seed = placeholder, segmenter, seed
        self.concept: nn.Module | None = None
        self.base = ""
        self.strict_loading = False  # a run's checkpoints hold what was learned, not the base model
        self.load_initial_weights()
        self.requires_grad_(False)
        self.text_layers = name_text_layers(self.model.diffusion_model)

    # What a method is

    def make_concept(self, data: PersonalizedBase) -> nn.Module:
        """What is learned, where it starts."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets: parameters, each with its learning rate."""
        raise NotImplementedError

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        """Prompts with the concept's word in them, encoded as they now are."""
        raise NotImplementedError

    def learned(self) -> Concept | TunedConcept:
        """What has been learned so far."""
        raise NotImplementedError

    def tuned_weights(self) -> dict[str, nn.Parameter]:
        """The weights of the base model's U-Net that are trained, by their names in it."""
        return {}

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
        encoder.tokenize([fill(template, self.super_category) for template in data.templates])  # whether they fit
        self.base = base_fingerprint(self.text_layers)
        self.concept = self.make_concept(data)
        self._make_masks(data)
        self._encode_photos(data)

    def _photos(self) -> PersonalizedBase:
        data = getattr(self.trainer, "datamodule", None)
        photos = getattr(data, "datasets", {}).get("train")
        if not isinstance(photos, PersonalizedBase):
            raise UserError(f"{type(self).__name__} learns from photos: "
                            "data.params.train must be an ldm.data.personalized.PersonalizedBase")
        return photos

    def training_tokens(self, templates: Sequence[str], vectors: int = 1) -> Tensor:
        """(T, N) tokens of the training sentences, in which the concept's word has so many vectors.

        Raises:
            UserError: a sentence has the word already, or has become too long by it.
        """
        sentences = [fill(template, self.placeholder) for template in templates]
        tokens = self.cond_stage_model.tokenize(sentences, [self.placeholder], [vectors])
        if not bool((self.concept_positions(tokens).sum(1) == vectors).all()):
            raise UserError(f"placeholder {self.placeholder!r}: stands in the training sentences by itself; "
                            "give a word of its own, such as <my-teddy>")
        return tokens

    def concept_positions(self, tokens: Tensor) -> Tensor:
        """(B, N) booleans: where the concept's vectors stand."""
        return tokens >= len(self.cond_stage_model.token_table)

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

    # Training

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def configure_optimizers(self) -> dict[str, Any]:
        groups = self.parameter_groups()
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)
        return optimizer_and_schedule(torch.optim.Adam(groups, fused=True), self.scheduler_config)

    def encoded(self, prompts: Sequence[str], vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct prompts of a batch, encoded once, with `vectors` (n, width) where the concept's word stands.

        Returns:
            Their tokens (P, N) and encodings (P, N, d), and for each of the B prompts at which row it is.
        """
        encoder = self.cond_stage_model
        distinct = sorted(set(prompts))
        tokens = encoder.tokenize(distinct, [self.placeholder], [len(vectors)]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # C^-1 would magnify what half precision rounds off
            encoding = encoder.encode_tokens(tokens, vectors)
        return tokens, encoding, torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)

    def step_context(self, prompts: list[str]) -> PromptContext:
        """The encoded prompts of a training step."""
        return self.prompt_context(prompts)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        part = batch_idx % self.trainer.accumulate_grad_batches  # of the gradient that this step adds up
        generator = Generator().manual_seed(self.seed * 1_000_003 + self.global_step + part * 15_485_863)
        loss, numbers = self.step_loss(batch, generator)
        count = len(batch["caption"])
        self.log_dict({f"train/{name}": value for name, value in numbers.items()}, batch_size=count)
        self.log("train/embedding_distance", self.concept.distance(), prog_bar=True, batch_size=count)
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=count)
        return loss

    def step_loss(self, batch: Mapping[str, Any], generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The base model's own objective on the photos, weighed by their masks, and the numbers to log."""
        moments = self._moments.to(self.device)[batch["index"], batch["flipped"].long()]
        z = self.scale_factor * DiagonalGaussianDistribution(moments).sample(generator)
        noise, t = self.noise_and_times(z, generator)
        context = self.step_context(list(batch["caption"]))
        weight = mask_on_latents(batch["mask"].to(z), z.shape[-2:])
        return self.p_losses(z, context, t, noise, weight)

    def noise_and_times(self, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Noise of the shape of z (B, C, h, w), and timesteps (B,)."""
        noise = torch.randn(z.shape, generator=generator).to(z)
        return noise, torch.randint(self.num_timesteps, (len(z),), generator=generator).to(z.device)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The base model's latents are scaled already."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tuned = {f"model.diffusion_model.{name}" for name in self.tuned_weights()}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items()
                                    if key.startswith("concept.") or key in tuned}

    def configure_callbacks(self) -> list[pl.Callback]:
        from ldm.training.concept_progress import ConceptSaver

        return [ConceptSaver()]
