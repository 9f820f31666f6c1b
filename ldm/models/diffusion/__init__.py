"""Diffusion models, and the samplers of the LDM family's public interface.

    latent_diffusion.py   `LatentDiffusion`; pixel_diffusion.py has its base class, diffusion on images
    objectives.py         the training objective and its weights; the loss of a concept is in `ldm.personalization.base`
    wrapper.py            wraps the U-Net, and routes each kind of conditioning to it
    ddpm.py               public path of the models; perfusion.py is that of `Perfusion`
    ddim.py, plms.py, dpm_solver/    the family's samplers; they reproduce the original's images
    family_sampler.py     their base class; stepwise_sampler.py is that of DDIM and PLMS
    conditions.py         nested conditions: guidance batches and batch sizes
"""
