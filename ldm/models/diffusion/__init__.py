"""Diffusion models, noise schedules and samplers.

    latent_diffusion.py   `LatentDiffusion`; pixel_diffusion.py has its base class, diffusion on images
    objectives.py         the training objective and its weights; the loss of a concept is in `ldm.personalization.base`
    schedule.py           the noise schedule, and conversions between noise, image and velocity
    wrapper.py            wraps the U-Net, and routes each kind of conditioning to it
    samplers.py           the table of samplers; start here to add one
    sampling.py           the base class of samplers, the DDIM update, and the loop over the steps
    time_grid.py          the noise levels that samplers visit
    ddim.py, ...          one file for each sampler: ddim, plms, dpm_solver, euler, heun
    sampling_checks.py    checks on the arguments of samplers
    ddpm.py               public path of the models; perfusion.py is that of `Perfusion`
"""
