"""Losses of first stages; public configs name the first one from here."""
from __future__ import annotations

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator

__all__ = ["LPIPSWithDiscriminator"]
