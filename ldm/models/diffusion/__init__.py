"""Diffusion models, and the samplers of the LDM family's public interface.

    latent_diffusion.py   `LatentDiffusion`; pixel_diffusion.py has its base class `DDPM`, diffusion on images
    objectives.py         the training objective and its weights; the loss of a concept is in `ldm.personalization.base`
    pixel_sizes.py        sizes in pixels of models of latents
    wrapper.py            wraps the U-Net, and routes each kind of conditioning to it
    ddpm.py               public path of the models; perfusion.py is that of `Perfusion`
    ddim.py, plms.py, dpm_solver/    the family's samplers; they reproduce the original's images
    family_sampler.py     their base class; stepwise_sampler.py is that of DDIM and PLMS
    conditions.py         nested conditions: guidance batches and batch sizes

What the LDM family's scripts and subclasses need of the models besides, as mixins and subclasses:

    diffusion_process.py, ancestral_sampling.py    the process, and its reversed chain of T steps
    logged_images.py      `log_images`
    embedding_training.py Textual Inversion by `personalization_config`
    extra_channels.py, extra_vectors.py            Stability AI's inpainting, depth, upscaling and unCLIP
    ddpm_edit.py          public path of InstructPix2Pix' model
    weight_fitting.py     weights of a model with other numbers of channels
"""
