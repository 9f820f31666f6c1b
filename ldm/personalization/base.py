"""What every method has in common that teaches a diffusion model concepts, each from a few photos.

A subclass says what is learned (`make_concept`), how prompts with a concept's word are encoded (`prompt_context`),
and what is kept of it (`learned`). Photos, masks, prompts and the noise of each step are the same for all of them, so
that they can be compared.

Most runs learn one concept. One that learns several does so side by side: a batch holds as many samples of each as if
it were alone, a prompt names one of them, and each has its own noise, loss and parameters. So every concept comes out
as from a run of its own, but the base model is loaded, and its U-Net called, once for all of them.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept, base_fingerprint, is_placeholder
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.prompt_encoder import check_super_category
from ldm.data.images import to_tensor
from ldm.data.masks import softened
from ldm.data.personalized import PersonalizedBase
from ldm.data.templates import fill
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.objectives import resize_mask_to_latents
from ldm.models.optimization import can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.segmentation import ZeroShotSegmenter, cached_masks
from ldm.util import to_device, user_error_for

log = logging.getLogger(__name__)


def check_positive(**values: float) -> None:
    """Raises a UserError that names the first of the params that is not above 0."""
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{name} {value} must be above 0")


def file_names_for(placeholders: Sequence[str]) -> list[str]:
    """What files and logs call the concepts with these words: "my-teddy" for `<my-teddy>`, numbered where need be."""
    names = [re.sub(r"[^\w-]", "", word) for word in placeholders]
    distinct = all(names) and len({name.lower() for name in names}) == len(names)
    return names if distinct else [f"{place}-{name}".rstrip("-") for place, name in enumerate(names)]


def as_list(words: str | Sequence[str]) -> list[str]:
    """One text as a list of one."""
    return [words] if isinstance(words, str) else list(words)


def _checked_placeholders(words: list[str]) -> list[str]:
    lower = [word.lower() for word in words]
    for word in words:
        if not is_placeholder(word):
            raise UserError(f"placeholder {word!r}: must be a word without white space, such as <my-teddy>")
        if lower.count(word.lower()) > 1:
            raise UserError(f"placeholder {word} is given twice, where case does not count; "
                            "name each concept by a word of its own with --placeholder")
    return words


def _one_for_each(super_categories: list[str], placeholders: Sequence[str]) -> list[str]:
    """A super-category for each concept; a single one counts for all.

    Raises:
        UserError: there are more, or fewer.
    """
    if len(super_categories) not in (1, len(placeholders)):
        raise UserError(f"{len(super_categories)} super-categories ({', '.join(super_categories)}) for "
                        f"{len(placeholders)} concepts ({', '.join(placeholders)}); give one for all, or one each")
    return super_categories if len(super_categories) > 1 else super_categories * len(placeholders)


class PersonalizationMethod(LatentDiffusion):
    """A frozen latent diffusion model of which something is freed, or to which something is added, to learn concepts.

    Args (beside those of `LatentDiffusion`):
        super_category: what kind of thing the concept is, in one or several plain words; of several concepts a list, or
            one for all of them.
        placeholder: the concept's own word in prompts; of several concepts a list. They then come with as many training
            sets, in the same order.
        segmenter: folder or hub name of a CLIPSeg that makes the masks by which errors are weighed; None: no masks,
            unless the data bring their own.
        mask_border: how far beyond a mask errors still count, less and less, as a share of the picture's side. Where
            nothing beside the object counts, nothing says where it ends: it is drawn too large and without outline.
            CLIPSeg's own masks are soft and reach beyond the object, sharper ones do not.
        seed: of noise and timesteps, by default the run's; each step draws from (seed, step), so that a resumed run
            repeats them.

    Attributes:
        concepts: what is learned of each, beside weights of the base model; empty until training is prepared. They have
            a `distance()` for the log.
        placeholders, super_categories, names: the words of each, and what files call it.
        base: fingerprint of the base model as it was before training; "" until training is prepared.
    """

    def __init__(self, super_category: str | Sequence[str] | None = None,
                 placeholder: str | Sequence[str] = "<concept>", segmenter: str | None = None, mask_border: float = 0.0,
                 seed: int | None = None, **latent_diffusion: Any) -> None:
        placeholders = _checked_placeholders(as_list(placeholder))
        categories = _one_for_each(as_list(super_category or ""), placeholders)
        if not 0 <= mask_border <= 1:
            raise UserError(f"mask_border {mask_border} is a share of the picture's side; give a number from 0 to 1")
        super().__init__(**{**latent_diffusion, "use_ema": False})  # nothing is trained that has an average
        self.placeholders, self.names = placeholders, file_names_for(placeholders)
        self.super_categories = [" ".join(words.split()) for words in categories]
        self.segmenter, self.mask_border, self.seed = segmenter, mask_border, seed
        self.concepts = nn.ModuleList()
        self.turns = 1  # batches until each concept has had one
        self.base = ""
        self.strict_loading = False  # a run's checkpoints hold what was learned, not the base model
        self.load_initial_weights()
        self.requires_grad_(False)
        self.text_layers = name_text_layers(self.model.diffusion_model)

    @property
    def most_devices(self) -> int:
        """Several devices share the concepts out among them: each learns its own, and knows those of the others."""
        return len(self.placeholders)

    # What a method is

    def make_concept(self, data: PersonalizedBase, super_category: str) -> nn.Module:
        """What is learned of one concept, where it starts."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets: parameters, each with its learning rate."""
        raise NotImplementedError

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        """Prompts with a concept's word in each, encoded as they now are."""
        raise NotImplementedError

    def export_concept(self, place: int = 0) -> Concept | FinetunedConcept:
        """What has been learned so far of the concept at that place."""
        raise NotImplementedError

    def trained_unet_weights(self) -> dict[str, nn.Parameter]:
        """The weights of the base model's U-Net that are trained, by their names in it."""
        return {}

    # Preparation

    def setup(self, stage: str | None = None) -> None:
        if stage != "fit" or len(self.concepts):
            return
        self._refuse_other_data()
        photos = self.photos()
        if self._initial_weights[0] is None:
            raise UserError("no base model to teach: name its checkpoint with --actual_resume, or in the config as "
                            "model.params.ckpt_path")
        if not all(self.super_categories):
            raise UserError("no super-category: say what kind of thing it is, for example --init_word \"teddy bear\"")
        if len(photos) > 1 and self.trained_unet_weights():
            raise UserError(f"{type(self).__name__} trains weights of the base model, which only one concept can have; "
                            "teach one at a time")
        self.seed = torch.initial_seed() % 2**32 if self.seed is None else self.seed
        self.to(self.trainer.strategy.root_device)  # Lightning does so only after this, too late for what follows
        encoder = self.cond_stage_model
        for data, category in zip(photos, self.super_categories, strict=True):
            check_super_category(encoder, category)
            encoder.tokenize([fill(template, category) for template in data.templates])  # whether they fit
        self.base = base_fingerprint(self.text_layers)
        self._make_masks(photos)
        self._encode_photos(photos)
        for data, category in zip(photos, self.super_categories, strict=True):
            self.concepts.append(self.make_concept(data, category))
        self.turns = getattr(self.trainer.datamodule, "turns", 1)
        self.trainer.accumulate_grad_batches *= self.turns

    @property
    def _datasets(self) -> Mapping[str, Any]:
        return getattr(getattr(self.trainer, "datamodule", None), "datasets", {})

    def _refuse_other_data(self) -> None:
        for name in ("validation", "test"):
            if name in self._datasets:
                raise UserError(f"data.params.{name}: a loss on it would say nothing of the concept; leave it out, "
                                "and measure concepts with evaluation/clip_eval.py")

    def photos(self) -> list[PersonalizedBase]:
        """The photos of each concept.

        Raises:
            UserError: the run's data are none, or do not fit the concepts' words.
        """
        found = self._datasets.get("train")
        photos = found if isinstance(found, list) else [found]
        if not all(isinstance(data, PersonalizedBase) for data in photos):
            raise UserError(f"{type(self).__name__} learns from photos: "
                            "data.params.train must be an ldm.data.personalized.PersonalizedBase")
        if [data.placeholder_token for data in photos] != self.placeholders:
            theirs = ", ".join(data.placeholder_token for data in photos)
            raise UserError(f"placeholder {', '.join(self.placeholders)} (model.params), but {theirs} in the prompts "
                            "(placeholder_token in data.params.train.params); give the same, one for each folder")
        return photos

    def on_fit_start(self) -> None:
        for data in self.photos():
            data.with_pixels = False

    def training_tokens(self, data: PersonalizedBase, vectors: int = 1) -> Tensor:
        """(T, N) tokens of a concept's training sentences, in which its word has so many vectors.

        Raises:
            UserError: a sentence has the word already, or has become too long by it.
        """
        word = data.placeholder_token
        tokens = self.cond_stage_model.tokenize([fill(template, word) for template in data.templates], [word],
                                                [vectors])
        if not bool((self.concept_positions(tokens).sum(1) == vectors).all()):
            raise UserError(f"placeholder {word!r}: stands in the training sentences by itself; "
                            "give a word of its own, such as <my-teddy>")
        return tokens

    def concept_positions(self, tokens: Tensor) -> Tensor:
        """(B, N) booleans: where the concept's vectors stand."""
        return tokens >= len(self.cond_stage_model.token_table)

    def _make_masks(self, photos: Sequence[PersonalizedBase]) -> None:
        lacking = [place for place, data in enumerate(photos) if not data.has_masks]
        if not lacking or self.segmenter is None:
            return
        segmenter = ZeroShotSegmenter.from_path(
            self.segmenter, self.device, "train with --masks none, or with --masks FOLDER of your own masks")
        folder = Path(self.trainer.default_root_dir) / "masks"
        for place in lacking:
            data, category = photos[place], self.super_categories[place]
            log.info("masks of %s by %s", category, self.segmenter)
            data.set_masks(cached_masks(data.paths, segmenter, category, folder, data.size))

    def _encode_photos(self, photos: Sequence[PersonalizedBase]) -> None:
        """Every photo and mask as the latents have them, as they are and mirrored.

        `_moments` (M, 2, 2C, h, w) are what the first stage says, from which steps draw anew, `_weights`
        (M, 2, 1, h, w) the masks; photos of a concept begin at its number in `_first`.
        """
        counts = [len(data.images) for data in photos]
        self._first = [sum(counts[:place]) for place in range(len(counts))]
        self._moments = torch.stack([self._encoded(data, photo) for data in photos for photo in data.images])
        self._check_latents(self._moments.shape[2] // 2, *self._moments.shape[3:])
        masks = torch.stack([data.mask(photo) for data in photos for photo in range(len(data.images))])
        masks = softened(masks, round(self.mask_border * min(masks.shape[-2:])))
        both = torch.stack([masks, masks.flip(-1)], 1).to(self._moments)
        self._weights = resize_mask_to_latents(both.flatten(0, 1), self._moments.shape[-2:]).unflatten(0, (-1, 2))

    @torch.no_grad()
    def _encoded(self, data: PersonalizedBase, photo: Image.Image) -> Tensor:
        """(2, 2C, h, w): the moments of a photo, as it is and mirrored."""
        image = to_tensor(photo).to(self.device)
        with user_error_for(f"photos of {data.size} pixels (data.params.train.params.size) do not fit the first stage"):
            posterior = self.first_stage_model.encode(torch.stack([image, image.flip(-1)]))
        if isinstance(posterior, DiagonalGaussianDistribution):
            return posterior.parameters
        return torch.cat([posterior, posterior - torch.inf], 1)

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
        return optimizer_and_schedule(torch.optim.AdamW(groups, weight_decay=0.0, fused=can_use_fused_optimizer(self)),
                                      self.scheduler_config)

    def encoded(self, prompts: Sequence[str], vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct prompts of a batch, encoded once, with `vectors` (n, width) where a concept's word stands.

        Returns:
            Their tokens (P, N) and encodings (P, N, d), and for each of the B prompts at which row it is (B,). Only the
            encodings are on the model's device.
        """
        encoder = self.cond_stage_model
        rows = {prompt: row for row, prompt in enumerate(sorted(set(prompts)))}
        tokens = encoder.tokenize(list(rows), self.placeholders, [len(own) for own in vectors])
        with torch.autocast(self.device.type, enabled=False):  # C^-1 would magnify what half precision rounds off
            encoding = encoder.encode_tokens(tokens, torch.cat(list(vectors)))
        return tokens, encoding, torch.tensor([rows[prompt] for prompt in prompts])

    def step_context(self, prompts: list[str]) -> PromptContext:
        """The encoded prompts of a training step."""
        return self.prompt_context(prompts)

    @property
    def parts(self) -> int:
        """How many batches with a concept in them make up one step of its optimiser."""
        return self.trainer.accumulate_grad_batches // self.turns

    def training_step(self, batch: Mapping[Any, Any], batch_idx: int) -> Tensor:
        """The loss of a batch of the only concept, or of batches of several: the place of each -> its batch."""
        batches = {0: batch} if "caption" in batch else batch
        part = batch_idx % self.trainer.accumulate_grad_batches // self.turns
        seed = self.seed * 1_000_003 + self.global_step + part * 15_485_863
        losses, numbers = self.step_losses(batches, [Generator().manual_seed(seed) for _ in batches])
        self._log_step({**numbers, "embedding_distance": torch.stack([
            self.concepts[place].distance() for place in batches])}, list(batches))
        # the trainer takes the mean over all batches of a step, and over all devices
        devices = self.trainer.world_size
        loss = losses.sum() * self.turns * devices
        return loss if devices == 1 else loss + self._nothing()

    def _nothing(self) -> Tensor:
        """0 of every parameter: the devices' mean needs a gradient of each, also of concepts that others learn."""
        return 0.0 * torch.stack([parameter.sum() for parameter in self.trained_parameters()]).sum()

    def _log_step(self, numbers: Mapping[str, Tensor], places: Sequence[int]) -> None:
        """Logs the means of numbers that are there for each concept, and where the run learns several those, too."""
        means = {f"train/{name}": values.mean() for name, values in numbers.items()}
        self.log("train/embedding_distance", means.pop("train/embedding_distance"), prog_bar=True, batch_size=1)
        self.log("loss", numbers["loss"].mean(), prog_bar=True, logger=False, batch_size=1)
        if len(self.concepts) > 1:
            means |= {f"train/{name}/{self.names[place]}": value for name, values in numbers.items()
                      for place, value in zip(places, values, strict=True)}
        self.log_dict(means, batch_size=1)

    def step_losses(self, batches: Mapping[int, Mapping[str, Any]], generators: Sequence[Generator]
                    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The base model's own objective on each concept's photos, weighed by their masks, and numbers to log: (J,).

        Args:
            batches: the place of each of J concepts -> a batch of its photos.
            generators: what each concept's noise comes from.
        """
        drawn = [self._noised(place, batch, generator)
                 for (place, batch), generator in zip(batches.items(), generators, strict=True)]
        z, noise, t, weight = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        captions = [caption for batch in batches.values() for caption in batch["caption"]]
        losses, numbers = self.per_sample_losses(z, self.step_context(captions), t, noise, weight)
        sizes = [len(batch["caption"]) for batch in batches.values()]

        def of_each(values: Tensor) -> Tensor:
            return torch.stack([own.mean() for own in values.split(sizes)])

        return of_each(losses), {name: of_each(values) for name, values in numbers.items()}

    def _noised(self, place: int, batch: Mapping[str, Any], generator: Generator
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents of a batch's photos, noise for them, timesteps, and weights by their masks."""
        chosen = batch["index"] + self._first[place], batch["flipped"].long()
        z = self.scale_factor * DiagonalGaussianDistribution(self._moments.to(self.device)[chosen]).sample(generator)
        return z, *self.noise_and_times(z, generator), self._weights.to(z)[chosen]

    def noise_and_times(self, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Noise of the shape of z (B, C, h, w), and timesteps (B,)."""
        noise = to_device(torch.randn(z.shape, generator=generator), z.device).to(z.dtype)
        return noise, self.sample_timesteps(len(z), z.device, generator)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The base model's latents are scaled already."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tuned = {f"model.diffusion_model.{name}" for name in self.trained_unet_weights()}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items()
                                    if key.startswith("concepts.") or key in tuned}

    @torch.no_grad()
    def log_images(self, batch: Mapping[Any, Any], N: int = 8, ddim_steps: int = 50,
                   unconditional_guidance_scale: float = 3.0) -> dict[str, Tensor]:
        """Samples under prompts of the batch, of each concept in turn as it now is; photos have no pixels any more."""
        from ldm.inference.sampling import Job
        from ldm.training.concept_callbacks import drawn_now

        batches = [batch] if "caption" in batch else batch.values()
        turns = zip(*(own["caption"] for own in batches), strict=True)
        prompts = [prompt for turn in turns for prompt in turn][:N]
        concepts = [self.export_concept(place) for place in range(len(self.concepts))]
        pictures = drawn_now(self, concepts, [Job(prompt, seed) for seed, prompt in enumerate(prompts)],
                             steps=ddim_steps, scale=unconditional_guidance_scale)
        return {"samples": torch.stack([to_tensor(picture) for picture in pictures])}

    def configure_callbacks(self) -> list[pl.Callback]:
        from ldm.training.concept_callbacks import ConceptSaver

        return [ConceptSaver()]
