"""Pictures of concepts for many prompts and seeds: one base model, loaded once, on which concepts and settings change.

    painter = Painter.load("configs/perfusion.yaml")
    jobs = jobs_of([prompt.about("<my-teddy>") for prompt in read_prompts(MINI)], seeds=range(8))
    concepts = ready_concepts(["teddy.safetensors"])
    for bias in (0.5, 0.6, 0.7):
        pictures = painter.draw(jobs, concepts, Manner(bias=bias, scale=4.0))

A picture comes from its own prompt and seed, and is the same up to rounding whatever is drawn along with it.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_encoder import check_placeholders, override_settings
from ldm.data.images import to_tensor
from ldm.inference import sampling as inference
from ldm.inference.output_folder import Album
from ldm.inference.run import notes_of
from ldm.inference.sampling import Job
from ldm.models.diffusion.samplers import sampler_class
from ldm.util import pick_device


@dataclass(frozen=True)
class Manner:
    """How concepts and pictures are drawn; `dataclasses.replace` gives the next point of a sweep.

    Attributes:
        bias, temperature: of all concepts, or one for each; None: those of training.
        global_locking: lock the keys of the whole prompt.
        all_layers: draw with what all layers have learned.
        scale: guidance, 1 is none.
        steps: 1 up to the model's timesteps.
        sampler: a name that `sampler_class` knows.
        eta: 0..1, share of noise in each step; None: the sampler's own.
    """

    bias: float | tuple[float, ...] | None = None
    temperature: float | tuple[float, ...] | None = None
    global_locking: bool = False
    all_layers: bool = False
    scale: float = 6.0
    steps: int = 50
    sampler: str = "ddim"
    eta: float | None = None


USUAL = Manner()


class Painter:
    """Draws pictures with one loaded base model; concepts only pass through it and leave it as it is.

    Args:
        config: the base model's.
        model: as `inference.load_base` gives it.
        batch_size: pictures drawn at a time.
        autocast: whether to sample in 16 bits.
    """

    def __init__(self, config: DictConfig, model: Any, batch_size: int = 32, autocast: bool = False) -> None:
        self.config, self.model = config, model
        self.batch_size, self.autocast = batch_size, autocast

    @classmethod
    def load(cls, config: str | Path, checkpoint: str | Path | None = None, device: str | None = None,
             batch_size: int = 32, precision: str | None = None) -> Painter:
        """Loads a base model; arguments as the flags --config, --ckpt, --device, --batch_size and --precision.

        Raises:
            UserError: the config, the weights or the device cannot be used.
        """
        settings, where = inference.read_model_config(config), pick_device(device)
        model = inference.load_base(settings, checkpoint, where)
        return cls(settings, model, batch_size, inference.wants_sixteen_bits(precision, where))

    @property
    def device(self) -> torch.device:
        return self.model.betas.device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return inference.picture_size(self.config, inference.latent_size(self.config))

    def draw(self, jobs: Sequence[Job], concepts: Sequence[AnyConcept] = (), manner: Manner = USUAL,
             description: str = "drawing") -> list[Image.Image]:
        """The picture of each job, in their order; a progress bar with this description shows how far it is.

        Args:
            jobs: their prompts name concepts by their placeholders.
            concepts: as `inference.ready_concepts` gives those of files.
            manner: its bias, temperature and layers are for concepts of Perfusion.

        Raises:
            UserError: the concepts do not fit the model or each other, a prompt names an unknown one or is too long,
                or the settings cannot be had.
        """
        ready = _as_drawn(concepts, manner)
        prompts = [text for job in jobs for text in (job.prompt, job.negative_prompt)]
        check_placeholders(prompts, [concept.placeholder for concept in ready])
        sampling = sampling_of(self.config, manner, self.batch_size, self.autocast)
        encoder = inference.prompt_encoder(self.model, ready)
        encoded = inference.encode_once(encoder, prompts, global_locking=manner.global_locking)
        drawn = inference.draw_pictures(self.model, encoded, jobs, sampling)
        return list(tqdm(drawn, desc=description, total=len(jobs), leave=False, disable=None))


def sampling_of(config: DictConfig, manner: Manner, batch_size: int = 32, autocast: bool = False) -> inference.Sampling:
    """What `inference.draw_pictures` needs to draw in this manner; asking for it is a check before weights are loaded.

    Raises:
        UserError: the model or the sampler cannot draw so.
    """
    inference.check_steps(config, manner.steps)
    eta = sampler_class(manner.sampler).resolve_eta(manner.eta)
    size = inference.latent_size(config)
    return inference.Sampling(size, manner.steps, manner.scale, eta, manner.sampler, batch_size, autocast)


def jobs_of(prompts: Iterable[str], seeds: Iterable[int], negative_prompt: str = "") -> list[Job]:
    """A picture for each prompt and seed, prompt by prompt; every prompt has the same seeds."""
    numbers = list(seeds)
    return [Job(prompt, seed, negative_prompt) for prompt in prompts for seed in numbers]


def as_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """(M, 3, H, W) in [-1, 1] from pictures of one size."""
    return torch.stack([to_tensor(picture) for picture in pictures])


def keep(pictures: Sequence[Image.Image], jobs: Sequence[Job], folder: str | Path, columns: int,
         concepts: Sequence[AnyConcept] = (), manner: Manner = USUAL, categories: Sequence[str] | None = None) -> Album:
    """Writes pictures of `Painter.draw` as the scripts that draw do, each with a note of how it was made, and sheets.

    Args:
        folder: gets `samples/00000.png`, ... and `grid-0000.png`, ...; earlier ones stay.
        columns: pictures in a row of a sheet, such as the number of seeds.
        categories: what each picture's prompt asks for.
    """
    album = Album(folder, columns)
    drawn = _as_drawn(concepts, manner)
    note = {**asdict(manner), "concepts": notes_of(drawn)}
    kinds = [{}] * len(jobs) if categories is None else [{"category": category} for category in categories]
    for picture, job, kind in zip(pictures, jobs, kinds, strict=True):
        album.add(picture, job.prompt, {**job._asdict(), **kind, **note})
    album.finish_sheet()
    return album


def _as_drawn(concepts: Sequence[AnyConcept], manner: Manner) -> list[AnyConcept]:
    return override_settings(concepts, _each(manner.bias), _each(manner.temperature), manner.all_layers)


def _each(setting: float | tuple[float, ...] | None) -> tuple[float, ...] | None:
    return setting if setting is None or isinstance(setting, tuple) else (setting,)
