"""Identify the model that a set of weights belongs to, by keys and shapes, and the config that describes it."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

KL_CONFIGS = {4: "autoencoder_kl_64x64x3", 8: "autoencoder_kl_32x32x4", 16: "autoencoder_kl_16x16x16",
              32: "autoencoder_kl_8x8x64"}
NEEDS_BASE = "give the checkpoint of the base model that it was made for"
OTHER_CONFIGS = "use its config, such as those in configs/latent-diffusion/ and models/ldm/"
UNSUPPORTED = "this project does not support that kind of model"
LORA = re.compile(r"lora_(up|down|A|B|unet|te)|[._]lora\.|hada_w1|lokr_w1")
UNET = re.compile(r"(model\.)?(diffusion_model\.)?input_blocks\.")
DIFFUSION_TRANSFORMER = re.compile(r"(joint|double|single)_blocks\.|double_stream|transformer_blocks\.\d+\.attn\.to_q")
EMBEDDING_WIDTHS = (768, 1024, 1280)


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: its name, with the property that distinguishes it.
        advice: which config describes it, or what to give instead.
    """

    name: str
    advice: str


def identify_family(shapes: Shapes) -> Family | None:
    """Return the kind of model that has weights of these names and shapes, or None if it is unknown."""
    if addition := _identify_addition(shapes):
        return addition
    if any(UNET.match(key) for key in shapes):
        return _identify_unet(shapes)
    return _identify_transformer(shapes) or _identify_first_stage(shapes) or _identify_clip(shapes)


def _identify_addition(shapes: Shapes) -> Family | None:
    """Identify files that are used with a base model, not instead of one."""
    if any(key.endswith(".target_input") for key in shapes) and any(key.endswith(".super_input") for key in shapes):
        return Family("a concept of this project", f"give it with --concept, and here {NEEDS_BASE}")
    if any(LORA.search(key) for key in shapes):
        return Family("a LoRA", NEEDS_BASE)
    if any(key.startswith("control_model.") or "controlnet_" in key or "zero_convs." in key for key in shapes):
        return Family("a ControlNet", NEEDS_BASE)
    vectors_only = all(len(shape) in (1, 2) and shape[-1] in EMBEDDING_WIDTHS for shape in shapes.values())
    if 0 < len(shapes) <= 4 and vectors_only:
        return Family("a Textual Inversion embedding", NEEDS_BASE)
    return None


def _identify_unet(shapes: Shapes) -> Family:
    # Only this project folds pixels into channels before its first stage.
    if _input_channels(shapes, "first_stage_model.encoder.conv_in.weight", default=3) > 3:
        return Family("a base model of this project", "use configs/perfusion.yaml")
    width = _context_width(shapes)
    if width is None:
        return Family("a latent diffusion model without cross-attention", OTHER_CONFIGS)
    if any(key.startswith("conditioner.") for key in shapes) or width == 2048:
        return Family(f"Stable Diffusion XL (context {width})", UNSUPPORTED)
    channels = _input_channels(shapes, "model.diffusion_model.input_blocks.0.0.weight", default=4)
    if width in (768, 1024) and channels > 4:
        return Family(f"Stable Diffusion for inpainting, depth or other images ({channels} input channels)",
                      UNSUPPORTED)
    if any(key.endswith("cond_stage_model.embedding.weight") for key in shapes):
        return Family(f"a class-conditional latent diffusion model (context {width})",
                      "use configs/latent-diffusion/cin256-v2.yaml")
    return _identify_by_context(width)


def _identify_by_context(width: int) -> Family:
    known = {
        768: Family("Stable Diffusion 1.x (context 768)",
                    "use configs/stable-diffusion/v1-inference.yaml, to train configs/perfusion-sd-v1.yaml"),
        1024: Family("Stable Diffusion 2.x (context 1024)",
                     "use configs/stable-diffusion/v2-inference.yaml if it was made for 512 pixels, "
                     "v2-inference-v.yaml if for 768 (the weights are alike), to train configs/perfusion-sd-v2.yaml"),
        1280: Family("LDM text-to-image 1.4B (context 1280)",
                     "use configs/latent-diffusion/txt2img-1p4B-eval.yaml, to train configs/perfusion-ldm.yaml"),
    }
    return known.get(width) or Family(f"a latent diffusion model of context {width}", OTHER_CONFIGS)


def _identify_transformer(shapes: Shapes) -> Family | None:
    if any(key.startswith("conditioner.") for key in shapes):
        return Family("Stable Diffusion XL", UNSUPPORTED)
    if any(DIFFUSION_TRANSFORMER.search(key) for key in shapes):
        return Family("a diffusion transformer (Stable Diffusion 3, Flux or similar)", UNSUPPORTED)
    return None


def _identify_first_stage(shapes: Shapes) -> Family | None:
    prefix = next((start for start in ("", "first_stage_model.") if f"{start}decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        return None
    levels = {match[1] for key in shapes if (match := re.match(rf"{prefix}encoder\.down\.(\d+)\.", key))}
    factor = 2 ** (len(levels) - 1)
    channels = _input_channels(shapes, f"{prefix}post_quant_conv.weight", default=0)
    summary = f"f{factor}, {channels} channels"
    if codes := shapes.get(f"{prefix}quantize.embedding.weight"):
        variant = "-n256" if factor == 8 and codes[0] == 256 else ""
        if factor == 4 and f"{prefix}encoder.mid.attn_1.q.weight" not in shapes:
            variant = "-noattn"
        return Family(f"a VQ autoencoder ({summary}, {codes[0]} codes)",
                      f"use models/first_stage_models/vq-f{factor}{variant}/config.yaml")
    config = f"configs/autoencoder/{KL_CONFIGS.get(factor, KL_CONFIGS[8])}.yaml"
    return Family(f"a KL autoencoder ({summary})", f"use {config}, or give a whole model's checkpoint")


def _identify_clip(shapes: Shapes) -> Family | None:
    if any(key.startswith(("vision_model.", "visual.", "text_model.", "clip.")) for key in shapes):
        return Family("a CLIP", "give a whole model's checkpoint")
    return None


def _context_width(shapes: Shapes) -> int | None:
    """Return the width of the encodings that cross-attention reads, or None if there is no cross-attention."""
    for key, shape in shapes.items():
        if key.endswith("transformer_blocks.0.attn2.to_k.weight") and len(shape) == 2:
            return shape[1]
    return None


def _input_channels(shapes: Shapes, key: str, default: int) -> int:
    shape = shapes.get(key, ())
    return shape[1] if len(shape) > 1 else default
