"""What all of the LDM family's samplers have in common: a device for their tables, the start, and guidance.

`DDIMSampler`, `PLMSSampler` and `DPMSolverSampler` are for scripts that were written for the family. They keep its
names, tables, grids and order of random numbers, and accept what it accepts. They compute with the functions of
`ldm.sampling`, whose own samplers are stricter and reproduce each image by itself.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.conditions import concat_conditions
from ldm.models.diffusion.wrapper import Condition


class FamilyModel(Protocol):
    """What the samplers need of a model. `parameterization` may be absent; the network then predicts noise."""

    num_timesteps: int
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return the network's output at x (B, C, H, W) and timesteps t (B,)."""

    def q_sample(self, x_start: Tensor, t: Tensor) -> Tensor:
        """Return x_start with the noise of timesteps t. Only sampling with a mask needs it."""


class ScoreCorrector(Protocol):
    """Changes the predicted noise at each step."""

    def modify_score(self, model: FamilyModel, e_t: Tensor, x: Tensor, t: Tensor, c: Condition, **kwargs: Any
                     ) -> Tensor:
        """Return the noise to use instead of e_t."""


@dataclass(frozen=True)
class Guidance:
    """How a prediction is steered; the attributes are parameters of the samplers."""

    scale: float = 1.0
    unconditional: Condition = None
    score_corrector: ScoreCorrector | None = None
    corrector_kwargs: dict[str, Any] | None = None


class FamilySampler:
    """A model, a device for tables, and guided predictions.

    Args:
        model: see `FamilyModel`.
        device: device of the tables; None: the model's.
    """

    def __init__(self, model: FamilyModel, device: torch.device | str | None = None) -> None:
        self.model = model
        self.device = device

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return self.model.betas.device if self._device is None else self._device

    @device.setter
    def device(self, device: torch.device | str | None) -> None:
        self._device = None if device is None else torch.device(device)

    @property
    def _parameterization(self) -> str:
        """What the model predicts: "eps", "x0" or "v"."""
        return getattr(self.model, "parameterization", "eps")

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute, on the sampler's device if it is a tensor."""
        setattr(self, name, attr.to(self.device) if isinstance(attr, Tensor) else attr)

    def _start(self, size: Sequence[int], x_T: Tensor | None) -> Tensor:
        """Return `x_T`, or noise of `size` from the global generator of the model's device."""
        return torch.randn(tuple(size), device=self.model.betas.device) if x_T is None else x_T

    def _guided_output(self, x: Tensor, c: Condition, t: Tensor, guidance: Guidance) -> Tensor:
        """Return the network's output (B, C, H, W), guided if there is an unconditional condition and a scale."""
        if guidance.unconditional is None or guidance.scale == 1:
            return self.model.apply_model(x, t, c)
        both = concat_conditions(guidance.unconditional, c)
        unconditional, conditional = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        # Ho & Salimans 2022, Eq. 6, in the precision of the network, as in the family
        return unconditional + guidance.scale * (conditional - unconditional)
