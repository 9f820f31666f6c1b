"""Find a balanced bias for a concept by a small sweep: what `bias="auto"` and `--bias auto` do.

The bias beta trades the prompt against the concept. The higher it is, the more an image follows its prompt and the less
it shows the concept, so every value is a point on a curve of text similarity against image similarity (Tewel et al.,
"Key-Locked Rank One Editing for Text-to-Image Personalization", 2023). Where the middle of that curve lies differs from
concept to concept. So a few images are generated at each of several biases and measured by a CLIP.

The rule (`balanced`). Text similarity and likeness are each rescaled to 0 at their lowest value and 1 at their highest
value in the sweep, because their cosines differ in size and spread. The bias with the highest harmonic mean of the two
wins. The harmonic mean is close to the smaller of the two, so neither is bought by giving up the other.

Flat measures. A measure is flat if between the lowest and the highest bias it does not change in the expected direction
(text similarity up, likeness down) by at least `FLAT` and by twice the standard error of that change over prompts.
Rescaling a flat measure would blow up noise. The two outermost biases are compared because they are known beforehand:
between the best and the worst of several values, noise alone makes a difference. Images of one prompt start from the
same noise at every bias and count as one sample. If text similarity is flat, no bias loses anything of the prompt:
among those with the most likeness, to within `FLAT`, the one closest to the concept's own wins. If likeness is flat,
the CLIP does not see how much of the concept there is, so the concept keeps its own bias.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.common.progress import show_progress
from ldm.common.prompt_file import SLOT
from ldm.common.words import replace_word, spell_out, split_at_placeholders
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_weights import plain_text
from ldm.concepts.settings import override_settings
from ldm.data.images import crop_square, to_tensor
from ldm.inference.model_config import InferenceDefaults
from ldm.inference.requests import GenerationRequest, requests_for
from ldm.inference.settings import AUTO, GenerationSettings
from ldm.models.clip_encoder import ClipEncoder, check_clip_name

log = logging.getLogger(__name__)

BIASES = (0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.05)
GLOBAL_BIASES = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # the paper's usual range is 0.2 lower with global locking
SAMPLER, STEPS = "dpm", 10  # enough to see what is in an image, and closer to the converged sample than 15 DDIM steps
MAX_PROMPTS = 4  # with two, the standard error of a change over prompts would say little
NEUTRAL = tuple(f"a photo of a {SLOT}{where}" for where in ("", " on the beach", " in the snow", " in a garden"))
SEEDS = range(2)  # the same in every run, so that the bias does not depend on the seeds of the user's images
REFERENCE_SEEDS = range(4, 8)  # others than SEEDS: images from the same noise are alike for that reason alone
FLAT = 1.0  # in cosines x 100; smaller differences are invisible
TINY = 1e-12  # keeps the harmonic mean of two zeros defined
TEXT, LIKENESS = "text", "likeness"


class ImagePipeline(Protocol):
    """The part of `PerfusionPipeline` that the search uses."""

    concepts: Sequence[AnyConcept]
    defaults: InferenceDefaults
    checkpoint: str | Path | None
    device: torch.device
    image_size: tuple[int, int]

    def complete(self, settings: GenerationSettings) -> GenerationSettings: ...

    def generate(self, requests: Sequence[GenerationRequest], settings: GenerationSettings,
                 concepts: Sequence[AnyConcept]) -> Iterator[Image.Image]: ...


@dataclass(frozen=True, eq=False)
class BiasTrial:
    """Text similarity and likeness of the images at one bias.

    Attributes:
        bias: beta.
        texts: (P,) cosines x 100 of images and their prompts, means per prompt.
        likenesses: (P,) cosines x 100 of images and references, means per prompt.
    """

    bias: float
    texts: np.ndarray
    likenesses: np.ndarray

    @classmethod
    def of_images(cls, bias: float, texts: np.ndarray, likenesses: np.ndarray, prompts: int) -> BiasTrial:
        """Average the cosines (n,) of images, equally many per prompt and ordered by prompt, over each prompt."""
        return cls(bias, *(values.reshape(prompts, -1).mean(1) for values in (texts, likenesses)))

    @property
    def text(self) -> float:
        """Mean text similarity."""
        return float(self.texts.mean())

    @property
    def likeness(self) -> float:
        """Mean likeness."""
        return float(self.likenesses.mean())


def balanced(trials: Sequence[BiasTrial], own_bias: float) -> BiasTrial:
    """Return the trial with the best balance (see the module); among equals, the one closest to `own_bias`."""
    texts, likenesses = _measures(trials)
    flat = flat_measures(trials)
    if LIKENESS in flat:
        good = np.ones(len(trials), dtype=bool)
    elif TEXT in flat:
        means = likenesses.mean(1)
        good = means > means.max() - FLAT
    else:
        text, likeness = _rescaled(texts), _rescaled(likenesses)
        scores = 2 * text * likeness / np.maximum(text + likeness, TINY)
        good = scores == scores.max()
    candidates = [trial for trial, is_good in zip(trials, good, strict=True) if is_good]
    return min(candidates, key=lambda trial: abs(trial.bias - own_bias))


def describe_choice(concept: Concept, chosen: BiasTrial, trials: Sequence[BiasTrial]) -> str:
    """Describe the choice in one line, including any flat measures."""
    flat = flat_measures(trials)
    doubt = f"; {' and '.join(flat)} hardly change{'' if len(flat) > 1 else 's'}" if flat else ""
    unchanged = ", so it keeps its own" if LIKENESS in flat else ""
    biases = [trial.bias for trial in trials]
    return (f"bias of {concept.placeholder}: {chosen.bias:g} (text {chosen.text:.1f}, likeness {chosen.likeness:.1f}; "
            f"tried {min(biases):g} to {max(biases):g}{doubt}{unchanged})")


def prompts_about(concept: Concept, concepts: Iterable[Concept], prompts: Iterable[str]) -> list[str]:
    """Return up to `MAX_PROMPTS` prompts that show a concept alone.

    These are the first of `prompts` that name it, with plain words in place of other concepts, and then neutral ones.
    """
    words = {concept.placeholder: None}
    words |= {other.placeholder: other.super_category for other in concepts if other is not concept}
    naming = [prompt for prompt in prompts if 0 in split_at_placeholders(prompt, list(words))]
    neutral = [replace_word(concept.placeholder, SLOT, prompt) for prompt in NEUTRAL]
    return [spell_out(words, prompt) for prompt in list(dict.fromkeys([*naming, *neutral]))[:MAX_PROMPTS]]


def find_biases(pipeline: ImagePipeline, settings: GenerationSettings, prompts: Sequence[str],
                clip: str | None = None, photos: Sequence[Image.Image] | None = None) -> tuple[float | None, ...]:
    """Return the bias of each loaded concept that is no word alone; each "auto" is replaced by a balanced one.

    Args:
        pipeline: with the concepts loaded.
        settings: how images will be generated; `biases` holds "auto", once for all concepts or for some of them.
        prompts: the prompts that will be generated.
        clip: folder or name of the CLIP to measure with; None: the model's.
        photos: photos of the concept; None: likeness is measured against generated images.

    Raises:
        UserError: no concept is loaded, photos were given and several biases are open, or there is no usable CLIP.
    """
    concepts = override_settings(pipeline.concepts, None, settings.temperatures, settings.all_layers)
    having = [concept for concept in concepts if not concept.is_word]
    if not having:
        raise UserError("bias auto acts on learned concepts, and none is loaded; load one first")
    biases = settings.biases_of(len(having))
    if len(biases) == len(concepts):  # of a mapping, with None for words
        biases = tuple(bias for concept, bias in zip(concepts, biases, strict=True) if concept in having)
    open_biases = biases.count(AUTO)
    if photos is not None and open_biases > 1:
        raise UserError(f"the photos can be of one concept only, and bias auto is asked for {open_biases}; leave the "
                        "photos out, or give numbers for the other biases")
    name = clip_for(clip, pipeline.defaults, pipeline.checkpoint)
    finder = BiasFinder(pipeline, ClipEncoder.from_path(name, pipeline.device), settings, photos)
    return tuple(finder.find(concept, prompts_about(concept, concepts, prompts)).bias if bias == AUTO else bias
                 for concept, bias in zip(having, biases, strict=True))


def clip_for(name: str | None, defaults: InferenceDefaults, checkpoint: str | Path | None = None) -> str:
    """Return the folder or name of the CLIP to measure with, without loading it.

    It is `name`, or the one in the model's config, or the folder evaluation_clip beside the model's weights.

    Raises:
        UserError: there is none.
    """
    if name is not None:
        if not resolve_path(name).is_dir():
            check_clip_name(name)
        return str(resolve_path(name))
    if defaults.evaluation_clip is not None:
        return str(resolve_path(defaults.evaluation_clip))
    beside = resolve_path(checkpoint).parent / "evaluation_clip" if checkpoint else None
    if beside is None or not beside.is_dir():
        where = f" at {beside}" if beside else ""
        raise UserError(f"bias auto measures images by a CLIP, and there is none{where}; name a folder of one with "
                        "--clip, or one to download such as ViT-B-32/openai")
    return str(beside)


class BiasFinder:
    """Find balanced biases with one pipeline and one CLIP.

    Args:
        pipeline: with any concepts loaded.
        clip: the CLIP.
        settings: how images will be generated; the search replaces the size and, unless the steps are few already,
            sampler and steps by faster ones.
        photos: images of the concept; None: likeness is measured against images generated with the lowest bias, of
            "a photo of" the concept.
    """

    def __init__(self, pipeline: ImagePipeline, clip: ClipEncoder, settings: GenerationSettings,
                 photos: Sequence[Image.Image] | None = None) -> None:
        self.pipeline, self.clip, self.photos = pipeline, clip, photos
        self.side = min(pipeline.image_size)
        self.settings = replace(settings.without_concept_settings(), height=None, width=None)
        # Distilled models need their own sampler, and take few steps anyway.
        if settings.num_inference_steps is None or settings.num_inference_steps > STEPS:
            self.settings = replace(self.settings, sampler=SAMPLER, num_inference_steps=STEPS, eta=None,
                                    timestep_spacing=None)
        self.biases = GLOBAL_BIASES if settings.global_locking else BIASES
        pipeline.complete(self.settings)

    def find(self, concept: Concept, prompts: Sequence[str]) -> BiasTrial:
        """Return the balanced bias of a concept for prompts that name no other concept; log it.

        Raises:
            UserError: the concept is of another base model, or a prompt is too long.
        """
        trials = self.sweep(concept, prompts)
        chosen = balanced(trials, concept.bias)
        log.info("%s", describe_choice(concept, chosen, trials))
        return chosen

    def sweep(self, concept: Concept, prompts: Sequence[str]) -> list[BiasTrial]:
        """Measure the prompts' images at each bias, in rising order, including the concept's own bias."""
        requests = requests_for(prompts, SEEDS)
        texts = self.clip.embed_texts([self._plain(concept, request.prompt) for request in requests])
        references = self._embed(self.photos or self._generate(concept, _reference_requests(concept), self.biases[0]))
        trials = []
        biases = sorted({*self.biases, concept.bias})
        for bias in show_progress(biases, description=f"bias of {concept.placeholder}"):
            images = self._embed(self._generate(concept, requests, bias))
            # Cosines of each image with its own prompt, and with all references in the mean.
            cosines = (images * texts).sum(1), (images @ references.T).mean(1)
            trials.append(BiasTrial.of_images(bias, *(100 * each.double().numpy() for each in cosines), len(prompts)))
        return trials

    def _plain(self, concept: Concept, prompt: str) -> str:
        """Return a prompt in plain words, without weights."""
        text = plain_text(prompt, [concept.placeholder]) if self.settings.prompt_weights else prompt
        return spell_out({concept.placeholder: concept.super_category}, text)

    def _generate(self, concept: Concept, requests: Sequence[GenerationRequest], bias: float) -> list[Image.Image]:
        return list(self.pipeline.generate(requests, replace(self.settings, bias=bias), [concept]))

    def _embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return (n, d): the CLIP's embedding of the middle square of each image."""
        return self.clip.embed_images(torch.stack([to_tensor(crop_square(image, self.side)) for image in images]))


