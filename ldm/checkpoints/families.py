"""Identify the model that a set of weights belongs to, by keys and shapes, and the config that describes it."""
from __future__ import annotations

import re

from ldm.checkpoints.other_kinds import (
    ADDITIONS,
    OTHERS,
    TRANSFORMERS,
    UNSUPPORTED,
    WHOLE_MODEL,
    Family,
    Role,
    Shapes,
    first_match,
)

KL_CONFIGS = {4: "autoencoder_kl_64x64x3", 8: "autoencoder_kl_32x32x4", 16: "autoencoder_kl_16x16x16",
              32: "autoencoder_kl_8x8x64"}
OTHER_CONFIGS = "use its config, such as those in configs/latent-diffusion/ and models/ldm/"
UNET = re.compile(r"(model\.)?(diffusion_model\.)?input_blocks\.|model_ema\.diffusion_modelinput_blocks|"
                  r"(unet\.)?down_blocks\.")  # the last ones in diffusers
FIRST_CONVOLUTION = re.compile(r"input_blocks\.?0\.?0\.?weight$|^(unet\.)?conv_in\.weight$")
VIDEO = re.compile(r"time_stack\.|time_mixer|temporal_transformer")
CONTEXT_KEYS = re.compile(r"transformer_?blocks\.?0\.?attn2\.?to_k\.?weight$")
TRANSFORMER_BLOCK = re.compile(r"\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight$")
LATENT_CHANNELS, INPAINTING_CHANNELS = 4, 9
XL_WIDTH, REFINER_CHANNELS = 2048, 384
XL_LAST_BLOCK = 9  # index of the last block of the deepest transformers; smaller distilled versions have fewer
XL_MARKS_OF_EDM = ("edm_mean", "edm_vpred.sigma_max")
XL_BASE = "a base model of Stable Diffusion XL such as sd_xl_base_1.0.safetensors"


def identify_family(shapes: Shapes) -> Family | None:
    """Return the kind of model that has weights of these names and shapes, or None if it is unknown."""
    if addition := first_match(shapes, ADDITIONS):
        return addition
    if any(UNET.match(key) for key in shapes):
        return _identify_unet(shapes)
    return (_identify_conditioned(shapes) or first_match(shapes, TRANSFORMERS) or _identify_first_stage(shapes)
            or first_match(shapes, OTHERS))


def context_width(shapes: Shapes) -> int | None:
    """Return the width of the encodings that cross-attention reads, or None if there is no cross-attention."""
    for key, shape in shapes.items():
        if CONTEXT_KEYS.search(key) and len(shape) == 2:
            return shape[1]
    return None


def family_of_width(width: int) -> Family:
    """Return the kind of model whose cross-attention reads encodings of this width."""
    return _identify_by_context(width)


def _identify_unet(shapes: Shapes) -> Family:
    # Only this project folds pixels into channels before its first stage.
    if _input_channels(shapes, "first_stage_model.encoder.conv_in.weight", default=3) > 3:
        return Family("a base model of this project", "use configs/perfusion.yaml")
    if any(VIDEO.search(key) for key in shapes):
        return Family("a video model (Stable Video Diffusion or similar)", UNSUPPORTED, Role.OTHER)
    width = context_width(shapes)
    if width is None:
        return Family("a latent diffusion model without cross-attention", OTHER_CONFIGS)
    first = next((shape for key, shape in shapes.items() if FIRST_CONVOLUTION.search(key)), (0, 4))
    if first[0] == REFINER_CHANNELS:
        return Family(f"the refiner of Stable Diffusion XL (context {width})",
                      f"it only refines images of the base model; give {XL_BASE}", Role.OTHER)
    channels = first[1]
    if width == XL_WIDTH:
        return _identify_xl(shapes, channels)
    if width in (768, 1024) and channels > 4:
        return Family(f"Stable Diffusion for inpainting, depth or other images ({channels} input channels)",
                      UNSUPPORTED, Role.OTHER)
    if any(key.endswith("cond_stage_model.embedding.weight") for key in shapes):
        return Family(f"a class-conditional latent diffusion model (context {width})",
                      "use configs/latent-diffusion/cin256-v2.yaml")
    return _identify_by_context(width)


