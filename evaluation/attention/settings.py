"""Options of `scripts/attention_maps.py`, as plain values. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass

from ldm.inference.settings import GenerationOptions

MIN_STEPS = 3  # one for each group of steps


@dataclass(frozen=True)
class AttentionOptions:
    """Options of the script.

    Attributes:
        prompt: the prompt of all images.
        generation: how to generate, without prompts and concepts.
        concepts: concept files, each of which is used on its own; none: the base model alone.
        labels: a name for each file; None: the method of each.
        word: the word to look at; None: the first placeholder of a file that the prompt names.
        reference: whether to add the base model, with super-categories in place of concepts.
        shown: images of each case that the figure shows, the first ones.
        mask: image file with the mask of all images; None: a segmenter finds the object in each image.
        segmenter: folder or hub name of that CLIPSeg; None: the model's.
    """

    prompt: str
    generation: GenerationOptions
    concepts: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    word: str | None = None
    reference: bool = False
    shown: int = 1
    mask: str | None = None
    segmenter: str | None = None
