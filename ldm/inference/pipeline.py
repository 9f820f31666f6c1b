"""The path from prompts to images that every script, training preview, benchmark and evaluation shares."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Generator, Tensor

from ldm.checkpoints.load import load_model
from ldm.common.errors import MemoryShortage, UserError
from ldm.common.paths import resolve_path
from ldm.common.prompt_file import fill_slots
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_checks import check_prompts
from ldm.concepts.settings import override_settings, values_for_each
from ldm.data.images import from_tensor
from ldm.inference.encoding import (
    AnyPromptEncoder,
    EncodedPrompts,
    build_prompt_encoder,
    encode_prompts,
)
from ldm.inference.loaded_concepts import LoadedConcepts
from ldm.inference.loras import add_loras
from ldm.inference.model_config import (
    MODEL_CONFIG,
    complete_settings,
    image_size,
    inference_defaults,
    latent_size,
    model_setting,
    read_model_config,
)
from ldm.inference.notices import tell_about_prompts, tell_about_strength, warn_about_photos, warn_about_size
from ldm.inference.precision import sixteen_bit_type, uses_sixteen_bits
from ldm.inference.requests import GenerationRequest, requests_for, seeds_for
from ldm.inference.settings import AUTO, GenerationSettings, LoraFile
from ldm.inference.sgm_config import as_own_config
from ldm.inference.size_conditions import reads_sizes, sizes_of, with_sizes
from ldm.inference.source_image import ImageLike, SourceImage, StartingLatents
from ldm.sampling.samplers import sampler_class
from ldm.util import pick_device

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"  # in a model's folder


@dataclass(frozen=True)
class PipelineOutput:
    """The result of a call of the pipeline.

    Attributes:
        images: the images, prompt by prompt.
        requests: prompt, seed and negative prompt of each image.
        settings: the settings that were used, with all defaults filled in.
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]
    settings: GenerationSettings

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [request.seed for request in self.requests]


