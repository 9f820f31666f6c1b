"""Learning-rate multipliers for `torch.optim.lr_scheduler.LambdaLR`, under latent diffusion's names."""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ldm.common.errors import UserError


class LambdaWarmUpCosineScheduler:
    """Rises linearly from `lr_start` to `lr_max` over `warm_up_steps`, then falls along half a cosine to `lr_min`.

    All three are factors of the optimizer's learning rate. After `max_decay_steps` steps the factor stays at `lr_min`.
    """

    def __init__(self, warm_up_steps: int, lr_min: float, lr_max: float, lr_start: float, max_decay_steps: int,
                 verbosity_interval: int = 0) -> None:
        self.warm_up_steps = warm_up_steps
        self.max_decay_steps = max_decay_steps
        self.lr_start, self.lr_min, self.lr_max = lr_start, lr_min, lr_max
        self.verbosity_interval = verbosity_interval  # accepted for the public configs; the progress bar shows the rate

    def schedule(self, n: int) -> float:
        """Return the factor at step n."""
        if n < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * n / self.warm_up_steps
        progress = min(1.0, (n - self.warm_up_steps) / max(1, self.max_decay_steps - self.warm_up_steps))
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1.0 + math.cos(math.pi * progress))

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2:
    """Repeats the same shape in cycles. Every argument is a list with one entry per cycle.

    A cycle of length L has the steps 0 to L - 1. After the last cycle the factor stays at its end.

    Raises:
        UserError: if the lists are empty or differ in length.
    """

    def __init__(self, warm_up_steps: Sequence[int], f_min: Sequence[float], f_max: Sequence[float],
                 f_start: Sequence[float], cycle_lengths: Sequence[int], verbosity_interval: int = 0) -> None:
        lists = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
        if not cycle_lengths or len({len(values) for values in lists}) != 1:
            raise UserError("warm_up_steps, f_min, f_max, f_start, cycle_lengths: give each one entry per cycle")
        self.cycles = list(zip(*lists, strict=True))
        self.ends = list(accumulate(cycle_lengths))
        self.verbosity_interval = verbosity_interval

    def _locate(self, n: int) -> tuple[int, int]:
        """Return the index of the cycle of step n, and the step within it. After the last cycle, return its end."""
        cycle = min(bisect_right(self.ends, n), len(self.ends) - 1)
        start = self.ends[cycle - 1] if cycle else 0
        return cycle, min(n - start, self.ends[cycle] - start)

    def schedule(self, n: int) -> float:
        """Return the factor at step n."""
        cycle, step = self._locate(n)
        warm_up, f_min, f_max, f_start, length = self.cycles[cycle]
        if step < warm_up:
            return f_start + (f_max - f_start) * step / warm_up
        return self._decay(step, warm_up, f_min, f_max, length)

    @staticmethod
    def _decay(step: int, warm_up: int, f_min: float, f_max: float, length: int) -> float:
        """Return the factor at a step after the warm-up."""
        progress = min(1.0, (step - warm_up) / max(1, length - warm_up))
        return f_min + 0.5 * (f_max - f_min) * (1.0 + math.cos(math.pi * progress))

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Falls along a straight line instead, from `f_max` to `f_min`."""

    @staticmethod
    def _decay(step: int, warm_up: int, f_min: float, f_max: float, length: int) -> float:
        return f_min + (f_max - f_min) * (length - step) / length
