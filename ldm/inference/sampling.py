"""From a base model's config and concept files to pictures: what every script that draws shares.

The order in which a script calls these is that of their cost: `read_model_config`, `latent_size`, `ready_concepts` and
`check_placeholders` find the user's mistakes before `load_base` loads anything heavy.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor

from ldm.checkpoints.load import load_model
from ldm.common.errors import MemoryShortage, UserError
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.fingerprint import base_fingerprint
from ldm.concepts.merging import merge_concepts
from ldm.concepts.prompt_checks import warn_unknown_words, warn_unused_concepts
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import load_concepts
from ldm.data.images import from_tensor
from ldm.models.diffusion.samplers import sampler_class
from ldm.modules.attention import name_text_layers
from ldm.modules.context import PromptContext
from ldm.modules.covariance import cached_covariance
from ldm.modules.rank_one import invert_covariance

log = logging.getLogger(__name__)

# What these take where a config does not say; see UNetModel, Encoder and DDPM.
USUAL_LEVELS = (1, 2, 4, 8)
USUAL_IMAGE_SIZE = 256
USUAL_TIMESTEPS = 1000
ENCODED_AT_A_TIME = 64  # prompts: files of thousands of them would take gigabytes
USUAL_SEGMENTER = "CIDAS/clipseg-rd64-refined"


class Job(NamedTuple):
    """One picture to draw: it depends on these and the `Sampling`, not on what else is drawn along with it.

    Guidance leads from the negative prompt towards the prompt.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""


@dataclass(frozen=True)
class Sampling:
    """How pictures come from noise.

    Attributes:
        latent_size: (h, w) of the latents, see the function of this name.
        steps: 1 up to the model's timesteps.
        scale: guidance, 1 is none.
        eta: 0..1, share of DDPM's noise in each step; None: the sampler's own.
        sampler: a name that `sampler_class` knows.
        batch_size: pictures drawn at a time.
        autocast: whether the U-Net runs in 16 bits; prompts are encoded and latents decoded in full precision anyway.
    """

    latent_size: tuple[int, int]
    steps: int = 50
    scale: float = 6.0
    eta: float | None = None
    sampler: str = "ddim"
    batch_size: int = 4
    autocast: bool = False


@dataclass(frozen=True)
class Original:
    """A picture that others are made from.

    Attributes:
        latents: (1, C, h, w), scaled as the U-Net has them.
        strength: above 0 and up to 1, how far the others may go from it; 1 does not start from it at all.
        mask: (1, 1, h, w), 1 where they have to stay the same; None: nowhere.
    """

    latents: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts encoded once, for any number of pictures.

    Negative prompts (such as the empty one) go through the same edit as the others. So the rule h = W e_perp + g o*
    acts on both halves of guidance alike, and what guidance enlarges is the difference between the prompts, not that
    between an edited and an unedited layer. Concepts that a picture's prompts do not name leave it alone.

    Attributes:
        context: (P, N, d), each distinct prompt once, under all concepts that some of them name.
        rows: where each stands in it.
        encoder: what encoded them; None where nothing edits them.
    """

    context: PromptContext
    rows: dict[str, int]
    encoder: ConceptPromptEncoder | FinetunedPromptEncoder | None = None

    def of(self, prompts: Sequence[str]) -> PromptContext:
        """(B, N, d): one row for each of `prompts`, which may repeat, under all concepts that some prompt names."""
        return self.context.select([self.rows[prompt] for prompt in prompts])

    def of_jobs(self, jobs: Sequence[Job]) -> tuple[PromptContext, PromptContext]:
        """The prompts of B pictures, and their negative prompts, (B, N, d), under the concepts that either names."""
        both = [f"{job.prompt}\n{job.negative_prompt}" for job in jobs]
        contexts = self.of([job.prompt for job in jobs]), self.of([job.negative_prompt for job in jobs])
        if self.encoder is None:
            return contexts
        positive, negative = (self.encoder.mask_concepts(context, both) for context in contexts)
        return positive, negative


def read_model_config(path: str | Path) -> DictConfig:
    """A config that describes a model.

    Raises:
        UserError: the file is missing, no YAML, or describes no model.
    """
    try:
        config = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a config ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(config, DictConfig) or _setting(config, "target") is None:
        raise UserError(f"{path}: describes no model (it has no model.target); name the base model's config")
    return config


def latent_size(config: DictConfig, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(h, w) of the latents of pictures of this size, or of the model's own.

    Raises:
        UserError: a side is no multiple of what the first stage and the U-Net halve it to.
    """
    usual = _setting(config, "params.image_size", USUAL_IMAGE_SIZE)
    rows, columns = (usual, usual) if isinstance(usual, int) else usual
    factor = _first_stage_factor(config)
    step = factor * 2 ** (len(_setting(config, "params.unet_config.params.channel_mult", USUAL_LEVELS)) - 1)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < step or side % step):
            nearest = max(1, round(side / step)) * step
            raise UserError(f"{name} {side}: this model draws multiples of {step} pixels; the nearest is {nearest}")
    return rows if height is None else height // factor, columns if width is None else width // factor


