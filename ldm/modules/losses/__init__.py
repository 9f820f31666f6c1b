"""Losses of first stages. Public configs name `LPIPSWithDiscriminator` at this path.

The loss of a concept is `concept_losses` in `ldm.personalization.base`, that of a base model is in
`ldm.models.diffusion.objectives`.
"""
from __future__ import annotations

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator

__all__ = ["LPIPSWithDiscriminator"]
