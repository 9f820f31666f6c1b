"""Say what a run does that its settings do not show, and warn about what its model does not know.

Each notice is one line of the log.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig

from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_checks import warn_unknown_words, warn_unused_concepts
from ldm.concepts.prompt_weights import describe_weights, plain_text
from ldm.inference.model_config import InferenceDefaults, image_size, latent_size
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings

log = logging.getLogger(__name__)

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


def warn_about_size(config: DictConfig, height: int | None, width: int | None) -> None:
    """Warn if images have another height or width in pixels than those that the model was trained on; None: its own."""
    own = image_size(config, latent_size(config))
    height, width = height or own[0], width or own[1]
    if (height, width) != own:
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
