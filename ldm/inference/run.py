"""What the scripts that draw have in common: a run planned from flags, carried out, and written to an album.

Planning finds the user's mistakes before anything heavy is loaded; what a script does beside drawing, such as reading a
picture to start from, comes between the two.
"""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm.cli import generation as flags
from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_encoder import check_placeholders, override_settings
from ldm.data.images import cut_to, load_folder, part_in_proportion, read_image, to_tensor
from ldm.data.masks import as_picture, softened, untouched_cells
from ldm.inference import sampling as inference
from ldm.inference.output_folder import Album
from ldm.models.diffusion.samplers import sampler_class
from ldm.util import pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run of which everything is known and checked but the weights and what needs them.

    Attributes:
        options: the flags of `add_drawing_options`.
        prompts: one or more.
        negatives: one for each prompt.
        to_balance: the places among `concepts` of those whose bias is to be found, see `ldm.inference.auto_bias`.
        clip: what measures them; None where there are none.
    """

    options: argparse.Namespace
    prompts: Sequence[str]
    negatives: Sequence[str]
    config: DictConfig
    concepts: Sequence[AnyConcept]
    sampling: inference.Sampling
    device: torch.device
    to_balance: Sequence[int] = ()
    clip: str | None = None

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
        return {**settings, "ddim_eta": self.sampling.eta, "latent_size": list(self.sampling.latent_size),
                "concepts": notes_of(self.concepts)}


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


def notes_of(concepts: Sequence[AnyConcept]) -> list[dict[str, Any]]:
    """What pictures keep of the concepts that they were drawn with."""
    kept = ("placeholder", "super_category", "source", "bias", "temperature", "projection", "used_layers")
    return [{name: getattr(concept, name) for name in kept if hasattr(concept, name)} for concept in concepts]


def plan(options: argparse.Namespace, prompts: Sequence[str]) -> Plan:
    """What the flags ask for.

    Raises:
        UserError: they do not fit the model's config, the concepts, this machine or each other.
    """
    config = inference.read_model_config(options.config)
    size = inference.latent_size(config, options.H, options.W)
    inference.check_steps(config, options.ddim_steps)
    eta = sampler_class(options.sampler).resolve_eta(options.ddim_eta)
    negatives = flags.negative_for_each(options.negative_prompt, prompts)
    device = pick_device(options.device)
    biases = options.bias and [None if bias == flags.AUTO else bias for bias in options.bias]
    concepts = inference.ready_concepts(options.concept, biases, options.temperature, options.all_layers)
    check_placeholders([*prompts, *negatives], [concept.placeholder for concept in concepts])
    sampling = inference.Sampling(
        size, options.ddim_steps, options.scale, eta, options.sampler,
        batch_size=options.batch_size or options.n_samples,
        autocast=inference.wants_sixteen_bits(options.precision, device))
    run = Plan(options, prompts, negatives, config, concepts, sampling, device)
    return _with_open_biases(run, biases) if biases and None in biases else run


def _with_open_biases(run: Plan, biases: Sequence[float | None]) -> Plan:
    """`run` with the concepts of --bias auto marked; `biases` has None for it, once for all or for each."""
    from ldm.inference.auto_bias import (  # here, as the CLIPs' library takes seconds to load, and few runs need it
        STEPS,
        clip_for,
    )

    each = biases if len(biases) > 1 else list(biases) * len(run.concepts)
    places = [place for place, bias in enumerate(each) if bias is None]
    if run.options.photos is not None and len(places) > 1:
        raise UserError(f"--photos {run.options.photos}: can be of one concept only, and --bias auto is for "
                        f"{len(places)}; leave the photos out, or give numbers for the other biases")
    inference.check_steps(run.config, STEPS)
    return replace(run, to_balance=places, clip=clip_for(run.options.clip, run.config, run.options.ckpt))


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
    model = inference.quickened(inference.load_base(run.config, run.options.ckpt, run.device), run.concepts,
                                run.sampling)
    run = balanced(run, model)
    encoder = inference.prompt_encoder(model, run.concepts)
    texts = [*run.prompts, *run.negatives]
    encoded = inference.encode_once(encoder, texts, global_locking=run.options.global_locking)
    inference.say_what_is_drawn(encoder, texts)
    original = None if start is None else start.encoded(model, run.sampling.latent_size)
    album, jobs = Album(run.options.outdir, columns=run.options.n_samples), run.jobs
    common = {**run.note, **({} if start is None else _note_of_start(start, album))}
    drawn = inference.draw_pictures(model, encoded, jobs, run.sampling, original, verbose=sys.stderr.isatty())
    try:
        for job, picture in zip(jobs, drawn, strict=True):
            album.add(picture if start is None else start.completed(picture), job.prompt, {**job._asdict(), **common})
    finally:
        album.finish_sheet()
    return album


def balanced(run: Plan, model: Any) -> Plan:
    """`run` with the biases found that it leaves open, for each concept on its own; says which.

    Raises:
        UserError: the photos or the CLIP cannot be used, or a concept not with this model.
    """
    if not run.to_balance:
        return run
    from ldm.inference.auto_bias import BiasFinder, about  # here, for the reason above
    from ldm.models.clip_encoder import ClipEncoder

    photos = None if run.options.photos is None else [photo for _, photo in load_folder(run.options.photos)]
    finder = BiasFinder(model, run.config, run.sampling, ClipEncoder.from_path(run.clip, run.device), photos,
                        run.options.global_locking)
    biases: list[float | None] = [None] * len(run.concepts)
    for place in run.to_balance:
        concept = run.concepts[place]
        biases[place] = finder.find(concept, about(concept, run.concepts, run.prompts)).bias
    return replace(run, concepts=override_settings(run.concepts, biases))


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