class PerfusionPipeline(LoadedConcepts):
    """Generate images with one base model and any number of learned concepts.

        pipe = PerfusionPipeline.from_pretrained("models/mini")
        pipe.load_concepts("teddy.safetensors", "teapot.safetensors")
        images = pipe("a <teddy> next to a <teapot>", seed=1, num_images=4, bias=0.5).images

    Concepts can be loaded and unloaded between calls. They never change the base model.

    Args:
        model: a text-to-image `LatentDiffusion`; it may be in training.
        config: its config, for image sizes and default settings; None: only the model's own image size is possible.
        precision: "full", "autocast" (the U-Net runs in 16 bits), or None: autocast on CUDA, full elsewhere.
        accelerate: on CUDA with autocast, convert the U-Net permanently to its fastest form for inference.

    Attributes:
        defaults: default settings and helper models, from the section `inference` of the model's config.
        checkpoint: the file or folder of its weights; None: unknown.
        concepts: the loaded concepts.
        batch_size: images generated at a time unless a call says otherwise.
    """

    def __init__(self, model: Any, config: DictConfig | None = None, precision: str | None = None,
                 accelerate: bool = False) -> None:
        if not hasattr(getattr(model, "cond_stage_model", None), "encode_tokens"):
            target = type(model).__name__ if config is None else model_setting(config, "target")
            raise UserError(f"{target} of this config reads no prompts; choose the config of a text-to-image model")
        super().__init__(model, config, inference_defaults(config))
        self.autocast = uses_sixteen_bits(precision, self.device)
        self.accelerate = accelerate
        self.checkpoint: str | Path | None = None if config is None else model_setting(config, "params.ckpt_path")
        self.batch_size = 4
        self._cached_encoder: tuple[list[AnyConcept], AnyPromptEncoder] | None = None

    # Loading

    @classmethod
    def from_pretrained(cls, path: str | Path, config: str | Path | DictConfig | None = None,
                        device: str | torch.device | None = None, precision: str | None = None) -> PerfusionPipeline:
        """Load a base model.

        Args:
            path: a folder with `config.yaml` and weights (such as models/mini), a config with a `ckpt_path`, or, with
                `config`, a .ckpt, a .safetensors or a diffusers folder. A relative path may count from the project's
                root.
            config: the model's config, such as configs/stable-diffusion/v1-inference.yaml.
            device: such as "cuda:1"; None: cuda, then mps, then cpu.
            precision: see the class.

        Raises:
            UserError: a file is missing or damaged, or does not fit the config.
        """
        found = resolve_path(path)
        if config is not None:
            return cls.from_config(config, found, device, precision)
        if (found / MODEL_CONFIG).is_file():
            weights = found / WEIGHTS
            return cls.from_config(found / MODEL_CONFIG, weights if weights.is_file() else None, device, precision)
        if found.suffix in (".yaml", ".yml"):
            return cls.from_config(found, None, device, precision)
        raise UserError(f"{path}: {'holds' if found.exists() else 'is not there and names'} no {MODEL_CONFIG}; give "
                        "the model's config too, such as config=\"configs/stable-diffusion/v1-inference.yaml\"")

    @classmethod
    def from_config(cls, config: str | Path | DictConfig, checkpoint: str | Path | None = None,
                    device: str | torch.device | None = None, precision: str | None = None,
                    vae: str | Path | None = None, text_encoder: str | Path | None = None,
                    loras: Sequence[str | Path | LoraFile] = ()) -> PerfusionPipeline:
        """Load the model that a config describes, with the weights of `checkpoint` or of its own `ckpt_path`.

        Args:
            vae, text_encoder: file or folder to take the first stage or the text encoder from instead.
            loras: LoRA files to add to the weights, such as "style.safetensors" or "style.safetensors:0.8".

        Raises:
            UserError: the config, the weights, a LoRA or the device cannot be used.
        """
        described = as_own_config(config) if isinstance(config, DictConfig) else read_model_config(config)
        where = device if isinstance(device, torch.device) else pick_device(device)
        model = load_model(described, checkpoint, where, vae, text_encoder)
        add_loras(model, loras)
        pipeline = cls(model, described, precision, accelerate=True)
        if checkpoint is not None:
            pipeline.checkpoint, pipeline.defaults = checkpoint, inference_defaults(described, checkpoint)
        return pipeline

    # Generating

    @property
    def device(self) -> torch.device:
        return self.model.betas.device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that the model generates by default."""
        return image_size(self._known_config(), latent_size(self._known_config()))

    def __call__(self, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] = "", *,
                 num_images: int = 1, seed: int | None = None,
                 generator: Generator | Sequence[Generator] | None = None, num_inference_steps: int | None = None,
                 guidance_scale: float | None = None, sampler: str | None = None, eta: float | None = None,
                 height: int | None = None, width: int | None = None,
                 bias: float | str | Sequence[float | str | None] | Mapping[str, float | str] | None = None,
                 temperature: float | Sequence[float | None] | Mapping[str, float] | None = None,
                 global_locking: bool = False, all_layers: bool = False, prompt_weights: bool = True,
                 original_size: tuple[int, int] | None = None, crop: tuple[int, int] | None = None,
                 target_size: tuple[int, int] | None = None, timestep_spacing: str | None = None,
                 guidance_rescale: float | None = None, image: ImageLike | None = None,
                 strength: float | None = None, mask_image: ImageLike | None = None, mask_border: int | None = None,
                 batch_size: int | None = None, progress: bool = False) -> PipelineOutput:
        """Generate images from prompts, in which placeholders stand for loaded concepts.

        Args:
            prompt: one prompt, or several.
            negative_prompt: what guidance steers away from; one for all prompts, or one for each.
            num_images: number of images per prompt.
            seed: seed of the first image of each prompt; each further image adds 1. Up to rounding, the same seed gives
                the same image at any batch size and on any device. None: random, see `PipelineOutput.seeds`.
            generator: a generator, or one for each image, that seeds are drawn from; instead of `seed`.
            num_inference_steps: number of sampling steps; None: the model's default.
            guidance_scale: 1 means no guidance; None: the model's default.
            sampler: a name in `ldm.sampling.samplers.SAMPLERS`; None: the model's default.
            eta: 0..1, share of noise that each step adds; None: the sampler's default.
            height, width: image size in pixels; None: the model's own.
            bias: beta; one value for all concepts, one for each in order, or a mapping from placeholders to values.
                Higher follows the prompt more and the concept less. "auto" finds a balance. None: the concept's own.
            temperature: tau, likewise: how softly the gate opens.
            global_locking: lock the keys of the whole prompt to the super-category.
            all_layers: use the learned target outputs of all layers.
            prompt_weights: weight words by "(word:1.3)", "((word))" and "[word]"; False: read these literally.
            original_size, crop, target_size: of models that read sizes, see `GenerationSettings`.
            timestep_spacing: a name in `ldm.sampling.spacings.TIMESTEP_SPACINGS`; None: the sampler's own.
            guidance_rescale: 0..1, for models with zero terminal SNR; None: the model's default.
            image: an image or a file to start from (img2img).
            strength: above 0 and up to 1; higher keeps less of `image`. None: 0.75, or 1 with a mask.
            mask_image: white where `image` is regenerated (inpainting).
            mask_border: width in pixels of the blend around the mask; None: 1/32 of the shorter side.
            batch_size: images generated at a time; None: `self.batch_size`.
            progress: show a progress bar of the sampling steps.

        Raises:
            UserError: a prompt is too long or names a concept that is not loaded, or a setting cannot be used.
        """
        words = [concept.placeholder for concept in self.concepts]
        prompts, negatives = fill_slots(prompt, words), fill_slots(negative_prompt, words)
        requests = requests_for(prompts, seeds_for(len(prompts), num_images, seed, generator), negatives)
        settings = self.complete(GenerationSettings(
            num_inference_steps, guidance_scale, sampler, eta, height, width,
            values_for_each(bias, self.concepts), values_for_each(temperature, self.concepts), global_locking,
            all_layers, prompt_weights, original_size, crop, target_size, timestep_spacing, guidance_rescale))
        settings = self.resolve_auto_bias(settings, prompts)
        source = self._source(image, strength, mask_image, mask_border, settings)
        images = self.generate(requests, settings, source=source, batch_size=batch_size, progress=progress)
        self.warn_about(requests, settings, source)
        return PipelineOutput(list(images), requests, settings)

    def generate(self, requests: Sequence[GenerationRequest], settings: GenerationSettings | None = None,
                 concepts: Sequence[AnyConcept] | None = None, source: SourceImage | None = None,
                 batch_size: int | None = None, progress: bool = False,
                 callback: Callable[[int], None] | None = None) -> Iterator[Image.Image]:
        """Check everything, then yield the image of each request in turn, as soon as its batch is done.

        Each image has its own generator, on the CPU: up to rounding, the same request gives the same image whatever the
        batch size, the other requests and the device are.

        Args:
            requests: one for each image.
            settings: how to generate; None: the model's defaults.
            concepts: concepts to use instead of the loaded ones.
            source: an image to start from.
            batch_size, progress: as for `__call__`.
            callback: called after each sampling step with its index; what it raises ends the generation.

        Raises:
            UserError: a prompt is too long or names an unknown concept, or a setting cannot be used.
            MemoryShortage: while iterating, if the device has no room for a batch.
        """
        settings = self.complete(settings or GenerationSettings())
        if settings.guidance_scale == 1 and any(request.negative_prompt for request in requests):
            raise UserError("negative prompts act through guidance, and a guidance_scale of 1 is none; raise it")
        chosen = override_settings(self.concepts if concepts is None else concepts, settings.biases,
                                   settings.temperatures, settings.all_layers)
        batch_size = self.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be 1 or more")
        prompts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
        check_prompts(prompts, [concept.placeholder for concept in chosen], settings.prompt_weights)
        encoded = self.encode(prompts, chosen, settings.global_locking, settings.prompt_weights)
        self._accelerate_for(chosen)
        start = None if source is None else source.encode(self.model, self.latent_size(settings))
        images = self._images(encoded, requests, settings, start, batch_size, progress, callback)
        return images if source is None else map(source.composite, images)

    def complete(self, settings: GenerationSettings) -> GenerationSettings:
        """Return the settings with the defaults of the model and the sampler filled in.

        Raises:
            UserError: the model or the sampler does not support a setting.
        """
        return complete_settings(settings, self.config, self.defaults)

    def encode(self, prompts: Sequence[str], concepts: Sequence[AnyConcept], global_locking: bool = False,
               prompt_weights: bool = True) -> EncodedPrompts:
        """Encode prompts under the edit of concepts, which keep their own settings; see `encode_prompts`."""
        return encode_prompts(self.prompt_encoder(concepts), prompts, global_locking, prompt_weights)

    def prompt_encoder(self, concepts: Sequence[AnyConcept]) -> AnyPromptEncoder:
        """Return the encoder of prompts with these concepts. The last encoder is cached."""
        requested = list(concepts)
        if self._cached_encoder is None or not _are_same(self._cached_encoder[0], requested):
            encoder = build_prompt_encoder(self.model, requested, self.defaults.covariance)
            self._cached_encoder = requested, encoder
        return self._cached_encoder[1]

    def latents(self, encoded: EncodedPrompts, requests: Sequence[GenerationRequest], settings: GenerationSettings,
                start: StartingLatents | None = None, progress: bool = False,
                callback: Callable[[int], None] | None = None) -> Tensor:
        """Sample the scaled latents (B, C, h, w), float32, of B requests as one batch; `settings` are complete."""
        sampler = sampler_class(settings.sampler)(self.model)
        conditional, unconditional = encoded.for_requests(requests)
        if reads_sizes(self.model):
            sizes = sizes_of(settings, self.size_of(settings))
            conditional, unconditional = (with_sizes(self.model, one, sizes) for one in (conditional, unconditional))
        options = {} if start is None else {
            "x0": start.latents.expand(len(requests), -1, -1, -1), "mask": start.mask, "strength": start.strength}
        with torch.autocast(self.device.type, sixteen_bit_type(self.device), enabled=self.autocast):
            latents, _ = sampler.sample(
                settings.num_inference_steps, len(requests), (self.model.channels, *self.latent_size(settings)),
                conditional, eta=settings.eta, verbose=progress, callback=callback,
                generators=[Generator().manual_seed(request.seed) for request in requests],
                unconditional_guidance_scale=settings.guidance_scale,
                timestep_spacing=settings.timestep_spacing, guidance_rescale=settings.guidance_rescale,
                unconditional_conditioning=None if settings.guidance_scale == 1 else unconditional, **options)
        return latents.float()

    def latent_size(self, settings: GenerationSettings) -> tuple[int, int]:
        """Return (h, w) of the latents of images with these settings."""
        if self.config is None and settings.height is None and settings.width is None:
            return tuple(self.model.latent_shape[1:])
        return latent_size(self._known_config(), settings.height, settings.width)

    def size_of(self, settings: GenerationSettings) -> tuple[int, int]:
        """Return (height, width) in pixels of images with these settings."""
        if self.config is None and settings.height is None and settings.width is None:
            return self.model.pixel_size
        return image_size(self._known_config(), self.latent_size(settings))

    # Concepts in prompts

    def resolve_auto_bias(self, settings: GenerationSettings, prompts: Sequence[str], clip: str | None = None,
                          photos: Sequence[Image.Image] | None = None) -> GenerationSettings:
        """Return the settings with every bias "auto" replaced by the one that `ldm.inference.auto_bias` finds.

        Args:
            prompts: the prompts that will be generated.
            clip: folder or name of the CLIP to measure with; None: the model's.
            photos: photos of the concept; allowed only if one bias is to be found.
        """
        if AUTO not in (settings.biases or ()):
            return settings
        from ldm.inference.auto_bias import find_biases  # the CLIPs' library takes seconds to load

        return replace(settings, bias=find_biases(self, settings, prompts, clip, photos))

    def warn_about(self, requests: Sequence[GenerationRequest], settings: GenerationSettings,
                   source: SourceImage | None = None) -> None:
        """Log what is not obvious about a run, or beyond what the model knows; see `ldm.inference.notices`."""
        tell_about_prompts(self.model.cond_stage_model, self.concepts, requests, settings.prompt_weights)
        if source is not None:
            tell_about_strength(source.strength, settings)
        if self.config is not None:
            warn_about_size(self.config, settings.height, settings.width)
            sizes = [] if source is None else [source.original_size]
            warn_about_photos(self.defaults, min(self.image_size), sizes)

    # Steps of `generate`

    def _images(self, encoded: EncodedPrompts, requests: Sequence[GenerationRequest], settings: GenerationSettings,
                start: StartingLatents | None, batch_size: int, progress: bool,
                callback: Callable[[int], None] | None) -> Iterator[Image.Image]:
        try:
            for first in range(0, len(requests), batch_size):
                batch = requests[first:first + batch_size]
                # Decode one image at a time: that takes more memory than sampling it.
                for latent in self.latents(encoded, batch, settings, start, progress, callback):
                    yield from_tensor(self.model.decode_first_stage(latent[None])[0])
        except torch.OutOfMemoryError:
            remedy = "lower the batch size (--batch_size), or generate" if batch_size > 1 else "generate"
            raise MemoryShortage(f"{self.device} has no memory for {batch_size} such images at a time; {remedy} "
                                 "smaller images") from None

    def _accelerate_for(self, concepts: Sequence[AnyConcept]) -> None:
        """Convert the U-Net, once, unless concepts replace some of its weights by 32-bit ones."""
        finetuned = any(getattr(concept, "weights", None) for concept in concepts)
        if self.accelerate and self.autocast and self.device.type == "cuda" and not finetuned:
            self.model.model.enable_fast_inference(sixteen_bit_type(self.device))
            self.accelerate = False

    def _source(self, image: ImageLike | None, strength: float | None, mask_image: ImageLike | None,
                mask_border: int | None, settings: GenerationSettings) -> SourceImage | None:
        if image is None:
            if (strength, mask_image, mask_border) != (None, None, None):
                raise UserError("strength and mask_image act on an image; give one to start from")
            return None
        height, width = self.size_of(settings)
        return SourceImage.load_with_mask(image, (width, height), strength, mask_image, mask_border)

    def _known_config(self) -> DictConfig:
        if self.config is None:
            raise ValueError("the pipeline was built without the model's config, so it knows no size in pixels")
        return self.config


def _are_same(some: Sequence[AnyConcept], others: Sequence[AnyConcept]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))
