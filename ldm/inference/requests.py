"""One request for each image: its prompt, its negative prompt and its seed. Imports no torch at start-up."""
from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ldm.common.errors import UserError

if TYPE_CHECKING:
    from torch import Generator

SEED_LIMIT = 2**63  # what torch's generators take
RANDOM_SEED_LIMIT = 2**32  # of seeds that are chosen at random, short enough to be typed


class GenerationRequest(NamedTuple):
    """One image to generate.

    The image depends only on the request and the `GenerationSettings`, not on the rest of its batch.

    Attributes:
        prompt: names concepts by their placeholders.
        seed: seed of the image's own noise.
        negative_prompt: what guidance leads away from.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""


def requests_for(prompts: Sequence[str], seeds: Sequence[Sequence[int]] | Sequence[int],
                 negative_prompts: str | Sequence[str] = "") -> list[GenerationRequest]:
    """Return one request for each prompt and each of its seeds, prompt by prompt.

    Args:
        seeds: one sequence of seeds for all prompts, or one for each prompt.
        negative_prompts: none, one for all prompts, or one for each prompt.

    Raises:
        UserError: there are several negative prompts, but not one for each prompt.
    """
    requests = []
    for number, (prompt, negative) in enumerate(zip(prompts, _negatives(prompts, negative_prompts), strict=True)):
        own = seeds if not seeds or isinstance(seeds[0], int) else seeds[number]
        requests += [GenerationRequest(prompt, seed, negative) for seed in own]
    return requests


def _negatives(prompts: Sequence[str], negative_prompts: str | Sequence[str]) -> list[str]:
    """Return the negative prompt of each prompt."""
    given = [negative_prompts] if isinstance(negative_prompts, str) else list(negative_prompts) or [""]
    if len(given) not in (1, len(prompts)):
        raise UserError(f"{len(given)} negative prompts for {len(prompts)} prompts; give one for all or one for each")
    return given * len(prompts) if len(given) == 1 else given


def seeds_for(prompts: int, num_images: int, seed: int | None = None,
              generator: Generator | Sequence[Generator] | None = None) -> list[list[int]]:
    """Return the seeds of the images of each prompt.

    Args:
        prompts: number of prompts.
        num_images: number of images per prompt.
        seed: seed of the first image of each prompt; each further image adds 1. None: random, or from `generator`.
        generator: a generator, or one for each image, that seeds are drawn from.

    Raises:
        UserError: `num_images` or the seed is out of range, both sources are given, or the number of generators is
            wrong.
    """
    if num_images < 1:
        raise UserError(f"num_images {num_images} must be 1 or more")
    if seed is not None and generator is not None:
        raise UserError("seed and generator both say where noise comes from; give one of them")
    if generator is None:
        first = secrets.randbelow(RANDOM_SEED_LIMIT) if seed is None else seed
        if not 0 <= first < SEED_LIMIT:
            raise UserError(f"seed {seed} must be 0 or more and less than {SEED_LIMIT}")
        return [[first + number for number in range(num_images)]] * prompts
    return _seeds_from(generator, prompts, num_images)


def _seeds_from(generator: Generator | Sequence[Generator], prompts: int, num_images: int) -> list[list[int]]:
    import torch

    total = prompts * num_images
    sources = [generator] * total if isinstance(generator, torch.Generator) else list(generator)
    if len(sources) != total:
        raise UserError(f"{len(sources)} generators for {total} images; give one, or one for each image")
    numbers = [int(torch.randint(RANDOM_SEED_LIMIT, (), generator=source, device=source.device)) for source in sources]
    return [numbers[first:first + num_images] for first in range(0, total, num_images)]
