"""Which noise levels sampling visits: three ways of spacing S of them on a model's schedule.

Legend, as in `ldm.models.diffusion.schedule`:
    kept        a(t), the share of the image's variance that is left after t steps of noise; 1 is a clean image
    sigma       sqrt((1 - a) / a), the noise beside an image of full size; x / sqrt(a) = x_0 + sigma eps
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.util import make_ddim_timesteps

KARRAS_RHO = 7.0
NOISIEST = 80.0  # sigma, as Karras et al. 2022 have it (table 1)


@dataclass(frozen=True)
class TimeGrid:
    """The times that sampling visits, noisiest first; `alpha_bar` is a(t) there, `alpha_bar_next` a(t) where the step leads.

    Times are whole numbers where the schedule has them, otherwise fractions: networks take both.
    """

    times: tuple[float, ...]
    alpha_bar: tuple[float, ...]
    alpha_bar_next: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.times)

    def end(self, steps: int) -> TimeGrid:
        """The last `steps` of them, 1..len."""
        return TimeGrid(self.times[-steps:], self.alpha_bar[-steps:], self.alpha_bar_next[-steps:])

    def half_log_snr(self, place: int) -> float:
        """lambda = -log sigma, on which exponential integrators count their steps (Lu et al. 2022, section 2)."""
        return math.log(self.alpha_bar[place] / (1 - self.alpha_bar[place])) / 2


def leading_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Evenly spaced times, the least noisy one at the schedule's clean end, as for DDIM in latent diffusion.

    The last step leads to the time just before the last one.

    Args:
        schedule: a(t) of all T training steps, (T,).
        steps: 1..T.

    Raises:
        UserError: `steps` is out of range.
    """
    times = make_ddim_timesteps("uniform", steps, len(schedule))[::-1].tolist()
    levels = _levels(schedule)
    last = levels[times[-1] - 1] if times[-1] else 1.0
    return _grid(times, levels[times], float(last))


def trailing_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Evenly spaced times, the first one at the schedule's noisy end; the last step leads to a clean image.

    Lin, Liu, Li & Yang 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2, "trailing".
    Arguments and errors as for `leading_grid`.
    """
    _check_steps(steps, len(schedule))
    times = [round(len(schedule) * left / steps) - 1 for left in range(steps, 0, -1)]
    return _grid(times, _levels(schedule)[times], 1.0)


def karras_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Sigmas that lie the denser, the smaller they are, from no more than 80 on; the last step leads to a clean image.

    Karras, Aittala, Aila & Laine 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 5. The
    time of a sigma between two of the schedule's own is interpolated in log sigma. Schedules that end in nothing but
    noise, as the cosine one, have sigmas of ten thousands there: nothing of an image is decided at those, and of few
    steps most would go to them. Arguments and errors as for `leading_grid`.
    """
    _check_steps(steps, len(schedule))
    levels = _levels(schedule)
    known = np.sqrt((1 - levels) / levels)
    noisiest = min(known[-1], NOISIEST)
    roots = np.linspace(noisiest ** (1 / KARRAS_RHO), known[0] ** (1 / KARRAS_RHO), steps)
    sigmas = roots**KARRAS_RHO
    times = np.interp(np.log(sigmas), np.log(known), np.arange(len(known)))
    return _grid(times.tolist(), 1 / (1 + sigmas**2), 1.0)


def _levels(schedule: Tensor) -> np.ndarray:
    return schedule.cpu().double().numpy()


def _grid(times: list[float], alpha_bar: np.ndarray, last: float) -> TimeGrid:
    levels = alpha_bar.tolist()
    return TimeGrid(tuple(times), tuple(levels), (*levels[1:], last))


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps: give a number from 1 to {most}")
