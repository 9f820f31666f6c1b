"""Losses of first stages. Public configs name `LPIPSWithDiscriminator` at this path.

The loss of a concept is `concept_losses` in `ldm.personalization.base`, that of a base model is in
`ldm.models.diffusion.objectives`, a part of the concept encoder's in `nearest_token.py`.
"""
from __future__ import annotations

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator

__all__ = ["LPIPSWithDiscriminator"]
