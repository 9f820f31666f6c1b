"""The base class of every method that learns concepts from a few photos each.

A subclass defines four things:

    make_concept      the trainable parts of a concept, with their initial values
    parameter_groups  the parameters to optimize, with learning rates
    prompt_context    how prompts with the concept's placeholder are encoded during training
    export_concept    the learned concept, as a value

`sampling_encoder` defines how the exported value acts on prompts. All methods share photos, masks, prompts and the
noise of each step, so that they can be compared.

Most runs learn one concept. A run that learns several learns them side by side. A batch holds as many samples of each
concept as if it were alone, a prompt names one of them, and each has its own noise, loss and parameters. So each
concept comes out as from a run of its own, but the base model is loaded, and its U-Net called, once for all of them.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.fingerprint import BaseModel
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.module import DataModuleFromConfig
from ldm.data.templates import fill_template
from ldm.models.optimization import can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.personalization.cached_latents import CachedLatents
from ldm.personalization.checks import check_datasets, check_words
from ldm.personalization.concept_gradients import DropOverflows, back_off, clip_norm_of_each
from ldm.personalization.concept_means import finite_mean, mean_of_each
from ldm.personalization.concept_names import (
    as_list,
    check_distinct_placeholders,
    file_names_for,
    super_category_of_each,
)
from ldm.personalization.initial_words import read_initial_words
from ldm.personalization.photo_masks import log_summary, make_missing_masks
from ldm.personalization.placement import is_large, store_in_sixteen_bits
from ldm.personalization.prediction_check import check_prediction
from ldm.personalization.training_prompts import ModelWithWords
from ldm.util import to_device

PHOTOS_TO_CHECK = 2  # by which it is seen whether the base model predicts noise or v
Batch = Mapping[str, Any]  # a collated batch of a `ConceptPhotos`


class PersonalizationMethod(ModelWithWords):
    """A frozen latent diffusion model plus the parameters that a method trains to learn concepts.

    Args (beside those of `LatentDiffusion`):
        super_category: what kind of subject the concept is, in one or several plain words. Several concepts: a list,
            or one for all of them.
        placeholder: the concept's own word in prompts. Several concepts: a list. They need as many training sets, in
            the same order.
        segmenter: folder or hub name of a CLIPSeg. Its masks of the subject weight the squared errors. None: no masks,
            unless the data bring their own.
        mask_border: 0..1, share of the image's side over which weights fall off outside a mask. Without a border, the
            loss never sees where the subject ends, and it is generated too large and without an outline. CLIPSeg's
            masks are soft and reach beyond the subject; sharper masks need a border.
        seed: seed of noise and timesteps; None: the seed of the run. Each step samples from (seed, step), so a resumed
            run repeats them.
        preserve_embedding_norm: whether the trained word vectors keep the norms at which they start. Rising norms are
            the usual fault of learned words; the log shows them (`train/embedding_norm`, relative to the start).
        init_embedding: file of an embedding or a concept whose vectors the trained word starts from, in place of the
            super-category's embedding. Several concepts: one for all, or one each.

    Attributes:
        method: short name in files and folders, such as "perfusion"; subclasses set it.
        method_name: readable name, such as "Perfusion"; subclasses set it.
        concepts: the trainable parts of each, such as `TrainableConcept` or `TrainableWord`; empty before `setup`.
        placeholders, super_categories, names: the words of each concept, and its name in files.
        base_model: identifies the base model before training; None before `setup`.
        cached_latents: the encoded photos; None before `setup`.
        initial_words: the vectors (k, width) that the word of each concept starts from; None: its super-category's.
        groups: number of batches in which every concept occurs once; 1 unless `concepts_per_batch` limits a batch.

    Raises:
        UserError: a placeholder or super-category cannot be used, or `mask_border` is out of range.
    """

    method = ""
    method_name = ""

    def __init__(self, super_category: str | Sequence[str] | None = None,
                 placeholder: str | Sequence[str] = "<concept>", segmenter: str | None = None, mask_border: float = 0.0,
                 seed: int | None = None, preserve_embedding_norm: bool = False,
                 init_embedding: str | Sequence[str] | None = None, **latent_diffusion: Any) -> None:
        placeholders = as_list(placeholder)
        check_distinct_placeholders(placeholders)
        super_categories = super_category_of_each(as_list(super_category or ""), placeholders)
        if not 0 <= mask_border <= 1:
            raise UserError(f"mask_border {mask_border} is a share of the image's side; give a number from 0 to 1")
        if latent_diffusion.get("personalization_config") is not None:
            raise UserError("personalization_config: is for Textual Inversion, with target "
                            "ldm.models.diffusion.ddpm.LatentDiffusion; leave it out")
        super().__init__(**{**latent_diffusion, "use_ema": False})  # no trained weight has an average
        self.placeholders, self.names = placeholders, file_names_for(placeholders)
        self.super_categories = super_categories
        self.segmenter, self.mask_border, self.seed = segmenter, mask_border, seed
        self.preserve_embedding_norm = preserve_embedding_norm
        self.concepts = nn.ModuleList()
        self.cached_latents: CachedLatents | None = None
        self.groups = 1
        self.base_model: BaseModel | None = None
        self.strict_loading = False  # a run's checkpoints hold what was learned, not the base model
        self.load_initial_weights()
        self.requires_grad_(False)
        self.text_layers = name_text_layers(self.model.diffusion_model)
        self.initial_words = read_initial_words(as_list(init_embedding or ()), len(placeholders),
                                                self.cond_stage_model.embedding_width)

    @property
    def is_large(self) -> bool:
        """Whether the U-Net in 32 bits takes so much memory that it must not be on the device beside other work."""
        return is_large(self.model)

    @property
    def max_devices(self) -> int:
        """The number of concepts: each device learns its own share of them."""
        return len(self.placeholders)

    # What a method defines

    def make_concept(self, dataset: ConceptPhotos, super_category: str) -> nn.Module:
        """Return the trainable parts of one concept, with their initial values."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters to optimize, in groups with a learning rate each."""
        raise NotImplementedError

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        """Encode prompts, each with one concept's placeholder in it, under the current state of the concepts."""
        raise NotImplementedError

    def export_concept(self, index: int = 0) -> Concept | FinetunedConcept:
        """Return what has been learned so far of the concept at `index`."""
        raise NotImplementedError

    def sampling_encoder(self, concepts: Sequence[AnyConcept]) -> ConceptPromptEncoder | FinetunedPromptEncoder:
        """Return the encoder of prompts with exported concepts of this method."""
        raise NotImplementedError

    def trained_unet_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights of the U-Net that are trained, by their names in it; none by default."""
        return {}

    # Preparation

    def setup(self, stage: str | None = None) -> None:
        """Check the run's data, then prepare masks, latents and concepts. Does nothing if that has been done.

        Raises:
            UserError: photos, words or weights are missing or do not fit together.
        """
        if stage != "fit" or len(self.concepts):
            return
        photos = self.photos()
        self._check_run(photos)
        self.seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        check_words(self.cond_stage_model, photos, self.super_categories)
        self.base_model = BaseModel.of(self.text_layers, self.initial_weights_path)
        # Photos and masks become latents and weights, once. The U-Net is not on the device yet: both need much memory.
        device = self.trainer.strategy.root_device
        self.first_stage_model.to(device)
        if self.segmenter is not None:
            make_missing_masks(photos, self.super_categories, self.segmenter,
                               Path(self.trainer.default_root_dir) / "masks", device)
        self.prepare_photos(photos, device)
        self.cached_latents = CachedLatents(self, photos, self.mask_border)
        self.prepare_prompts(photos, device)
        # Lightning moves the model only after this method, too late for what follows.
        unet, precision = self.model.diffusion_model, str(self.trainer.precision)
        dtype = None if self.trained_unet_weights() else store_in_sixteen_bits(unet, precision, device)
        self.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            self._check_prediction(photos)
        for dataset, category in zip(photos, self.super_categories, strict=True):
            self.concepts.append(self.make_concept(dataset, category))
        # A step of the optimizer takes a batch of every group of concepts.
        data = self.trainer.datamodule
        self.groups = data.num_groups if isinstance(data, DataModuleFromConfig) else 1
        self.trainer.accumulate_grad_batches *= self.groups
        for dataset in photos:
            log_summary(dataset)

    def photos(self) -> list[ConceptPhotos]:
        """Return the photos of each concept.

        Raises:
            UserError: the run's training data are not photos, or do not fit the concepts' placeholders.
        """
        train = self._datasets.get("train")
        photos = train if isinstance(train, list) else [train]
        if not all(isinstance(dataset, ConceptPhotos) for dataset in photos):
            raise UserError(f"{type(self).__name__} learns from photos: "
                            "data.params.train must be an ldm.data.concept_photos.ConceptPhotos, or a PersonalizedBase "
                            "without params of the public Textual Inversion such as set and per_image_tokens")
        theirs = [dataset.placeholder_token for dataset in photos]
        if theirs != self.placeholders:
            raise UserError(f"placeholder {', '.join(self.placeholders)} (model.params), but {', '.join(theirs)} in "
                            "the prompts (placeholder_token in data.params.train.params); give the same, one for each "
                            "folder")
        return photos

    @property
    def _datasets(self) -> Mapping[str, Any]:
        return getattr(getattr(self.trainer, "datamodule", None), "datasets", {})

    def _check_run(self, photos: Sequence[ConceptPhotos]) -> None:
        check_datasets(self._datasets)
        if not self.has_initial_weights:
            raise UserError("no base model to train on: name its checkpoint with --actual_resume, or in the config as "
                            "model.params.ckpt_path")
        if not all(self.super_categories):
            raise UserError("no super-category: say what kind of subject it is, for example --init_word \"teddy bear\"")
        if len(photos) > 1 and self.trained_unet_weights():
            raise UserError(f"{type(self).__name__} trains weights of the base model, which only one concept can have; "
                            "train one concept at a time")

    def prepare_photos(self, photos: Sequence[ConceptPhotos], device: torch.device) -> None:
        """Change photos with masks before they are encoded; nothing by default."""

    def prepare_prompts(self, photos: Sequence[ConceptPhotos], device: torch.device) -> None:
        """Encode what can be encoded before the U-Net is on the device; nothing by default."""

    def _check_prediction(self, photos: Sequence[ConceptPhotos]) -> None:
        latents = self.cached_latents.first_latents(PHOTOS_TO_CHECK).to(self.device)
        prompt = fill_template(photos[0].templates[0], self.super_categories[0])
        condition = self.plain_prompts([prompt]).select([0] * len(latents))
        check_prediction(self, latents, self.with_sizes(condition, self.cached_latents.first_sizes(len(latents))))

    def on_fit_start(self) -> None:
        """Stop loading pixels: the photos are encoded already."""
        for dataset in self.photos():
            dataset.with_pixels = False

    # Optimization

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameter_groups() for parameter in group["params"]]

    def parameters_of_each_concept(self) -> list[list[nn.Parameter]]:
        """Return the trained parameters of each concept."""
        return [[parameter for parameter in concept.parameters() if parameter.requires_grad]
                for concept in self.concepts]

    def configure_optimizers(self) -> dict[str, Any]:
        groups = self.parameter_groups()
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take a step. If the 16-bit gradients of one of several concepts overflow, only that concept skips it."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None or len(self.concepts) < 2:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            closure = DropOverflows(optimizer_closure, self.parameters_of_each_concept())
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            if closure.dropped:
                back_off(scaler)
        if self.preserve_embedding_norm:
            for concept in self.concepts:
                concept.restore_norms(self.word_widths)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: float | None = None,
                                    gradient_clip_algorithm: Any = None) -> None:
        """Clip the gradient norm of each concept separately, as in a run of its own."""
        by_norm = gradient_clip_algorithm is None or str(getattr(gradient_clip_algorithm, "value", "norm")) == "norm"
        if len(self.concepts) > 1 and gradient_clip_val and by_norm:
            clip_norm_of_each(self.parameters_of_each_concept(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Training

    def training_context(self, prompts: list[str]) -> PromptContext:
        """Encode the prompts of a training step."""
        return self.prompt_context(prompts)

    @property
    def micro_batches(self) -> int:
        """The number of batches of one concept per optimizer step."""
        return self.trainer.accumulate_grad_batches // self.groups

    def training_step(self, batch: Mapping[Any, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch of the only concept, or of batches of several: concept index -> its batch."""
        batches = {0: batch} if "caption" in batch else batch
        # Noise depends on seed, step and micro-batch alone, and is the same for all concepts.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches // self.groups
        seed = self.seed * 1_000_003 + self.global_step + micro_batch * 15_485_863
        losses, numbers = self.concept_losses(batches, [Generator().manual_seed(seed) for _ in batches])
        self._log_numbers({**numbers, **self._word_numbers(list(batches))}, list(batches))
        # The trainer averages over all batches of a step and over all devices. Here the concepts' losses add up.
        devices = self.trainer.world_size
        loss = losses.sum() * self.groups * devices
        return loss if devices == 1 else loss + self._zero_of_all_parameters()

    def _word_numbers(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return how far the words of J concepts are from their start, and their norms relative to it, (J,) each."""
        widths, concepts = self.word_widths, [self.concepts[index] for index in indices]
        return {"embedding_distance": torch.stack([concept.distance() for concept in concepts]),
                "embedding_norm": torch.stack([concept.relative_norm(widths) for concept in concepts])}

    def _zero_of_all_parameters(self) -> Tensor:
        """Return a zero that depends on every parameter: the devices' average needs a gradient of each.

        Sums over no elements stay 0 even if the training of another device's concept has diverged.
        """
        return torch.stack([parameter.flatten()[:0].sum() for parameter in self.trained_parameters()]).sum()

    def concept_losses(self, batches: Mapping[int, Batch], generators: Sequence[Generator]
                       ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the base model's own objective on each concept's photos, weighted by their masks.

        Args:
            batches: index of each of J concepts -> a batch of its photos.
            generators: for each concept the source of its latents, noise and timesteps.

        Returns:
            The losses (J,), and numbers to log, each (J,).
        """
        latents, noise, timesteps, weights, sizes, captions = [], [], [], [], [], []
        for (index, items), generator in zip(batches.items(), generators, strict=True):
            own = self.cached_latents.batch(index, items, generator, self.device)
            own_noise, own_timesteps = self.sample_noise_and_timesteps(own.latents, generator)
            latents.append(own.latents)
            weights.append(own.weights)
            sizes.append(own.sizes)
            noise.append(own_noise)
            timesteps.append(own_timesteps)
            captions += own.captions
        # One pass of the U-Net serves all concepts.
        context = self.with_sizes(self.training_context(captions), torch.cat(sizes))
        losses, numbers = self.per_sample_losses(torch.cat(latents), context, torch.cat(timesteps), torch.cat(noise),
                                                 torch.cat(weights))
        counts = [len(own) for own in latents]
        return mean_of_each(losses, counts), {name: mean_of_each(values, counts) for name, values in numbers.items()}

    def sample_noise_and_timesteps(self, latents: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return noise of the shape of `latents` (B, C, h, w), and timesteps (B,)."""
        noise = to_device(torch.randn(latents.shape, generator=generator), latents.device).to(latents.dtype)
        return noise, self.sample_timesteps(len(latents), latents.device, generator)

    def _log_numbers(self, numbers: Mapping[str, Tensor], indices: Sequence[int]) -> None:
        """Log the means of numbers (J,) over concepts and, in a run of several, the numbers of each."""
        means = {f"train/{name}": finite_mean(values) for name, values in numbers.items()}
        self.log("train/embedding_distance", means.pop("train/embedding_distance"), prog_bar=True, batch_size=1)
        self.log("loss", finite_mean(numbers["loss"]), prog_bar=True, logger=False, batch_size=1)
        if len(self.concepts) > 1:
            for name, values in numbers.items():
                for index, value in zip(indices, values, strict=True):
                    means[f"train/{name}/{self.names[index]}"] = value
        self.log_dict(means, batch_size=1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Do not measure a scale factor, unlike the base class: the base model has one already."""

    def saved_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return only what is learned, without the base model."""
        trained = {f"model.diffusion_model.{name}" for name in self.trained_unet_weights()}
        return {key: value for key, value in weights.items() if key.startswith("concepts.") or key in trained}

    # Images for the log

    @torch.no_grad()
    def log_images(self, batch: Mapping[Any, Any], N: int = 8, ddim_steps: int = 50,
                   unconditional_guidance_scale: float = 3.0) -> dict[str, Tensor]:
        """Sample N images of the batch's prompts, alternating between concepts, in their current state.

        The photos themselves are not shown: batches hold no pixels.
        """
        batches = [batch] if "caption" in batch else batch.values()
        prompts = [prompt for captions in zip(*(own["caption"] for own in batches), strict=True)
                   for prompt in captions][:N]
        encoder = self.sampling_encoder([self.export_concept(index) for index in range(len(self.concepts))])
        sizes = self.sampling_sizes(len(prompts))
        condition = self.with_sizes(encoder.mask_concepts(encoder.encode(prompts), prompts), sizes)
        negative = encoder.encode_unconditional().select([0] * len(prompts))
        unconditional = self.with_sizes(encoder.mask_concepts(negative, prompts), sizes)
        # On a GPU one at a time: its memory has to hold the training as well.
        size = 1 if self.device.type == "cuda" else len(prompts)
        images = []
        for first in range(0, len(prompts), size):
            rows = list(range(first, min(first + size, len(prompts))))
            images.append(self.sample_images(
                condition.select(rows), len(rows), ddim_steps, unconditional_guidance_scale, unconditional.select(rows),
                generators=[Generator().manual_seed(row) for row in rows]))
        return {"samples": torch.cat(images)}
