"""Which known look makes a base model expect photos best: where the learning of a concept can start.

An adjective says in one step what hundreds of small ones would have to find, and what it says is surely something that
the U-Net has read. So the super-category is tried in every look that the text encoder has words for, and the model's
own loss on the photos, the same noise for all, tells which of them fits: first by a few samples, then those that are
left by more (Karnin, Koren, Somekh 2013, "Almost Optimal Exploration in Multi-Armed Bandits").
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ldm.modules.context import PromptContext
from ldm.util import onto

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import LatentDiffusion

ROUNDS = (8, 16), (32, 1)  # so many samples in all, and so many of the best go on
AT_A_TIME = 8  # samples
NOISY = 0.6, 0.95  # shares of all steps: earlier the latents tell of looks themselves, later nothing tells of anything
TURN = 0.618034  # golden section: however many samples there are, their steps are spread evenly


@torch.no_grad()
def most_expected(model: LatentDiffusion, z: Tensor, weight: Tensor, contexts: Sequence[PromptContext],
                  generator: Generator, name: str = "photos") -> int:
    """The place of that prompt under which the model's own loss on photos is least.

    Args:
        z: (M, C, h, w) latents of M photos.
        weight: (M, 1, h, w), by which errors are weighed.
        contexts: each a single prompt, (1, N, d).
        name: of the photos, for the progress bar.
    """
    photos, t, noise = _samples(model, z, generator)
    left, losses, begun = list(range(len(contexts))), [0.0] * len(contexts), 0
    for samples, stay in ROUNDS:
        for place in tqdm(left, desc=f"looks of {name}", leave=False, disable=None):
            for first in range(begun, samples, AT_A_TIME):
                some = slice(first, first + AT_A_TIME)
                context = contexts[place].select(torch.zeros_like(photos[some]))
                found, _ = model.sample_losses(z[photos[some]], context, t[some], noise[some], weight[photos[some]])
                losses[place] += float(found.sum())
        left, begun = sorted(left, key=losses.__getitem__)[:stay], samples
    return left[0]


def _samples(model: LatentDiffusion, z: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which photo each sample is of, its step, and its noise."""
    count, (first, last) = ROUNDS[-1][0], NOISY
    number = torch.arange(count)
    t = ((first + (last - first) * (TURN * number).frac()) * model.num_timesteps).long()
    noise = torch.randn(count, *z.shape[1:], generator=generator)
    return onto(number % len(z), z.device), onto(t, z.device), onto(noise, z.device).to(z.dtype)
