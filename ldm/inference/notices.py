"""Say what a run does that its settings do not show, and warn about what its model does not know.

Each notice is one line of the log.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.checkpoints.distilled import FewStepModel, few_step_model
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_checks import warn_unknown_words, warn_unused_concepts
from ldm.concepts.prompt_weights import describe_weights, plain_text
from ldm.inference.model_config import InferenceDefaults, describes_sizes, image_size, latent_size
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings

log = logging.getLogger(__name__)

AREA_TOLERANCE = 0.2  # relative; Stable Diffusion XL was trained on areas up to a tenth below 1024 x 1024
PHOTO_SCALE = 2  # of a model that knows drawings of its own size: larger images are photos, or drawings of others


def tell_about_prompts(encoder: Any, concepts: Sequence[AnyConcept], requests: Sequence[GenerationRequest],
                       prompt_weights: bool) -> None:
    """Tell which words have weights, and warn about unused concepts and unknown words.

    Args:
        encoder: the text encoder.
        concepts: the loaded concepts.
        requests: one for each image.
        prompt_weights: whether brackets weight words.
    """
    placeholders = [concept.placeholder for concept in concepts]
    prompts = list(dict.fromkeys(text for request in requests for text in (request.prompt, request.negative_prompt)))
    if prompt_weights:
        description = describe_weights(prompts, placeholders)
        if description is not None:
            log.info("%s", description)
        prompts = [plain_text(prompt, placeholders) for prompt in prompts]
    warn_unused_concepts(prompts, placeholders)
    warn_unknown_words(encoder, prompts, placeholders)


def tell_about_strength(strength: float, settings: GenerationSettings) -> None:
    """Tell how many of the sampling steps are run from an image of this strength."""
    steps = settings.num_inference_steps
    if strength < 1:
        run = max(1, round(strength * steps))
        log.info("strength %g: %d of %d steps are run, the last ones", strength, run, steps)


def tell_about_few_steps(files: Iterable[str | Path], settings: GenerationSettings) -> None:
    """Tell which settings suit a distilled model if others are set, and warn if they ignore the prompt or the noise.

    Args:
        files: the checkpoint and the LoRAs.
        settings: with all defaults filled in.
    """
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    model = few_step_model(files)
    if model is not None and not _suits(model, settings):
        kind = model.kind
        spacing = f" --timestep_spacing {kind.spacing}" if kind.spacing else ""
        log.info("%s: by its name, a %s model; for these, --sampler %s%s --steps %d --scale %g is usual", model.file,
                 kind.name, kind.sampler, spacing, model.steps, kind.guidance)
    if scale == 0:
        log.warning("warning: guidance 0 leaves out the prompt; what others call guidance 0 is --scale 1 here")
    if steps == 1 and settings.sampler in ("ddim", "plms") and settings.timestep_spacing in (None, "leading"):
        log.warning("warning: a single step of %s starts where hardly any noise is left; add --timestep_spacing "
                    "trailing", settings.sampler)


def _suits(model: FewStepModel, settings: GenerationSettings) -> bool:
    kind = model.kind
    return (settings.sampler == kind.sampler and settings.timestep_spacing in (kind.spacing, "trailing")
            and settings.num_inference_steps <= max(kind.most_steps, model.steps)
            and 1 <= settings.guidance_scale <= kind.most_guidance)


def warn_about_size(config: DictConfig, height: int | None, width: int | None) -> None:
    """Warn if images have another height or width in pixels than those that the model was trained on; None: its own.

    Models that read sizes were trained on many proportions of about the same area.
    """
    own = image_size(config, latent_size(config))
    height, width = height or own[0], width or own[1]
    same_area = describes_sizes(config) and abs(height * width / (own[0] * own[1]) - 1) <= AREA_TOLERANCE
    if (height, width) != own and not same_area:
        log.warning("warning: this model was trained on images of %dx%d; at %dx%d they may repeat subjects or lose "
                    "their composition", own[1], own[0], width, height)


def warn_about_photos(defaults: InferenceDefaults, side: int, sizes: Iterable[tuple[int, int]]) -> None:
    """Warn if images look like photos to a model that knows only what `InferenceDefaults.domain` says.

    Args:
        defaults: of the model.
        side: side in pixels of the images that it was trained on.
        sizes: (width, height) of the images that it starts from or learns from.
    """
    if defaults.domain is not None and any(min(size) > PHOTO_SCALE * side for size in sizes):
        log.warning("warning: this model knows only %s, %d pixels wide, and photos become crude in it; for photos, "
                    "take a Stable Diffusion model, see docs/models.md", defaults.domain, side)
