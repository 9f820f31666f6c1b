"""Sample with k-diffusion's samplers through one of its wrappers: `k_diffusion_samplers.py WRAPPER`."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable

import k_diffusion
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from ldm.util import instantiate_from_config

SAMPLERS = ("euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2s_ancestral", "dpmpp_2m")
STEPS, SCALE = 8, 5.0


class Guided(nn.Module):
    """Classifier-free guidance around a denoiser."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor, empty: Tensor) -> Tensor:
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([empty, prompt]))
        without, conditional = both.chunk(2)
        return without + SCALE * (conditional - without)


@torch.no_grad()
def main() -> None:
    """Write an image for each sampler, and the mean absolute latents as numbers."""
    model = instantiate_from_config(OmegaConf.load("config.yaml").model)
    model.load_state_dict(torch.load("model.ckpt")["state_dict"], strict=False)
    model.eval()
    model.cond_stage_model.device = "cpu"
    denoiser = getattr(k_diffusion.external, sys.argv[1])(model)
    sigmas = denoiser.get_sigmas(STEPS)
    conditions = {"prompt": model.get_learned_conditioning(["a photo of a cat"]),
                  "empty": model.get_learned_conditioning([""])}
    numbers = {}
    for name in SAMPLERS:
        torch.manual_seed(1)
        start = torch.randn(1, 4, 8, 8) * sigmas[0]
        sampler: Callable[..., Tensor] = getattr(k_diffusion.sampling, f"sample_{name}")
        latents = sampler(Guided(denoiser), start, sigmas, extra_args=conditions, disable=True)
        numbers[name] = latents.flatten().tolist()
        pixels = ((model.decode_first_stage(latents)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
        Image.fromarray(pixels.byte().numpy()).save(f"{name}.png")
    with open("numbers.json", "w") as file:
        json.dump(numbers, file)


if __name__ == "__main__":
    main()
