"""Which model a set of weights belongs to, told by its keys and shapes, and which config describes that model."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

CONFIGS_OF_KL = {4: "autoencoder_kl_64x64x3", 8: "autoencoder_kl_32x32x4", 16: "autoencoder_kl_16x16x16",
                 32: "autoencoder_kl_8x8x64"}
NO_BASE = "give the checkpoint of the base model that it was made for"
THEIR_CONFIGS = "use its config, such as those in configs/latent-diffusion/ and models/ldm/"
UNSUPPORTED = "this project does not draw with that kind of model"
LORA = re.compile(r"lora_(up|down|A|B|unet|te)|[._]lora\.|hada_w1|lokr_w1")
UNET = re.compile(r"(model\.)?(diffusion_model\.)?input_blocks\.")
OTHER_FAMILIES = re.compile(r"(joint|double|single)_blocks\.|double_stream|transformer_blocks\.\d+\.attn\.to_q")
WIDTHS_OF_WORDS = (768, 1024, 1280)


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: what it is called, with what tells it apart.
        advice: which config describes it, or what to give in its stead.
    """

    name: str
    advice: str


def identify_family(shapes: Shapes) -> Family | None:
    """The kind of model that has weights of these names and shapes; None where nothing tells."""
    if addition := _addition(shapes):
        return addition
    if any(UNET.match(key) for key in shapes):
        return _unet(shapes)
    return _other(shapes) or _first_stage(shapes) or _clip(shapes)


def _addition(shapes: Shapes) -> Family | None:
    """What is used along with a base model, not in its stead."""
    if any(key.endswith(".target_input") for key in shapes) and any(key.endswith(".super_input") for key in shapes):
        return Family("a concept of this project", f"give it with --concept, and here {NO_BASE}")
    if any(LORA.search(key) for key in shapes):
        return Family("a LoRA", NO_BASE)
    if any(key.startswith("control_model.") or "controlnet_" in key or "zero_convs." in key for key in shapes):
        return Family("a ControlNet", NO_BASE)
    if 0 < len(shapes) <= 4 and all(len(s) in (1, 2) and s[-1] in WIDTHS_OF_WORDS for s in shapes.values()):
        return Family("a Textual Inversion embedding", NO_BASE)
    return None


def _unet(shapes: Shapes) -> Family:
    if _inputs(shapes, "first_stage_model.encoder.conv_in.weight", usual=3) > 3:  # folded pixels: nobody else does so
        return Family("a base model of this project", "use configs/perfusion.yaml")
    width = _context(shapes)
    if width is None:
        return Family("a latent diffusion model without cross-attention", THEIR_CONFIGS)
    if any(key.startswith("conditioner.") for key in shapes) or width == 2048:
        return Family(f"Stable Diffusion XL (context {width})", UNSUPPORTED)
    channels = _inputs(shapes, "model.diffusion_model.input_blocks.0.0.weight", usual=4)
    if width in (768, 1024) and channels > 4:
        return Family(f"Stable Diffusion for inpainting, depth or other pictures ({channels} input channels)",
                      UNSUPPORTED)
    return _of_context(width, any(key.endswith("cond_stage_model.embedding.weight") for key in shapes))


def _of_context(width: int, by_class: bool) -> Family:
    if by_class:
        return Family(f"a class-conditional latent diffusion model (context {width})",
                      "use configs/latent-diffusion/cin256-v2.yaml")
    known = {
        768: Family("Stable Diffusion 1.x (context 768)",
                    "use configs/stable-diffusion/v1-inference.yaml, to teach configs/perfusion-sd-v1.yaml"),
        1024: Family("Stable Diffusion 2.x (context 1024)",
                     "use configs/stable-diffusion/v2-inference.yaml if it was made for 512 pixels, "
                     "v2-inference-v.yaml if for 768 (its weights do not tell), to teach configs/perfusion-sd-v2.yaml"),
        1280: Family("LDM text-to-image 1.4B (context 1280)",
                     "use configs/latent-diffusion/txt2img-1p4B-eval.yaml, to teach configs/perfusion-ldm.yaml"),
    }
    return known.get(width) or Family(f"a latent diffusion model of context {width}", THEIR_CONFIGS)


def _other(shapes: Shapes) -> Family | None:
    if any(key.startswith("conditioner.") for key in shapes):
        return Family("Stable Diffusion XL", UNSUPPORTED)
    if any(OTHER_FAMILIES.search(key) for key in shapes):
        return Family("a diffusion transformer (Stable Diffusion 3, Flux or their kin)", UNSUPPORTED)
    return None


def _first_stage(shapes: Shapes) -> Family | None:
    place = next((start for start in ("", "first_stage_model.") if f"{start}decoder.conv_in.weight" in shapes), None)
    if place is None:
        return None
    levels = {found[1] for key in shapes if (found := re.match(rf"{place}encoder\.down\.(\d+)\.", key))}
    factor, channels = 2 ** (len(levels) - 1), _inputs(shapes, f"{place}post_quant_conv.weight", usual=0)
    what = f"f{factor}, {channels} channels"
    if codes := shapes.get(f"{place}quantize.embedding.weight"):
        variant = "-n256" if factor == 8 and codes[0] == 256 else ""
        if factor == 4 and f"{place}encoder.mid.attn_1.q.weight" not in shapes:
            variant = "-noattn"
        return Family(f"a VQ autoencoder ({what}, {codes[0]} codes)",
                      f"use models/first_stage_models/vq-f{factor}{variant}/config.yaml")
    config = f"configs/autoencoder/{CONFIGS_OF_KL.get(factor, CONFIGS_OF_KL[8])}.yaml"
    return Family(f"a KL autoencoder ({what})", f"use {config}, or give a whole model's checkpoint")


def _clip(shapes: Shapes) -> Family | None:
    if any(key.startswith(("vision_model.", "visual.", "text_model.", "clip.")) for key in shapes):
        return Family("a CLIP", "give a whole model's checkpoint")
    return None


def _context(shapes: Shapes) -> int | None:
    """The width of the encodings that cross-attention reads; None where there is no cross-attention."""
    return next((shape[1] for key, shape in shapes.items()
                 if key.endswith("transformer_blocks.0.attn2.to_k.weight") and len(shape) == 2), None)


def _inputs(shapes: Shapes, key: str, usual: int) -> int:
    shape = shapes.get(key, ())
    return shape[1] if len(shape) > 1 else usual