def _identify_xl(shapes: Shapes, channels: int) -> Family:
    """Return the kind of a model with the context of Stable Diffusion XL. Not all have its layout or its noise."""
    instead = f"{UNSUPPORTED}; give {XL_BASE}"
    if channels == INPAINTING_CHANNELS:
        return Family(f"Stable Diffusion XL for inpainting ({channels} input channels)",
                      f"{instead}, with which scripts/inpaint.py works, too", Role.OTHER)
    if channels != LATENT_CHANNELS:
        return Family(f"Stable Diffusion XL for instructions or other images ({channels} input channels)", instead,
                      Role.OTHER)
    if any(mark in shapes for mark in XL_MARKS_OF_EDM):
        return Family("Stable Diffusion XL with the noise of EDM (Playground 2.5, CosXL or similar)", instead,
                      Role.OTHER)
    last_block = max((int(match[1]) for key in shapes if (match := TRANSFORMER_BLOCK.search(key))), default=0)
    if 0 < last_block < XL_LAST_BLOCK:
        return Family("a smaller version of Stable Diffusion XL (SSD-1B, Vega, KOALA or similar)", instead, Role.OTHER)
    return _identify_by_context(XL_WIDTH)


def _identify_by_context(width: int) -> Family:
    known = {
        768: Family("Stable Diffusion 1.x (context 768)",
                    "use configs/stable-diffusion/v1-inference.yaml, to train configs/perfusion-sd-v1.yaml"),
        1024: Family("Stable Diffusion 2.x (context 1024)",
                     "use configs/stable-diffusion/v2-inference.yaml if it was made for 512 pixels, "
                     "v2-inference-v.yaml if for 768 (the weights are alike), to train configs/perfusion-sd-v2.yaml"),
        1280: Family("LDM text-to-image 1.4B (context 1280)",
                     "use configs/latent-diffusion/txt2img-1p4B-eval.yaml, to train configs/perfusion-ldm.yaml"),
        2048: Family("Stable Diffusion XL (context 2048)",
                     "use configs/stable-diffusion/sd_xl_base.yaml, to train configs/perfusion-sd-xl.yaml"),
    }
    return known.get(width) or Family(f"a latent diffusion model of context {width}", OTHER_CONFIGS)


def _identify_conditioned(shapes: Shapes) -> Family | None:
    if any(key.startswith("conditioner.") for key in shapes):
        return Family("the text encoders of Stable Diffusion XL alone",
                      f"{WHOLE_MODEL}, and this with --text_encoder", Role.PART)
    return None


def _identify_first_stage(shapes: Shapes) -> Family | None:
    prefixes = ("", "first_stage_model.", "vae.")
    prefix = next((start for start in prefixes if f"{start}decoder.conv_in.weight" in shapes), None)
    if prefix is None:
        return None
    levels = {match[1] for key in shapes if (match := re.match(rf"{prefix}encoder\.down(?:_blocks)?\.(\d+)\.", key))}
    factor = 2 ** (len(levels) - 1)
    channels = _input_channels(shapes, f"{prefix}post_quant_conv.weight", default=0)
    summary = f"f{factor}, {channels} channels"
    if codes := shapes.get(f"{prefix}quantize.embedding.weight"):
        variant = "-n256" if factor == 8 and codes[0] == 256 else ""
        if factor == 4 and f"{prefix}encoder.mid.attn_1.q.weight" not in shapes:
            variant = "-noattn"
        return Family(f"a VQ autoencoder ({summary}, {codes[0]} codes)",
                      f"use models/first_stage_models/vq-f{factor}{variant}/config.yaml", Role.PART)
    config = f"configs/autoencoder/{KL_CONFIGS.get(factor, KL_CONFIGS[8])}.yaml"
    advice = f"use {config}, or {WHOLE_MODEL} (and this with --vae)"
    return Family(f"a KL autoencoder ({summary})", advice, Role.PART)


def _input_channels(shapes: Shapes, key: str, default: int) -> int:
    shape = shapes.get(key, ())
    return shape[1] if len(shape) > 1 else default
