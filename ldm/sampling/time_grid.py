"""The noise levels that sampling visits: ways to space S of them on a model's schedule.

Legend, as in `ldm.sampling.schedule`:
    alpha_bar   the share of the image's variance that is left at a timestep; 1 is a clean image
    sigma       sqrt((1 - alpha_bar) / alpha_bar), the noise of an image at full scale: x / sqrt(alpha_bar) =
                x_0 + sigma eps
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm.common.errors import UserError

KARRAS_RHO = 7.0
SIGMA_MAX = 80.0  # Karras et al. 2022, Table 1
TINY = 1e-300  # keeps the logarithm of an alpha_bar of 0 finite


@dataclass(frozen=True)
class SpacingRule:
    """What samplers make of evenly spaced timesteps; diffusers' schedulers differ in these.

    Attributes:
        intervals: space the ends of S intervals, the clean end included, in place of S timesteps.
        fractional: take fractions for timesteps that `linspace` puts between two of the schedule's.
        ends_clean: the last step leads to a clean image; False: to the schedule's first timestep.
    """

    intervals: bool = False
    fractional: bool = False
    ends_clean: bool = True


@dataclass(frozen=True)
class TimeGrid:
    """The timesteps of a sampling run, noisiest first.

    Attributes:
        times: integers if the schedule has these timesteps, otherwise fractions; networks accept both.
        alpha_bar: at the start of each step.
        alpha_bar_next: at the end of each step.
    """

    times: tuple[float, ...]
    alpha_bar: tuple[float, ...]
    alpha_bar_next: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.times)

    def end(self, steps: int) -> TimeGrid:
        """Return the last `steps` steps, 1..len."""
        return TimeGrid(self.times[-steps:], self.alpha_bar[-steps:], self.alpha_bar_next[-steps:])


def half_log_snr(alpha_bar: float) -> float:
    """Return lambda = -log sigma, the time variable of exponential integrators (Lu et al. 2022, Section 2)."""
    if alpha_bar in (0, 1):
        return math.inf if alpha_bar else -math.inf
    return math.log(alpha_bar / (1 - alpha_bar)) / 2


def leading_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Return evenly spaced timesteps that include the schedule's clean end, as latent diffusion's DDIM has them.

    The last step leads to the timestep just before the last one of the grid.

    Args:
        schedule: alpha_bar of all T training timesteps, (T,).
        steps: 1..T.

    Raises:
        UserError: if `steps` is out of range.
    """
    _check_steps(steps, len(schedule))
    evenly = np.arange(steps) * len(schedule) // steps
    # Moved up by one, as in latent diffusion, unless that would leave the schedule.
    shift = int(evenly[-1] + 1 < len(schedule))
    times = (evenly + shift)[::-1].tolist()
    levels = _to_numpy(schedule)
    last = levels[times[-1] - 1] if times[-1] else 1.0
    return _make_grid(times, levels[times], float(last))


def trailing_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Return evenly spaced timesteps that start at the schedule's noisy end. The last step leads to a clean image.

    Source: Lin, Liu, Li & Yang 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table 2,
    "trailing". Arguments and errors as for `leading_grid`.
    """
    _check_steps(steps, len(schedule))
    times = [round(len(schedule) * left / steps) - 1 for left in range(steps, 0, -1)]
    return _make_grid(times, _to_numpy(schedule)[times], 1.0)


def karras_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Return noise levels that get denser as sigma shrinks, from at most 80. The last step leads to a clean image.

    The timestep of a sigma between two of the schedule's is interpolated in log sigma. Schedules that end in pure
    noise, such as the cosine one, have sigmas above 10,000 there. Those decide nothing about the image, but would take
    most of a few steps; so sigma is limited. If the last sigma is infinite (zero terminal SNR), the first step starts
    there, and the others are spaced as if it were 80. Arguments and errors as for `leading_grid`.

    Source: Karras, Aittala, Aila & Laine 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
    Eq. 5.
    """
    _check_steps(steps, len(schedule))
    levels = _to_numpy(schedule)
    known_sigmas = sigmas_of(levels)
    # Eq. 5: evenly spaced in sigma^(1 / rho)
    sigma_max, sigma_min = min(known_sigmas[-1], SIGMA_MAX), known_sigmas[0]
    roots = np.linspace(sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO), steps)
    sigmas = roots**KARRAS_RHO
    if np.isinf(known_sigmas[-1]):
        sigmas[0] = np.inf
    return _make_grid(times_of(sigmas, schedule), 1 / (1 + sigmas**2), 1.0)


