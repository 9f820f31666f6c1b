"""The samplers by the names that scripts know them by.

Nothing here imports torch before a sampler is asked for, so that `--help` and typing mistakes are answered at once.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ldm.common.errors import UserError

if TYPE_CHECKING:
    from ldm.models.diffusion.sampling import Sampler

SAMPLERS = {
    "ddim": "ldm.models.diffusion.ddim.DDIMSampler",
    "plms": "ldm.models.diffusion.plms.PLMSSampler",
    "dpm": "ldm.models.diffusion.dpm_solver.DPMSolverSampler",
    "euler": "ldm.models.diffusion.euler.EulerSampler",
    "heun": "ldm.models.diffusion.heun.HeunSampler",
    "euler_a": "ldm.models.diffusion.euler.EulerAncestralSampler",
}


def sampler_class(name: str) -> type[Sampler]:
    """The sampler of this name.

    Raises:
        UserError: there is none.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    module, _, attribute = SAMPLERS[name].rpartition(".")
    return getattr(import_module(module), attribute)
