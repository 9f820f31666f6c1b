"""Build the model of a config with random weights, and save a checkpoint: `build_checkpoint.py CONFIG CHECKPOINT`.

`launcher.py` runs it with an original `ldm` on the path. The weights are random, and such that all parts of the model
matter: images have structure, and prompts, steps and averages of weights change them.
"""
from __future__ import annotations

import sys
import zlib

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.util import instantiate_from_config

# Last layers: images that are neither black nor white, and noise that is not made worse than real models make it.
SMALL = ("conv_out.weight", "diffusion_model.out.2.weight", "diffusion_modelout2weight")
SCHEDULE = ("betas", "alphas", "sqrt", "log", "posterior", "lvlb", "logvar", "scale_factor", "num_updates", "decay")


def main() -> None:
    """Build, randomize, save."""
    config, checkpoint = sys.argv[1:]
    model = instantiate_from_config(OmegaConf.load(config).model)
    state = {key: randomized(key, value) for key, value in model.state_dict().items()
             if not key.startswith("embedding_manager.")}  # public checkpoints have none
    torch.save({"state_dict": state, "global_step": 1}, checkpoint)


def randomized(key: str, value: Tensor) -> Tensor:
    """Return random values for a parameter; a constant of the schedule and whole numbers stay as they are."""
    if not value.is_floating_point() or key.split(".")[-1].startswith(SCHEDULE) or key.endswith("attn_mask"):
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(value.shape, generator=generator)
    if value.dim() > 1:  # keeps the variance of what goes through; embeddings get one of 1
        fan_in = 1 if "embedding" in key or "emb.weight" in key else value[0].numel()
        return noise / fan_in ** 0.5 * (0.3 if key.endswith(SMALL) else 1)
    return 0.2 * noise + (1 if key.endswith("weight") else 0)


if __name__ == "__main__":
    main()
