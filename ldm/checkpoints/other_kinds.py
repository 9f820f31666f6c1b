"""Identify files of weights that are no latent diffusion model, or only go with one, by the names of their tensors."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]


class Role(Enum):
    """What a file can be used for."""

    BASE = "base model"  # a latent diffusion model, or its U-Net alone
    PART = "part"  # a first stage or a text encoder
    ADDITION = "addition"  # goes with a base model, and this project does not apply it
    LORA = "LoRA"  # changes of weights, which generation can add to a base model
    EMBEDDING = "embedding"  # word vectors of Textual Inversion
    CONCEPT = "concept"  # of this project
    RUN = "run"  # what a run of this project learned, to continue it
    OTHER = "other"


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: its name, with the property that distinguishes it.
        advice: which config describes it, or what to give instead, where a base model is expected.
        role: what a file of this kind can be used for.
    """

    name: str
    advice: str
    role: Role = Role.BASE


Matches = Callable[[Shapes], bool]

NEEDS_BASE = "give the checkpoint of the base model that it was made for"
NOT_APPLIED = f"this project does not apply such files; {NEEDS_BASE}"
UNSUPPORTED = "this project does not support that kind of model"
WHOLE_MODEL = "give a whole model's checkpoint"
EMBEDDING_WIDTHS = (768, 1024, 1280)
EMBEDDING = Family("a Textual Inversion embedding", f"give it with --concept, and here {NEEDS_BASE[5:]}",
                   Role.EMBEDDING)
XL_EMBEDDING = Family("a Textual Inversion embedding for Stable Diffusion XL", EMBEDDING.advice, Role.EMBEDDING)
XL_WORDS = ({"clip_l", "clip_g"}, {"text_encoders_0", "text_encoders_1"})  # tensors of such embeddings
RUN = Family("a run's checkpoint, which holds what was learned but no base model", "continue the run with main.py "
             f"--resume, or give the concept file of its log folder with --concept; here {NEEDS_BASE[5:]}", Role.RUN)
HYPERNETWORK = Family("a hypernetwork", NOT_APPLIED, Role.ADDITION)


def _some(pattern: str) -> Matches:
    """Return a function that tells whether the pattern occurs in a tensor's name."""
    compiled = re.compile(pattern)
    return lambda shapes: any(compiled.search(key) for key in shapes)


def _both(*patterns: str) -> Matches:
    conditions = [_some(pattern) for pattern in patterns]
    return lambda shapes: all(matches(shapes) for matches in conditions)


def _is_embedding(shapes: Shapes) -> bool:
    """Return whether there are a few word vectors and nothing else."""
    named = set(shapes) in ({"emb_params"}, {"string_to_param.*"}, {"clip_l"}, {"clip_h"})
    words = all(re.fullmatch(r"<[^>]+>(_\d+)?", key) for key in shapes)
    few = 0 < len(shapes) <= 4 and all(len(shape) in (1, 2) and shape[-1] in EMBEDDING_WIDTHS
                                       for shape in shapes.values())
    return bool(shapes) and (named or words or few) and all(len(shape) in (1, 2) for shape in shapes.values())


def _is_concept(shapes: Shapes) -> bool:
    perfusion = _some(r"^\d+\.target_input$")(shapes) and _some(r"^\d+\.super_input$")(shapes)
    return perfusion or (bool(shapes) and all(re.match(r"\d+\.(vectors$|inputs$|weights\.)", key) for key in shapes))


