"""A balanced bias for a concept, found by a small sweep: what `--bias auto` does.

The bias beta trades the prompt against the concept: the higher it is, the more of the prompt and the less of the
concept there is in a picture, and every value is a point on a curve of text- against image-similarity (Tewel et al.,
"Key-Locked Rank One Editing for Text-to-Image Personalization", 2023). Where its middle lies differs from concept to
concept, so a few pictures are drawn at each of some biases and measured by a CLIP.

The rule of `balanced`: text similarity and likeness are each rescaled to 0 at their lowest and 1 at their highest in
the sweep, as their cosines are of different size and spread; the bias of the highest harmonic mean of the two is taken.
That mean is close to the smaller of both, so that neither is bought by giving up the other, and it is 0 where one of
them is lowest, as they are at the two ends of the sweep.

A measure is flat where it does not change as it should from the lowest bias to the highest, text similarity upwards and
likeness downwards, by `FLAT` and by twice the standard error of that change over prompts: rescaled, it would be chance
made large. These two biases are compared as they are known beforehand: between the best and the worst of several, noise
alone makes a difference. Pictures of one prompt, from the same noise at every bias, count as one. Where text similarity
is flat, no bias loses anything of the prompt, and of those with the most likeness, to within `FLAT`, the one closest to
the concept's own is taken. Where likeness is flat, the CLIP does not see how much of the concept there is; what a bias
would cost is unknown then, and the concept keeps its own.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.common.errors import UserError
from ldm.common.words import replace_word, replace_words, split_at_placeholders
from ldm.concepts.concept import Concept
from ldm.data.images import square, to_tensor
from ldm.data.templates import SLOT
from ldm.inference import sampling as inference
from ldm.inference.sampling import Job, Sampling
from ldm.models.clip_encoder import ClipEncoder, check_clip_name
from ldm.models.diffusion.samplers import sampler_class

log = logging.getLogger(__name__)

BIASES = (0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.05)
GLOBAL_BIASES = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # with global locking the paper's usual range is 0.2 lower
SAMPLER, STEPS = "dpm", 10  # enough to see what is in a picture, and nearer to the limit of many steps than DDIM's 15
PROMPTS = 4  # of two, the standard error of a change over prompts would say little
NEUTRAL = tuple(f"a photo of a {SLOT}{where}" for where in ("", " on the beach", " in the snow", " in a garden"))
SEEDS = range(2)  # the same in every run, so that the bias does not hang on the pictures' own seeds
REFERENCE_SEEDS = range(4, 8)  # others: pictures from the same noise are alike by that alone
FLAT = 1.0  # cosines x 100: nobody sees a smaller difference
TINY = 1e-12  # for the harmonic mean of two zeros
TEXT, LIKENESS = "text", "likeness"


@dataclass(frozen=True, eq=False)
class Tried:
    """What pictures at one bias reach: cosines x 100, (P,) each, means of the prompts, which are the same at all."""

    bias: float
    texts: np.ndarray
    likenesses: np.ndarray

    @classmethod
    def of_pictures(cls, bias: float, texts: np.ndarray, likenesses: np.ndarray, prompts: int) -> Tried:
        """From the cosines of pictures (n,), as many of each prompt, prompt by prompt."""
        return cls(bias, *(values.reshape(prompts, -1).mean(1) for values in (texts, likenesses)))

    @property
    def text(self) -> float:
        return float(self.texts.mean())

    @property
    def likeness(self) -> float:
        return float(self.likenesses.mean())


def balanced(tried: Sequence[Tried], usual: float) -> Tried:
    """The bias of the best balance, as the module says; of equally good ones that closest to `usual`."""
    texts, likenesses = _measures(tried)
    flat = flat_measures(tried)
    if LIKENESS in flat:
        good = np.ones(len(tried), dtype=bool)
    elif TEXT in flat:
        means = likenesses.mean(1)
        good = means > means.max() - FLAT
    else:
        text, likeness = _rescaled(texts), _rescaled(likenesses)
        scores = 2 * text * likeness / np.maximum(text + likeness, TINY)
        good = scores == scores.max()
    return min((one for one, chosen in zip(tried, good, strict=True) if chosen), key=lambda one: abs(one.bias - usual))


def said(concept: Concept, chosen: Tried, tried: Sequence[Tried]) -> str:
    """The choice in one line, with what makes it doubtful."""
    flat = flat_measures(tried)
    doubt = f"; {' and '.join(flat)} hardly change{'' if len(flat) > 1 else 's'}" if flat else ""
    kept = ", so it keeps its own" if LIKENESS in flat else ""
    biases = [one.bias for one in tried]
    return (f"bias of {concept.placeholder}: {chosen.bias:g} (text {chosen.text:.1f}, likeness {chosen.likeness:.1f}; "
            f"tried {min(biases):g} to {max(biases):g}{doubt}{kept})")


def about(concept: Concept, others: Iterable[Concept], prompts: Iterable[str]) -> list[str]:
    """What to draw of a concept alone: the first prompts that name it, with plain words for other concepts, and neutral
    ones where those are too few."""
    words = {concept.placeholder: None, **{other.placeholder: other.super_category for other in others
                                           if other is not concept}}
    own = [prompt for prompt in prompts if 0 in split_at_placeholders(prompt, list(words))]
    neutral = [replace_word(concept.placeholder, SLOT, prompt) for prompt in NEUTRAL]
    return [replace_words(words, prompt) for prompt in list(dict.fromkeys([*own, *neutral]))[:PROMPTS]]


def clip_for(name: str | None, config: DictConfig, checkpoint: str | Path | None) -> str:
    """The CLIP of --clip, or else the folder evaluation_clip beside the base model; nothing is loaded.

    Raises:
        UserError: there is neither.
    """
    if name is not None:
        if not Path(name).is_dir():
            check_clip_name(name)
        return name
    weights = checkpoint or OmegaConf.select(config, "model.params.ckpt_path")
    beside = Path(weights).parent / "evaluation_clip" if weights else None
    if beside is None or not beside.is_dir():
        where = f" at {beside}" if beside else ""
        raise UserError(f"--bias auto measures pictures by a CLIP, and there is none{where}; name a folder of one with "
                        "--clip, or one to download such as ViT-B-32/openai")
    return str(beside)


class BiasFinder:
    """Finds balanced biases with one base model and one CLIP.

    Args:
        model: as `inference.load_base` gives it.
        config: the model's.
        sampling: how pictures are going to be drawn; sampler, steps and size are replaced by quick ones.
        recogniser: the CLIP.
        photos: pictures of the concept; None: likeness is that to pictures drawn with the lowest bias, of "a photo of"
            the concept.
        global_locking: as for `ConceptPromptEncoder.encode`.
    """

    def __init__(self, model: Any, config: DictConfig, sampling: Sampling, recogniser: ClipEncoder,
                 photos: Sequence[Image.Image] | None = None, global_locking: bool = False) -> None:
        size = inference.latent_size(config)
        self.model, self.recogniser, self.photos, self.global_locking = model, recogniser, photos, global_locking
        self.side = min(inference.picture_size(config, size))
        self.sampling = replace(sampling, latent_size=size, sampler=SAMPLER, steps=STEPS,
                                eta=sampler_class(SAMPLER).resolve_eta(None))
        self.biases = GLOBAL_BIASES if global_locking else BIASES

    def find(self, concept: Concept, prompts: Sequence[str]) -> Tried:
        """The balanced bias of a concept for prompts that name no other; logs it.

        Raises:
            UserError: the concept is of another base model, or a prompt is too long.
        """
        tried = self.sweep(concept, prompts)
        chosen = balanced(tried, concept.bias)
        log.info("%s", said(concept, chosen, tried))
        return chosen

    def sweep(self, concept: Concept, prompts: Sequence[str]) -> list[Tried]:
        """What pictures of the prompts reach at each bias, from the lowest up, the concept's own among them."""
        jobs = [Job(prompt, seed) for prompt in prompts for seed in SEEDS]
        texts = self.recogniser.embed_texts([replace_word(concept.super_category, concept.placeholder, job.prompt)
                                             for job in jobs])
        encoder = inference.prompt_encoder(self.model, [concept])
        alike = self._shown(self.photos or self._drawn(encoder, _reference_jobs(concept), self.biases[0]))
        tried = []
        biases = sorted({*self.biases, concept.bias})
        for bias in tqdm(biases, desc=f"bias of {concept.placeholder}", leave=False, disable=None):
            seen = self._shown(self._drawn(encoder, jobs, bias))
            cosines = (seen * texts).sum(1), (seen @ alike.T).mean(1)
            tried.append(Tried.of_pictures(bias, *(100 * each.double().numpy() for each in cosines), len(prompts)))
        return tried

    def _drawn(self, encoder: Any, jobs: Sequence[Job], bias: float) -> list[Image.Image]:
        encoded = inference.encode_once(encoder, [job.prompt for job in jobs], bias, self.global_locking)
        return list(inference.draw_pictures(self.model, encoded, jobs, self.sampling))

    def _shown(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(n, d): what the CLIP sees in the middle square of each."""
        return self.recogniser.embed_images(torch.stack([to_tensor(square(one, self.side)) for one in pictures]))


def _reference_jobs(concept: Concept) -> list[Job]:
    return [Job(replace_word(concept.placeholder, SLOT, NEUTRAL[0]), seed) for seed in REFERENCE_SEEDS]


def _measures(tried: Sequence[Tried]) -> tuple[np.ndarray, np.ndarray]:
    """Text similarity and likeness, (biases, P) each."""
    return np.stack([one.texts for one in tried]), np.stack([one.likenesses for one in tried])


def flat_measures(tried: Sequence[Tried]) -> list[str]:
    """Which of `TEXT` and `LIKENESS` are flat, as the module says."""
    lowest, highest = (end(tried, key=lambda one: one.bias) for end in (min, max))
    changes = {TEXT: highest.texts - lowest.texts, LIKENESS: lowest.likenesses - highest.likenesses}
    return [name for name, change in changes.items() if not _is_sure(change)]


def _is_sure(change: np.ndarray) -> bool:
    """Whether changes (P,) of prompts are more in the mean than nobody would see, and than chance makes of nothing."""
    error = change.std(ddof=1) / len(change)**0.5 if len(change) > 1 else 0.0
    return bool(change.mean() >= max(FLAT, 2 * error))


def _rescaled(values: np.ndarray) -> np.ndarray:
    """The means of (biases, P), 0 at the lowest and 1 at the highest."""
    means = values.mean(1)
    return (means - means.min()) / np.ptp(means)
