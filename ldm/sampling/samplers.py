"""The table of samplers. To add one, write its file in this folder and add a line here.

Command lines, their help, tests and docs read this table. Importing it loads no torch, so `--help` is fast.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from ldm.common.errors import UserError

if TYPE_CHECKING:
    from ldm.sampling.sampler import Sampler


class SamplerEntry(NamedTuple):
    """A sampler as users see it.

    Attributes:
        path: module and class, below `ldm.sampling`.
        description: what it is, for help texts.
    """

    path: str
    description: str


SAMPLERS = {  # the name that command lines use -> entry
    "ddim": SamplerEntry("ddim.DDIM", "DDIM, deterministic unless eta is above 0"),
    "plms": SamplerEntry("plms.PLMS", "linear multistep, more accurate than DDIM for the same steps"),
    "dpm": SamplerEntry("dpm_solver.DPMSolver", "DPM-Solver++(2M), accurate from about 20 steps"),
    "unipc": SamplerEntry("unipc.UniPC", "UniPC of order 2, accurate from about 10 steps"),
    "euler": SamplerEntry("euler.Euler", "Euler's method on Karras' noise levels"),
    "heun": SamplerEntry("heun.Heun", "Heun's method of second order, two model evaluations per step"),
    "euler_a": SamplerEntry("euler.EulerAncestral", "ancestral Euler, adds noise at each step"),
    "dpmpp_2m_sde": SamplerEntry("dpm_solver.DPMSolverSDE", "DPM-Solver++(2M) SDE, adds noise at each step"),
    "dpmpp_sde": SamplerEntry("dpm_sde.SingleStepSDE", "DPM-Solver++ SDE, adds noise, two model evaluations per step"),
    "lcm": SamplerEntry("consistency.LCM", "for latent consistency models, 2 to 8 steps"),
    "tcd": SamplerEntry("consistency.TCD", "for trajectory consistency models and Hyper-SD, 1 to 8 steps"),
}


def sampler_class(name: str) -> type[Sampler]:
    """Return the sampler of this name.

    Raises:
        UserError: if there is none.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    module, _, attribute = SAMPLERS[name].path.rpartition(".")
    return getattr(import_module(f"ldm.sampling.{module}"), attribute)


def describe_samplers() -> str:
    """Return the names and descriptions of all samplers, for help texts."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in SAMPLERS.items())
