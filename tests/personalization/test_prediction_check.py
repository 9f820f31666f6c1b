"""One pass over the photos shows whether the base model predicts what its config says."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.data.images import load_folder, to_tensor
from ldm.inference.pipeline import PerfusionPipeline
from ldm.models.diffusion.objectives import training_target
from ldm.personalization.prediction_check import KINDS, check_prediction, prediction_errors
from ldm.sampling.schedule import q_sample

T = 10


class Ideal(SimpleNamespace):
    """A model whose network knows the images, and predicts what it is said to."""

    num_timesteps = T
    alphas_cumprod = torch.linspace(0.99, 0.01, T)
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def q_sample(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return q_sample(self, latents, t, noise)

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        signal, noise = self.sqrt_alphas_cumprod[t[0]], self.sqrt_one_minus_alphas_cumprod[t[0]]
        return training_target(self, self.predicts, self.latents, (x - signal * self.latents) / noise, t)


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("parameterization", KINDS)
def test_the_wrong_kind_is_refused_with_the_right_one(predicts: str, parameterization: str) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Ideal(latents=latents, predicts=predicts, parameterization=parameterization)
    state = torch.get_rng_state()
    if predicts == parameterization:
        check_prediction(model, latents, None)
    else:
        with pytest.raises(UserError, match=f"predicts {predicts}, but its config says parameterization: "
                                            f"{parameterization} .*set model.params.parameterization={predicts}"):
            check_prediction(model, latents, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_predicts_nothing_is_not_refused() -> None:
    model = Ideal(parameterization="eps", apply_model=lambda x, t, cond: torch.randn_like(x))
    check_prediction(model, torch.randn(2, 4, 8, 8), None)


@pytest.mark.slow
def test_the_bundled_model_is_seen_to_predict_v() -> None:
    model = PerfusionPipeline.from_pretrained("models/mini", device="cpu").model
    for name in ("teddy", "mug", "car"):
        folder = Path(PROJECT_ROOT / "models" / "mini" / "examples" / name)
        images = torch.stack([to_tensor(image.resize((64, 64))) for _, image in load_folder(folder)[:2]])
        condition = model.get_learned_conditioning(["a photo"] * len(images))
        errors = prediction_errors(model, model.encode_images(images, sample=False), condition)
        assert errors["v"] < 0.45 and errors["eps"] > 0.75 and errors["x0"] > 2
