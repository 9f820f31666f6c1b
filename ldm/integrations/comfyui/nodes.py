"""The nodes: Load Perfusion Concept, Perfusion Text Encode and Perfusion Bias."""
from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from .concept_file import load_concepts
from .errors import PerfusionError
from .folders import concept_files, concept_path
from .text import clip_with_concepts, with_settings
from .unet import model_with_concepts

log = logging.getLogger(__name__)

CATEGORY = "perfusion"
OWN = -1.0  # in number fields: the concept's own setting
LOCKS = ("local", "global")
BIAS = {"default": OWN, "min": OWN, "max": 2.0, "step": 0.01, "round": 0.001}
TEMPERATURE = {"default": OWN, "min": OWN, "max": 2.0, "step": 0.01, "round": 0.001}
BIAS_TOOLTIP = ("Threshold of the gate: lower gives more of the concept, higher more of the prompt. Usual are 0.4 to "
                "0.75. -1: each concept's own.")
TEMPERATURE_TOOLTIP = "Softness of the gate; usual are 0.1 to 0.15. -1: each concept's own."
LOCK_TOOLTIP = ("Where keys, which decide on the layout, come from. local: for the word of a concept, from its "
                "super-category. global: for the whole prompt, from the prompt with super-categories; use a bias of "
                "0.4 to 0.6.")


class LoadPerfusionConcept:
    """Adds the concepts of a file to a MODEL and its CLIP."""

    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = (
        "Loads a concept that Perfusion has learned. Prompts then name it by its word, such as <teddy>, in every text "
        "encode node that this CLIP is connected to. Chain several of these nodes for several concepts.")
    FUNCTION: ClassVar[str] = "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("MODEL", "CLIP", "words")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        "The model, which reads prompts with the concept. Connect it to the sampler.",
        "The text encoder, which knows the concept's word. Connect it to all text encode nodes.",
        "The words of the concepts in the file, separated by spaces.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Stable Diffusion 1.x, 2.x or SDXL: the base model of the concept, or a "
                                               "fine-tune of it."}),
                "clip": ("CLIP", {"tooltip": "The text encoder of that model."}),
                "concept": (concept_files(), {"tooltip": "A file in models/perfusion."}),
            },
            "optional": {
                "word": ("STRING", {"default": "", "tooltip": "The word to use in prompts in place of the concept's "
                                                              "own, without spaces. Empty: its own."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, concept: str, **_: Any) -> str:  # noqa: N802 (ComfyUI's name)
        return hashlib.sha256(Path(concept_path(concept)).read_bytes()).hexdigest()

    def load(self, model: Any, clip: Any, concept: str, word: str = "") -> tuple[Any, Any, str]:
        concepts = load_concepts(concept_path(concept))
        word = word.strip()
        if word and (len(concepts) > 1 or len(word.split()) > 1):
            raise PerfusionError(f"{concept} holds {len(concepts)} concepts and the field \"word\" is {word!r}; give "
                                 "one word, for a file with one concept, or leave the field empty")
        if word:
            concepts = [replace(concepts[0], word=word)]
        words = " ".join(loaded.word for loaded in concepts)
        log.info("Perfusion: %s: %s", concept, ", ".join(
            f"{loaded.word} ({loaded.super_category}, bias {loaded.bias:g})" for loaded in concepts))
        return model_with_concepts(model, concepts), clip_with_concepts(clip, concepts), words


class PerfusionTextEncode:
    """Encodes a prompt with settings of the concepts for this prompt."""

    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = (
        "Encodes a prompt that may name concepts, such as \"a <teddy> next to a <teapot>\". As CLIP Text Encode, with "
        "settings of the concepts for this prompt.")
    FUNCTION: ClassVar[str] = "encode"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("CONDITIONING",)
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = ("The encoded prompt, for a sampler whose MODEL has the concepts.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "From Load Perfusion Concept or Perfusion Bias."}),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The prompt."}),
                "bias": ("FLOAT", {**BIAS, "tooltip": f"For all concepts. {BIAS_TOOLTIP}"}),
                "temperature": ("FLOAT", {**TEMPERATURE,
                                          "tooltip": f"For all concepts. {TEMPERATURE_TOOLTIP}"}),
                "lock": (list(LOCKS), {"tooltip": LOCK_TOOLTIP}),
            },
        }

    def encode(self, clip: Any, text: str, bias: float, temperature: float, lock: str) -> tuple[Any]:
        clip = with_settings(clip, *_settings(bias, temperature), global_locking=lock == "global")
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


class PerfusionBias:
    """Sets the gate of one concept."""

    CATEGORY: ClassVar[str] = CATEGORY
    DESCRIPTION: ClassVar[str] = (
        "Sets how readily one concept acts, for all text encode nodes that this CLIP is connected to. Chain several of "
        "these nodes for several concepts.")
    FUNCTION: ClassVar[str] = "set_gate"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("CLIP",)
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = ("The text encoder with this setting.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "From Load Perfusion Concept."}),
                "word": ("STRING", {"default": "", "tooltip": "The concept's word. Empty: all concepts."}),
                "bias": ("FLOAT", {**BIAS, "tooltip": BIAS_TOOLTIP}),
                "temperature": ("FLOAT", {**TEMPERATURE, "tooltip": TEMPERATURE_TOOLTIP}),
            },
        }

    def set_gate(self, clip: Any, word: str, bias: float, temperature: float) -> tuple[Any]:
        return (with_settings(clip, *_settings(bias, temperature), word=word.strip()),)


def _settings(bias: float, temperature: float) -> tuple[float | None, float | None]:
    """Return bias and temperature of number fields, None for the concept's own.

    Raises:
        PerfusionError: the temperature is 0 or between 0 and -1.
    """
    if temperature != OWN and temperature <= 0:
        raise PerfusionError(f"a temperature of {temperature:g} makes no gate; give a number above 0, or -1 for each "
                             "concept's own")
    return None if bias == OWN else bias, None if temperature == OWN else temperature


NODE_CLASS_MAPPINGS = {
    "LoadPerfusionConcept": LoadPerfusionConcept,
    "PerfusionTextEncode": PerfusionTextEncode,
    "PerfusionBias": PerfusionBias,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadPerfusionConcept": "Load Perfusion Concept",
    "PerfusionTextEncode": "Perfusion Text Encode",
    "PerfusionBias": "Perfusion Bias",
}
