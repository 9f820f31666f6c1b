"""DreamBooth: Ruiz et al., "Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation" (CVPR 2023).

arXiv 2208.12242. The whole U-Net is trained on "a photo of a sks dog". The word and the text encoder stay as they are.
"""
from __future__ import annotations

from torch import nn

from ldm.personalization.prior_preservation import PriorPreservation


class DreamBooth(PriorPreservation):
    """A model whose U-Net learns what a rare word stands for. Params are those of `PriorPreservation`."""

    method = "dreambooth"
    method_name = "DreamBooth"

    def trained_unet_weights(self) -> dict[str, nn.Parameter]:
        return dict(self.model.diffusion_model.named_parameters())
