"""What the scripts that draw have in common: a run planned from flags, carried out, and written to an album.

Planning finds the user's mistakes before anything heavy is loaded; what a script does beside drawing, such as reading a
picture to start from, comes between the two.
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm import inference
from ldm import sampling_options as flags
from ldm.album import Album
from ldm.data.images import cut_to, part_in_proportion, read_image, to_tensor
from ldm.data.masks import as_picture, softened, untouched_cells
from ldm.models.diffusion.prompts import check_placeholders
from ldm.models.diffusion.samplers import sampler_class
from ldm.modules.tuned_concept import Learned
from ldm.util import pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run of which everything is known and checked but the weights and what needs them.

    Attributes:
        options: the flags of `add_drawing_options`.
        prompts: one or more.
        negatives: one for each prompt.
    """

    options: argparse.Namespace
    prompts: Sequence[str]
    negatives: Sequence[str]
    config: DictConfig
    concepts: Sequence[Learned]
    sampling: inference.Sampling
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        height, width = inference.picture_size(self.config, self.sampling.latent_size)
        return width, height

    @property
    def jobs(self) -> list[inference.Job]:
        """The pictures, prompt by prompt."""
        seeds = [self.options.seed + i for i in range(self.options.n_iter * self.options.n_samples)]
        return [inference.Job(prompt, seed, negative)
                for prompt, negative in zip(self.prompts, self.negatives, strict=True) for seed in seeds]

    @property
    def note(self) -> dict[str, Any]:
        """What the pictures have in common, to be kept in their files."""
        settings = {name: getattr(self.options, name) for name in
                    ("sampler", "ddim_steps", "scale", "global_locking", "config", "ckpt")}
        kept = ("placeholder", "super_category", "source", "bias", "temperature")
        return {**settings, "ddim_eta": self.sampling.eta, "latent_size": list(self.sampling.latent_size),
                "concepts": [{name: getattr(concept, name) for name in kept if hasattr(concept, name)}
                             for concept in self.concepts]}


@dataclass(frozen=True)
class Start:
    """The picture that those of a run are made from.

    Attributes:
        path: its file.
        file_size: (width, height) of what is in it.
        picture: the part of it that is used, of the size that is drawn.
        strength: above 0 and up to 1, how far from it to go.
        mask: (1, 1, H, W) of zeros and ones, 1 where it is drawn anew; None: everywhere.
        border: pixels around the ones of the mask on which the drawn picture passes into this one.
    """

    path: str
    file_size: tuple[int, int]
    picture: Image.Image
    strength: float
    mask: Tensor | None = None
    border: int = 0

    @cached_property
    def weights(self) -> Tensor:
        """(1, 1, H, W) in [0, 1], how much of a pixel is drawn anew; needs a mask."""
        return softened(self.mask, self.border)

    def encoded(self, model: Any, latent_size: tuple[int, int]) -> inference.Original:
        """What the sampler starts from; it keeps the latents that see nothing of the mask or its border."""
        pixels = to_tensor(self.picture)[None].to(model.betas.device)
        kept = None if self.mask is None else untouched_cells(self.weights, latent_size)
        return inference.Original(model.encode_first_stage(pixels, sample=False), self.strength, kept)

    def completed(self, drawn: Image.Image) -> Image.Image:
        """`drawn`, where nothing is to change with this picture's own pixels in it.

        A first stage does not return what it was given to the last level, so that they have to be put back.
        """
        return drawn if self.mask is None else Image.composite(drawn, self.picture, as_picture(self.weights))


def plan(options: argparse.Namespace, prompts: Sequence[str]) -> Plan:
    """What the flags ask for.

    Raises:
        UserError: they do not fit the model's config, the concepts, this machine or each other.
    """
    config = inference.read_model_config(options.config)
    size = inference.latent_size(config, options.H, options.W)
    inference.check_steps(config, options.ddim_steps)
    eta = sampler_class(options.sampler).checked_eta(options.ddim_eta)
    negatives = flags.negative_for_each(options.negative_prompt, prompts)
    device = pick_device(options.device)
    concepts = inference.ready_concepts(options.concept, options.bias, options.temperature)
    check_placeholders([*prompts, *negatives], [concept.placeholder for concept in concepts])
    sampling = inference.Sampling(
        size, options.ddim_steps, options.scale, eta, options.sampler,
        batch_size=options.batch_size or options.n_samples,
        autocast=inference.wants_sixteen_bits(options.precision, device))
    return Plan(options, prompts, negatives, config, concepts, sampling, device)


def read_start(run: Plan) -> Start:
    """The picture of the flags of `add_original_options`, cut to the size that is drawn; says what was cut.

    Raises:
        UserError: it cannot be read.
    """
    path, (width, height) = run.options.init_img, run.size
    photo = read_image(path)
    if photo.size != run.size:
        part = part_in_proportion(photo.size, width, height)
        used = "all of it" if part == photo.size else f"its middle, {part[0]}x{part[1]},"
        log.info("%s, %dx%d: %s is used, at %dx%d", path, *photo.size, used, width, height)
    return Start(path, photo.size, cut_to(photo, width, height), run.options.strength)


def draw(run: Plan, start: Start | None = None) -> Album:
    """Draws everything, from `start` where there is one; the album says what was written.

    Raises:
        UserError: the weights are missing or do not fit, or memory is short.
    """
    model = inference.load_base(run.config, run.options.ckpt, run.device)
    encoder = inference.prompt_encoder(model, run.concepts)
    texts = [*run.prompts, *run.negatives]
    encoded = inference.encode_once(encoder, texts, global_locking=run.options.global_locking)
    inference.say_what_is_drawn(encoder, texts)
    original = None if start is None else start.encoded(model, run.sampling.latent_size)
    album, jobs = Album(run.options.outdir, columns=run.options.n_samples), run.jobs
    common = {**run.note, **({} if start is None else _note_of_start(start, album))}
    drawn = inference.draw_pictures(model, encoded, jobs, run.sampling, original, verbose=sys.stderr.isatty())
    for job, picture in zip(jobs, drawn, strict=True):
        album.add(picture if start is None else start.completed(picture), job.prompt, {**job._asdict(), **common})
    album.finish_sheet()
    return album


def _note_of_start(start: Start, album: Album) -> dict[str, Any]:
    """How the pictures came from `start`; its mask is written to the album."""
    note: dict[str, Any] = {"init_img": start.path, "strength": start.strength}
    if start.mask is not None:
        mask = album.add_beside("mask", as_picture(start.mask))
        log.info("drawn anew is what is white in %s, over a border of %d pixels", mask, start.border)
        note |= {"mask": str(mask), "border": start.border}
    return note


def summary(album: Album) -> str:
    """What was written, for the end of a run."""
    first, last = album.pictures[0], album.pictures[-1]
    return (f"{len(album.pictures)} pictures: {first}" + (f" to {last.name}" if last != first else "")
            + f"\nwith their prompts: {', '.join(map(str, album.sheets))}")
