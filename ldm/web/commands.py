"""The commands that do in a terminal what the page does."""
from __future__ import annotations

from typing import Any

from ldm.common.paths import quote_command
from ldm.inference.settings import ModelSettings
from ldm.web.image_request import ImageRequest

BATCH = 4


def generation_commands(request: ImageRequest, model: ModelSettings) -> str:
    """Return the command that generates the images of a request, or one a line for a strip of biases.

    Args:
        request: with its seed.
        model: the base model.
    """
    script = "txt2img" if request.image is None else "img2img" if request.mask is None else "inpaint"
    biases = request.biases or (request.settings.bias,)
    lines = []
    for bias in biases:
        values = {**_model_flags(model), **_image_flags(request), "--bias": bias}
        arguments = [part for flag, value in values.items() for part in _words(flag, value)]
        lines.append(f"python scripts/{script}.py {quote_command(*arguments)}")
    return "\n".join(lines)


def _model_flags(model: ModelSettings) -> dict[str, Any]:
    return {"--config": model.config, "--ckpt": model.checkpoint, "--vae": model.vae,
            "--text_encoder": model.text_encoder, "--device": model.device, "--precision": model.precision}


def _image_flags(request: ImageRequest) -> dict[str, Any]:
    settings = request.settings
    count = 1 if request.biases else request.count
    return {"--concept": request.concepts or None, "--prompt": request.prompt,
            "--negative_prompt": request.negative_prompt or None, "--temperature": settings.temperature,
            "--global_locking": settings.global_locking, "--sampler": settings.sampler,
            "--timestep_spacing": settings.timestep_spacing, "--ddim_steps": settings.num_inference_steps,
            "--scale": settings.guidance_scale, "--H": settings.height, "--W": settings.width, "--seed": request.seed,
            "--n_samples": count, "--batch_size": BATCH if count > BATCH else None, "--init-img": request.image,
            "--mask": request.mask, "--strength": request.strength}


def _words(flag: str, value: Any) -> list[str]:
    """Return a flag and its value as words; nothing for None and False."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    values = value if isinstance(value, tuple) else (value,)
    return [flag, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]
