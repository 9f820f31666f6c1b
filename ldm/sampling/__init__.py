"""From noise to latents: the noise schedule, the samplers and the loop over their steps.

    samplers.py           the table of samplers; start here to add one. spacings.py has that of spacings of timesteps
    sampler.py            the base class of samplers, the DDIM update, and the loop over the steps
    schedule.py           the noise schedule, and conversions between noise, image and velocity
    time_grid.py          the noise levels that samplers visit
    ddim.py, ...          one file for each sampler: ddim, plms, dpm_solver, dpm_sde, unipc, euler, heun; consistency
                          has those of distilled models, lcm and tcd
    checks.py             checks on the arguments of samplers

The samplers of the LDM family's public interface (`ldm.models.diffusion.ddim.DDIMSampler` and others) are facades over
these.
"""
