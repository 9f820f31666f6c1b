"""Sample from ControlNet by its own copy of the DDIM sampler: `controlnet_sampler.py [hack]`."""
from __future__ import annotations

import sys

import torch
from cldm.ddim_hacked import DDIMSampler
from cldm.hack import enable_sliced_attention, hack_everything
from cldm.model import create_model, load_state_dict
from PIL import Image

STEPS, SCALE = 10, 5.0


@torch.no_grad()
def main() -> None:
    """Write two samples, with the hacks of the repository if they are asked for."""
    if "hack" in sys.argv:
        hack_everything(clip_skip=0)
        enable_sliced_attention()
    model = create_model("models/cldm_v15.yaml").cpu()
    model.load_state_dict(load_state_dict("models/control_sd15_ini.ckpt", location="cpu"))
    model.eval()
    torch.manual_seed(7)
    hint = torch.rand(1, 3, 64, 64).expand(2, -1, -1, -1)
    conditions = [{"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([prompt] * 2)]}
                  for prompt in ("a red circle", "")]
    latents, _ = DDIMSampler(model).sample(STEPS, 2, (4, 8, 8), conditions[0], verbose=False, eta=0.0,
                                           unconditional_guidance_scale=SCALE, unconditional_conditioning=conditions[1])
    for number, image in enumerate(model.decode_first_stage(latents)):
        pixels = (image.clamp(-1, 1) + 1) * 127.5
        Image.fromarray(pixels.permute(1, 2, 0).byte().numpy()).save(f"sample{number}.png")


if __name__ == "__main__":
    main()