def picture_size(config: DictConfig, latents: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the pictures that latents of (h, w) become."""
    factor = _first_stage_factor(config)
    return latents[0] * factor, latents[1] * factor


def segmenter_of(config: DictConfig) -> str:
    """The segmenter that a config names for masks, or else the public CLIPSeg: a folder or a hub name."""
    return _setting(config, "params.segmenter") or USUAL_SEGMENTER


def check_steps(config: DictConfig, steps: int) -> None:
    """Raises a UserError where sampling cannot have that many steps."""
    most = _setting(config, "params.timesteps", USUAL_TIMESTEPS)
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps: this model has {most}; give 1 to {most}")


def ready_concepts(paths: Sequence[str | Path], biases: Sequence[float | None] | None = None,
                   temperatures: Sequence[float] | None = None, all_layers: bool = False) -> list[AnyConcept]:
    """The concepts of all files, renamed where placeholders are equal; settings that are given replace their own.

    Raises:
        UserError: a file is no concept file, they are of different methods or base models, there is not one setting,
            or one for each concept, or the method knows no such setting.
    """
    loaded = [concept for path in paths for concept in load_concepts(path)]
    concepts = override_settings(merge_concepts(loaded), biases, temperatures, all_layers)
    for concept, before in zip(concepts, loaded, strict=True):
        if concept.placeholder != before.placeholder:  # prompts need to know
            log.info("%s stands for the %s of %s", concept.placeholder, before.placeholder, concept.source)
    return concepts


def say_what_is_drawn(encoder: ConceptPromptEncoder | FinetunedPromptEncoder, prompts: Sequence[str]) -> None:
    """Logs each concept with its word and settings; warns of those, and of words, that will not be seen."""
    for concept in encoder.concepts:
        log.info("%s: the %s of %s, %s", concept.placeholder, concept.super_category, concept.source, concept.summary)
    warn_unused_concepts(prompts, encoder.placeholders)
    warn_unknown_words(encoder.encoder, prompts, encoder.placeholders)


def load_base(config: DictConfig, checkpoint: str | Path | None, device: torch.device | str) -> Any:
    """The model of `config`, ready to sample from prompts.

    Raises:
        UserError: weights that are missing or do not fit, or a model that reads no prompts.
    """
    model = load_model(config, checkpoint, device)
    if not hasattr(getattr(model, "cond_stage_model", None), "encode_tokens"):
        raise UserError(f"{_setting(config, 'target')} of this config reads no prompts; "
                        "choose the config of a text-to-image model")
    return model


def prompt_encoder(model: Any, concepts: Sequence[AnyConcept]) -> ConceptPromptEncoder | FinetunedPromptEncoder:
    """What encodes prompts for `model` under the edit of `concepts`, or with the words and weights that they bring.

    C^-1 is the model's own where it has one (`Perfusion`), otherwise that of the default captions, which takes time
    when it is computed first.

    Raises:
        UserError: a concept of another base model, or two with the same placeholder.
    """
    encoder = model.cond_stage_model
    inverse = getattr(model, "inverse_covariance", None) or (lambda: invert_covariance(cached_covariance(encoder)))
    unet = model.model.diffusion_model
    layers = name_text_layers(unet)
    if concepts and isinstance(concepts[0], FinetunedConcept):
        base = getattr(model, "base", "") or base_fingerprint(layers)  # in training the U-Net is its own no more
        return FinetunedPromptEncoder(encoder, unet, concepts, base, inverse)
    return ConceptPromptEncoder(encoder, layers, concepts, inverse)


def encode_once(encoder: ConceptPromptEncoder | FinetunedPromptEncoder, prompts: Sequence[str], bias: float | None = None,
                global_locking: bool = False) -> EncodedPrompts:
    """All prompts, negative ones among them, and the empty one, each once, under the concepts that some of them name.

    Args:
        bias: beta of all concepts in place of their own.
        global_locking: see `ConceptPromptEncoder.encode`.

    Raises:
        UserError: as for `ConceptPromptEncoder.encode`, such as for a prompt that is too long.
    """
    distinct = list(dict.fromkeys([*prompts, ""]))
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    encoder = encoder.subset_for(distinct)
    settings = {} if bias is None else {"biases": [bias]}
    parts = [encoder.encode(distinct[first:first + ENCODED_AT_A_TIME], global_locking=global_locking, **settings)
             for first in range(0, len(distinct), ENCODED_AT_A_TIME)]
    return EncodedPrompts(PromptContext.cat(parts) if len(parts) > 1 else parts[0], rows, encoder)


def draw_pictures(model: Any, encoded: EncodedPrompts, jobs: Sequence[Job], sampling: Sampling,
                  original: Original | None = None, verbose: bool = False) -> Iterator[Image.Image]:
    """Yields the picture of each job in turn, as soon as its batch is done; made from `original` where there is one.

    Every picture has a generator of its own, on the CPU: up to rounding, the same job gives the same picture whatever
    the batch size, the other jobs and the device are.
    """
    try:
        for first in range(0, len(jobs), sampling.batch_size):
            batch = jobs[first:first + sampling.batch_size]
            for latent in draw_latents(model, encoded, batch, sampling, original, verbose):
                # one at a time: decoding a picture takes more memory than sampling it
                yield from_tensor(model.decode_first_stage(latent[None])[0])
    except torch.OutOfMemoryError:
        remedy = "lower --batch_size, or draw smaller ones" if sampling.batch_size > 1 else "draw smaller ones"
        raise MemoryShortage(f"{model.betas.device} has no memory for {sampling.batch_size} such pictures at a time; "
                             f"{remedy}") from None


def draw_latents(model: Any, encoded: EncodedPrompts, jobs: Sequence[Job], sampling: Sampling,
                 original: Original | None = None, verbose: bool = False) -> Tensor:
    """The scaled latents (B, C, h, w), float32, of B jobs as one batch."""
    sampler = sampler_class(sampling.sampler)(model)
    conditional, negative = encoded.of_jobs(jobs)
    unconditional = None if sampling.scale == 1 else negative
    start = {} if original is None else {"x0": original.latents.expand(len(jobs), -1, -1, -1), "mask": original.mask,
                                         "strength": original.strength}
    device = model.betas.device
    with torch.autocast(device.type, _sixteen_bit_type(device), enabled=sampling.autocast):
        latents, _ = sampler.sample(
            sampling.steps, len(jobs), (model.channels, *sampling.latent_size), conditional, eta=sampling.eta,
            verbose=verbose, generators=[torch.Generator().manual_seed(job.seed) for job in jobs],
            unconditional_guidance_scale=sampling.scale, unconditional_conditioning=unconditional, **start)
    return latents.float()


def wants_sixteen_bits(precision: str | None, device: torch.device) -> bool:
    """Whether to sample in 16 bits, by the flag --precision: unless it says, where that is fast."""
    return precision == "autocast" or (precision is None and device.type == "cuda")


def quickened(model: Any, concepts: Sequence[AnyConcept], sampling: Sampling) -> Any:
    """`model`, its U-Net on a CUDA device as fast as sampling in 16 bits allows; for good, so that all it draws is so.

    Where concepts bring weights of their own, nothing is changed: those are in 32 bits.
    """
    device, tuned = model.betas.device, any(getattr(concept, "weights", None) for concept in concepts)
    if sampling.autocast and device.type == "cuda" and not tuned:
        model.model.enable_fast_inference(_sixteen_bit_type(device))
    return model


def _sixteen_bit_type(device: torch.device) -> torch.dtype:
    """bfloat16, whose range no activation leaves, or float16 on GPUs that have only that."""
    modern = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.bfloat16 if modern else torch.float16


def _first_stage_factor(config: DictConfig) -> int:
    """Pixels on a side for which one position of the latents stands."""
    settings = _setting(config, "params.first_stage_config.params.ddconfig")
    if settings is None:
        return 1
    return settings.get("patch_size", 1) * 2 ** (len(settings.get("ch_mult", USUAL_LEVELS)) - 1)


def _setting(config: DictConfig, path: str, usual: Any = None) -> Any:
    """The value at `path` in the model's section."""
    try:
        return OmegaConf.select(config, f"model.{path}", default=usual)
    except OmegaConfBaseException as error:
        raise UserError(f"config: model.{path} cannot be read ({str(error).splitlines()[0]})") from None
