"""Remember the state of torch's global random number generators, and draw the same numbers a second time."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """The state of the CPU's generator and of `device`'s own, at the moment of construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_state = torch.get_rng_state()
        self.device_state = self._get_device_state()

    def _get_device_state(self) -> Tensor | None:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.mps.get_rng_state() if self.device.type == "mps" else None

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu_state)
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.device_state, self.device)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(self.device_state)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within this context, torch draws the numbers that followed this state. Afterwards it continues as before."""
        current = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            current.restore()
