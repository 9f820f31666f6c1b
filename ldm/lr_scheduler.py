"""Learning-rate multipliers for `torch.optim.lr_scheduler.LambdaLR`, under latent diffusion's names."""
from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ldm.common.errors import UserError

log = logging.getLogger(__name__)


class LambdaWarmUpCosineScheduler:
    """Rises linearly from `lr_start` to `lr_max` over `warm_up_steps`, then falls along half a cosine to `lr_min`.

    All three are factors of the optimizer's learning rate. After `max_decay_steps` steps the factor stays at `lr_min`.

    Args:
        verbosity_interval: number of steps after which the last factor is logged; 0: never.

    Attributes:
        last_lr: the factor that was computed last.
    """

    def __init__(self, warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int,
                 verbosity_interval: int = 0) -> None:
        self.lr_warm_up_steps, self.lr_max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max
        self.last_lr = 0.0
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int, **kwargs: Any) -> float:
        """Return the factor at step n."""
        _log_factor(n, self.last_lr, self.verbosity_interval)
        if n < self.lr_warm_up_steps:
            self.last_lr = self.lr_start + (self.lr_max - self.lr_start) * n / self.lr_warm_up_steps
        else:
            progress = (n - self.lr_warm_up_steps) / max(1, self.lr_max_decay_steps - self.lr_warm_up_steps)
            self.last_lr = _half_cosine(progress, self.lr_max, self.lr_min)
        return self.last_lr

    def __call__(self, n: int, **kwargs: Any) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2:
    """Repeats the same shape in cycles. Every argument is a list with one entry per cycle.

    The last step of a cycle is the one at which the next one would begin: the first cycle of length L has the steps 0
    to L, and the next one begins at step L + 1 with its own step 1. After the last cycle the factor stays at its end.

    Args:
        verbosity_interval: as in `LambdaWarmUpCosineScheduler`.

    Attributes:
        cum_cycles: the steps at which cycles end, after a 0.
        last_f: the factor that was computed last.

    Raises:
        UserError: if the lists are empty or differ in length.
    """

    def __init__(self, warm_up_steps: Sequence[int], f_min: Sequence[float], f_max: Sequence[float],
                 f_start: Sequence[float], cycle_lengths: Sequence[int], verbosity_interval: int = 0) -> None:
        lists = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
        if not cycle_lengths or len({len(values) for values in lists}) != 1:
            raise UserError("warm_up_steps, f_min, f_max, f_start, cycle_lengths: give each one entry per cycle")
        self.lr_warm_up_steps, self.cycle_lengths = warm_up_steps, cycle_lengths
        self.f_start, self.f_min, self.f_max = f_start, f_min, f_max
        self.cum_cycles = [0, *accumulate(cycle_lengths)]
        self.last_f = 0.0
        self.verbosity_interval = verbosity_interval

    def find_in_interval(self, n: int) -> int:
        """Return the index of the cycle of step n."""
        return min(bisect_left(self.cum_cycles[1:], n), len(self.cycle_lengths) - 1)

    def schedule(self, n: int, **kwargs: Any) -> float:
        """Return the factor at step n."""
        cycle = self.find_in_interval(n)
        step = min(n, self.cum_cycles[-1]) - self.cum_cycles[cycle]
        _log_factor(step, self.last_f, self.verbosity_interval)
        warm_up, start = self.lr_warm_up_steps[cycle], self.f_start[cycle]
        if step < warm_up:
            self.last_f = start + (self.f_max[cycle] - start) * step / warm_up
        else:
            self.last_f = self._decay(step, warm_up, self.f_min[cycle], self.f_max[cycle], self.cycle_lengths[cycle])
        return self.last_f

    @staticmethod
    def _decay(step: int, warm_up: int, f_min: float, f_max: float, length: int) -> float:
        """Return the factor at a step after the warm-up."""
        return _half_cosine((step - warm_up) / max(1, length - warm_up), f_max, f_min)

    def __call__(self, n: int, **kwargs: Any) -> float:
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Falls along a straight line instead, from `f_max` to `f_min`."""

    @staticmethod
    def _decay(step: int, warm_up: int, f_min: float, f_max: float, length: int) -> float:
        return f_min + (f_max - f_min) * (length - step) / length


def _half_cosine(progress: float, start: float, end: float) -> float:
    """Return a point of half a cosine from `start`, at progress 0, to `end`, at progress 1 and later."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _log_factor(step: int, factor: float, interval: int) -> None:
    """Log the last factor at every `interval`-th step."""
    if interval > 0 and step % interval == 0:
        log.info("current step: %d, recent lr-multiplier: %g", step, factor)