def evenly_spaced_grid(schedule: Tensor, steps: int, spacing: str, rule: SpacingRule) -> TimeGrid:
    """Return evenly spaced timesteps as diffusers' schedulers have them.

    There, ties and sums of rounding errors make a few other timesteps by one for 48 and more steps, and one timestep
    too many for 61 and others. A single step starts at the noisy end, except for "leading".

    Args:
        schedule: alpha_bar of all T training timesteps, (T,).
        steps: 1..T.
        spacing: "leading" (multiples of T // S, plus 1 as for Stable Diffusion), "trailing" or "linspace".
        rule: what the sampler makes of them.

    Raises:
        UserError: if `steps` is out of range.

    Source: Lin, Liu, Li & Yang 2023, Table 2.
    """
    if spacing == "trailing":
        grid = trailing_grid(schedule, steps)
        times, levels = grid.times, np.array(grid.alpha_bar)
    else:
        _check_steps(steps, len(schedule))
        times = _leading_times(len(schedule), steps, rule) if spacing == "leading" else _linspace_times(
            len(schedule), steps, rule)
        levels = _levels_at(times, _to_numpy(schedule))
    last = 1.0 if rule.ends_clean or times[-1] == 0 else float(schedule[0].double())
    return _make_grid(list(times), levels, last)


def _leading_times(total: int, steps: int, rule: SpacingRule) -> list[int]:
    points = steps + rule.intervals
    if points > total:
        return list(range(total - 1, -1, -1))
    interval = total // points
    shift = int((points - 1) * interval + 1 < total)
    return [interval * i + shift for i in range(points - 1, points - 1 - steps, -1)]


def _linspace_times(total: int, steps: int, rule: SpacingRule) -> list[float]:
    points = min(steps + rule.intervals, total)
    if points == 1:
        return [total - 1]
    times = np.linspace(0, total - 1, points)[::-1][:steps]
    return times.tolist() if rule.fractional else times.round().astype(int).tolist()


def _levels_at(times: list[float], levels: np.ndarray) -> np.ndarray:
    """Return alpha_bar at timesteps; between two of the schedule's, sigma is linear, as in diffusers."""
    if all(isinstance(time, int) for time in times):
        return levels[times]
    return 1 / (1 + np.interp(times, np.arange(len(levels)), sigmas_of(levels)) ** 2)


def sigmas_of(alpha_bar: np.ndarray) -> np.ndarray:
    """Return sigma, which is infinite if no image is left."""
    with np.errstate(divide="ignore"):
        return np.sqrt((1 - alpha_bar) / alpha_bar)


def times_of(sigmas: np.ndarray, schedule: Tensor) -> list[float]:
    """Return the timesteps of sigmas, interpolated in log sigma between those of the schedule (T,)."""
    known = np.log(sigmas_of(_to_numpy(schedule)))
    return np.interp(np.log(sigmas), known, np.arange(len(known))).tolist()


def time_uniform_grid(schedule: Tensor, steps: int) -> TimeGrid:
    """Return evenly spaced times from the schedule's noisy end to its clean end, where the last step leads.

    The times are continuous: timestep n of T is at (n + 1) / T, and log alpha_bar is linear between timesteps. A
    network is told 1000 (t - 1 / T), which is n if T is 1000. Arguments and errors as for `leading_grid`.

    Source: Lu, Zhou, Bao, Chen, Li & Zhu 2022, "DPM-Solver", Appendix D, and its code ("time_uniform"), which computes
    times in float32. Networks are sensitive to their last bits.
    """
    total = len(schedule)
    _check_steps(steps, total)
    times = torch.linspace(1, 1 / total, steps + 1, dtype=torch.float32)
    known_times = np.arange(1, total + 1) / total
    known_logs = np.log(np.maximum(_to_numpy(schedule), TINY))
    levels = np.exp(np.interp(times.double().numpy(), known_times, known_logs))
    if schedule[-1] == 0:
        levels[0] = 0.0
    return _make_grid(((times - 1 / total) * 1000)[:-1].tolist(), levels[:-1], float(levels[-1]))


def grid_at(schedule: Tensor, times: list[int], last: float) -> TimeGrid:
    """Return the grid of these timesteps, the noisiest first, whose last step leads to the alpha_bar `last`."""
    return _make_grid(times, _to_numpy(schedule)[times], last)


def with_midpoints(grid: TimeGrid, schedule: Tensor) -> TimeGrid:
    """Return a grid followed by the middles in lambda of all steps but the last, which end where their steps do."""
    starts, ends = (sigmas_of(np.array(levels[:-1])) for levels in (grid.alpha_bar, grid.alpha_bar_next))
    middles = np.sqrt(starts * ends)
    return TimeGrid((*grid.times, *times_of(middles, schedule)),
                    (*grid.alpha_bar, *(1 / (1 + middles**2)).tolist()),
                    (*grid.alpha_bar_next, *grid.alpha_bar_next[:-1]))


def _to_numpy(schedule: Tensor) -> np.ndarray:
    return schedule.cpu().double().numpy()


def _make_grid(times: list[float], alpha_bar: np.ndarray, last: float) -> TimeGrid:
    """Return a grid whose steps lead to the next one's start, and the last step to the alpha_bar `last`."""
    levels = alpha_bar.tolist()
    return TimeGrid(tuple(times), tuple(levels), (*levels[1:], last))


def _check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise UserError(f"{steps} sampling steps: give a number from 1 to {most}")