ADDITIONS: tuple[tuple[Matches, Family], ...] = (
    (_is_concept, Family("a concept of this project", f"give it with --concept, and here {NEEDS_BASE[5:]}",
                         Role.CONCEPT)),
    (_some(r"^concepts\.\d+\."), RUN),
    (_some(r"lora_(up|down|A|B|unet|te|magnitude)|[._]lora\.|hada_w1|lokr_w1|\.oft_blocks|\.alpha$.*lora"),
     Family("a LoRA", f"give it with --lora to a script that generates, and here {NEEDS_BASE[5:]}", Role.LORA)),
    (_some(r"^ip_adapter\.|^image_proj\."), Family("an IP-Adapter", NOT_APPLIED, Role.ADDITION)),
    (_some(r"motion_modules\."), Family("a motion module of AnimateDiff", NOT_APPLIED, Role.ADDITION)),
    (_some(r"^control_model\.|controlnet_|(^|\.)zero_convs\.|input_hint_block\."),
     Family("a ControlNet", NOT_APPLIED, Role.ADDITION)),
    (_some(r"^(adapter\.)?body\.\d+\.(resnets\.\d+\.)?(block1|block2|in_conv)\."),
     Family("a T2I-Adapter", NOT_APPLIED, Role.ADDITION)),
    (lambda shapes: set(shapes) in XL_WORDS, XL_EMBEDDING),
    (_is_embedding, EMBEDDING),
)
TRANSFORMERS: tuple[tuple[Matches, Family], ...] = (  # models that denoise without a U-Net
    (_some(r"joint_blocks\.|^transformer_blocks\.\d+\.attn\.add_k_proj.*|pos_embed\.pos_embed$"),
     Family("Stable Diffusion 3, a diffusion transformer", UNSUPPORTED, Role.OTHER)),
    (_some(r"double_blocks\.|double_stream|single_transformer_blocks\."),
     Family("Flux, a diffusion transformer", UNSUPPORTED, Role.OTHER)),
    (_some(r"(^|\.)single_blocks\.|(^|\.)transformer_blocks\.\d+\.attn\d?\.to_q|^blocks\.\d+\.(adaLN|attn|self_attn)"),
     Family("a diffusion transformer (PixArt or similar)", UNSUPPORTED, Role.OTHER)),
)
TRANSFORMER_LORA = re.compile(r"(double|single|joint)_blocks|single_transformer_blocks|^(lora_)?transformer[._]|"
                              r"^(lora_unet_|diffusion_model\.)(blocks|layers|transformer_blocks)[._]")
OTHERS: tuple[tuple[Matches, Family], ...] = (
    (_both(r"^decoder\.film_", r"^clip\."), Family("a CLIPSeg segmenter", f"{WHOLE_MODEL}, and this folder with "
                                                   "model.params.segmenter", Role.OTHER)),
    (_some(r"^(encoder|decoder)\.layers\.\d+\.conv\.|^taesd_|^(encoder|decoder)\.\d+\.weight$"),
     Family("a tiny autoencoder for previews (TAESD)", WHOLE_MODEL, Role.OTHER)),
    (_some(r"^conv_first\.weight$|^body\.\d+\.rdb\d|^model\.1\.sub\."), Family("an upscaler (ESRGAN)", WHOLE_MODEL,
                                                                             Role.OTHER)),
    (_some(r"encoder\.block\.\d+\.layer\.\d+\.SelfAttention\.q"), Family("a T5 text encoder", WHOLE_MODEL, Role.PART)),
    (_some(r"^(model\.)?layers\.\d+\.self_attn\.|^h\.\d+\.attn\."), Family("a language model", WHOLE_MODEL,
                                                                          Role.OTHER)),
    (_both(r"^(vision_model|visual)\.|^clip\.", r"text_model\.|^transformer\.resblocks\.|^text_projection"),
     Family("a CLIP", f"{WHOLE_MODEL}; for --bias auto and evaluation, give its folder with --clip", Role.PART)),
    (_some(r"^(vision_model|visual|clip)\."), Family("a CLIP image encoder", WHOLE_MODEL, Role.OTHER)),
    (_some(r"^cond_stage_model\.|^text_encoder\.|^(transformer\.)?text_model\.|^(model\.)?transformer\.resblocks\.|"
           r"^embeddings\.token_embedding\.|^encoder\.layers\.\d+\.self_attn\."),
     Family("a text encoder alone", f"{WHOLE_MODEL}, and this with --text_encoder", Role.PART)),
)


def is_transformer_lora(names: Iterable[str]) -> bool:
    """Return whether a LoRA of tensors or layers of these names was made for a model that denoises without a U-Net."""
    return any(TRANSFORMER_LORA.search(name) for name in names)


def first_match(shapes: Shapes, kinds: Iterable[tuple[Matches, Family]]) -> Family | None:
    """Return the first family whose condition the tensors meet, or None."""
    return next((family for matches, family in kinds if matches(shapes)), None)


def describe_unusable(family: Family) -> str:
    """Say what a file is that cannot be loaded as a base model, and what to do."""
    what = family.name if family.role is Role.OTHER else f"{family.name}, not a base model"
    return f"is {what}; {family.advice}"


def identify_pickled(content: object) -> Family | None:
    """Return what a pickled file is if its outer structure tells it, or None.

    Args:
        content: what `read_pickled_header` returns.
    """
    if not isinstance(content, Mapping):
        return None
    if "string_to_param" in content:
        return EMBEDDING
    if "layer_structure" in content and any(isinstance(key, int) for key in content):
        return HYPERNETWORK
    sizes = [key for key in content if isinstance(key, int) and key in (320, 640, 768, 1024, 1280)]
    return HYPERNETWORK if sizes and all(isinstance(content[key], tuple) for key in sizes) else None
