"""The table of spacings of timesteps, by diffusers' names. Importing it loads no torch, so `--help` is fast."""
from __future__ import annotations

TIMESTEP_SPACINGS = {  # name -> description, for help texts
    "leading": "multiples of one number, from the clean end",
    "trailing": "the same from the noisy end, which distilled models need",
    "linspace": "from end to end",
    "karras": "noise levels of Karras et al., dense where little noise is left",
}


def describe_spacings() -> str:
    """Return the names and descriptions of all spacings of timesteps, for help texts."""
    return "; ".join(f"{name}: {description}" for name, description in TIMESTEP_SPACINGS.items())
