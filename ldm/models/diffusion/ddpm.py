"""The public path of the diffusion models, which configs name as `ldm.models.diffusion.ddpm.LatentDiffusion`.

Layout2ImgDiffusion of the original is left out: it needs a data set of its repository.
"""
from ldm.models.diffusion.extra_channels import (
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleFinetuneDiffusion,
)
from ldm.models.diffusion.extra_vectors import ImageEmbeddingConditionedLatentDiffusion, LatentUpscaleDiffusion
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.pixel_diffusion import DDPM
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.models.frozen import disabled_train
from ldm.modules.diffusionmodules.util import extract_into_tensor

__all__ = [
    "DDPM", "DiffusionWrapper", "ImageEmbeddingConditionedLatentDiffusion", "LatentDepth2ImageDiffusion",
    "LatentDiffusion", "LatentFinetuneDiffusion", "LatentInpaintDiffusion", "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion", "disabled_train", "extract_into_tensor",
]
