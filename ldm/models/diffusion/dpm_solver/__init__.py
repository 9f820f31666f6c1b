"""The LDM family's DPM-Solver++ sampler.

The names of the family's solver itself (NoiseScheduleVP, model_wrapper, DPM_Solver) are left out: no public script uses
them. `ldm.sampling.dpm_solver` has the method.
"""
from .sampler import DPMSolverSampler as DPMSolverSampler
