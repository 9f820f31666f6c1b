"""Losses that train first stages. Public configs name `LPIPSWithDiscriminator` at this path."""
from __future__ import annotations

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator

__all__ = ["LPIPSWithDiscriminator"]
