"""The table of samplers. To add one, write its file in this folder and add a line here.

Command lines, their help, tests and docs read this table. Importing it loads no torch, so `--help` is fast.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ldm.common.errors import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.sampling import Sampler


class SamplerEntry(NamedTuple):
    """A sampler as users see it.

    Attributes:
        path: module and class, below `ldm.models.diffusion`.
        description: what it is, for help texts.
    """

    path: str
    description: str


SAMPLERS = {  # the name that command lines use -> entry
    "ddim": SamplerEntry("ddim.DDIMSampler", "DDIM, deterministic unless eta is above 0"),
    "plms": SamplerEntry("plms.PLMSSampler", "linear multistep, more accurate than DDIM for the same steps"),
    "dpm": SamplerEntry("dpm_solver.DPMSolverSampler", "DPM-Solver++(2M), accurate from about 20 steps"),
    "euler": SamplerEntry("euler.EulerSampler", "Euler's method on Karras' noise levels"),
    "heun": SamplerEntry("heun.HeunSampler", "Heun's method of second order, two model evaluations per step"),
    "euler_a": SamplerEntry("euler.EulerAncestralSampler", "ancestral Euler, adds noise at each step"),
}


def sampler_class(name: str) -> type[Sampler]:
    """Return the sampler of this name.

    Raises:
        UserError: if there is none.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    module, _, attribute = SAMPLERS[name].path.rpartition(".")
    return getattr(import_module(f"ldm.models.diffusion.{module}"), attribute)


def describe_samplers() -> str:
    """Return the names and descriptions of all samplers, for help texts."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in SAMPLERS.items())