def _reference_requests(concept: Concept) -> list[GenerationRequest]:
    return requests_for([replace_word(concept.placeholder, SLOT, NEUTRAL[0])], REFERENCE_SEEDS)


def _measures(trials: Sequence[BiasTrial]) -> tuple[np.ndarray, np.ndarray]:
    """Return text similarity and likeness, (biases, P) each."""
    return np.stack([trial.texts for trial in trials]), np.stack([trial.likenesses for trial in trials])


def flat_measures(trials: Sequence[BiasTrial]) -> list[str]:
    """Return which of `TEXT` and `LIKENESS` are flat (see the module)."""
    lowest = min(trials, key=lambda trial: trial.bias)
    highest = max(trials, key=lambda trial: trial.bias)
    changes = {TEXT: highest.texts - lowest.texts, LIKENESS: lowest.likenesses - highest.likenesses}
    return [name for name, change in changes.items() if not _is_certain(change)]


def _is_certain(change: np.ndarray) -> bool:
    """Return whether the mean of changes (P,) over prompts is at least `FLAT` and twice its standard error."""
    error = change.std(ddof=1) / len(change)**0.5 if len(change) > 1 else 0.0
    return bool(change.mean() >= max(FLAT, 2 * error))


def _rescaled(values: np.ndarray) -> np.ndarray:
    """Return the means of (biases, P), rescaled to 0 at the lowest and 1 at the highest."""
    means = values.mean(1)
    return (means - means.min()) / np.ptp(means)
