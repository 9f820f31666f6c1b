"""Check on the photos that the base model predicts what its config says: noise, v or the image.

Read as the wrong kind, weights train without an error, and generate noise.
"""
from __future__ import annotations

import torch
from torch import Generator, Tensor

from ldm.checkpoints.prediction import prediction_remedy
from ldm.common.errors import UserError
from ldm.models.diffusion.latent_diffusion import LatentDiffusion
from ldm.models.diffusion.objectives import training_target
from ldm.models.diffusion.wrapper import Condition

KINDS = ("eps", "v", "x0")
TIMESTEP = 0.7  # share of all timesteps: there, the three targets differ most from each other
EXPLAINED = 0.6  # a network that predicts a target has a relative squared error below
RATIO = 2.0  # by which the config's own kind must be worse than another to be wrong


@torch.no_grad()
def prediction_errors(model: LatentDiffusion, latents: Tensor, condition: Condition) -> dict[str, float]:
    """Return the squared error of one pass of the network, relative to the target's mean square, for each kind.

    Args:
        model: its own random numbers are left alone.
        latents: (B, C, h, w), scaled.
        condition: B encoded prompts.
    """
    t = torch.full((len(latents),), int(TIMESTEP * model.num_timesteps), device=latents.device)
    noise = torch.randn(latents.shape, generator=Generator().manual_seed(0)).to(latents)
    output = model.apply_model(model.q_sample(latents, t, noise), t, condition).float()
    targets = {kind: training_target(model, kind, latents, noise, t) for kind in KINDS}
    return {kind: float((output - target).square().mean() / target.square().mean()) for kind, target in targets.items()}


def check_prediction(model: LatentDiffusion, latents: Tensor, condition: Condition) -> None:
    """Raise UserError if the network predicts another kind than `model.parameterization`.

    Args:
        latents, condition: as for `prediction_errors`.
    """
    errors = prediction_errors(model, latents, condition)
    own, best = model.parameterization, min(errors, key=errors.__getitem__)
    if best != own and errors[best] < EXPLAINED and errors[own] > RATIO * errors[best]:
        raise UserError(f"the base model predicts {best}, but its config says parameterization: {own} (on the photos, "
                        f"its error is {errors[best]:.2f} as {best} and {errors[own]:.2f} as {own}); "
                        f"{prediction_remedy(best)}, or set model.params.parameterization={best}")
