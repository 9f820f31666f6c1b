"""The public path of the diffusion models, which configs name as `ldm.models.diffusion.ddpm.LatentDiffusion`."""
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.pixel_diffusion import DDPM
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.models.frozen import disabled_train

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "disabled_train"]
