"""Write the word of a concept for other tools: the embedding alone, without what Perfusion or another method adds."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.files import SAFETENSORS, save_tensors
from ldm.concepts.concept import BERT
from ldm.concepts.embedding_file import SECOND_FILE, TOKENS, VECTORS
from ldm.concepts.file_tensors import lossless_precision
from ldm.concepts.finetuned_concept import AnyConcept

WEB_UI_TOKEN = {"*": 265}  # what AUTOMATIC1111's web UI writes; it finds words by the name of their file
NO_NAME = re.compile(r"[^\w.-]+")  # what is left out of the names of files


def export_word(concept: AnyConcept, tool: str, folder: Path) -> list[Path]:
    """Write the word of a concept for another tool.

    Args:
        concept: of any method.
        tool: a key of `WRITERS`.
        folder: created if needed; files in it that are called the same are replaced.

    Returns:
        The files: two for diffusers if there are two text encoders.

    Raises:
        UserError: no other tool has the text encoder, or the file cannot be written.
    """
    if BERT in concept.word_parts:
        raise UserError(f"concept {concept.label} is for LDM's text-to-image model, whose text encoder no other tool "
                        "has; export concepts of Stable Diffusion")
    vectors = concept.word_vectors.split(list(concept.word_parts.values()), 1)
    return WRITERS[tool](concept, dict(zip(concept.word_parts, vectors, strict=True)), folder / word_name(concept))


def word_name(concept: AnyConcept) -> str:
    """Return the name of a word's file, by which A1111's web UI and ComfyUI call it in prompts."""
    return NO_NAME.sub("-", concept.placeholder.strip("<>")).strip("-.") or "concept"


def _write_by_encoder(concept: AnyConcept, parts: Mapping[str, Tensor], stem: Path) -> list[Path]:
    return [_save(stem.with_name(stem.name + SAFETENSORS), parts)]


def _write_for_web_ui(concept: AnyConcept, parts: Mapping[str, Tensor], stem: Path) -> list[Path]:
    if len(parts) > 1:
        return _write_by_encoder(concept, parts, stem)
    (vectors,) = parts.values()
    content: dict[str, Any] = {
        TOKENS: WEB_UI_TOKEN, VECTORS: {"*": vectors.clone()}, "name": stem.name, "step": concept.steps,
        "sd_checkpoint": None, "sd_checkpoint_name": concept.base_name or None}
    path = stem.with_name(f"{stem.name}.pt")
    return [write_atomically(path, lambda temporary: torch.save(content, temporary))]


def _write_for_diffusers(concept: AnyConcept, parts: Mapping[str, Tensor], stem: Path) -> list[Path]:
    names = [stem.name, stem.name + SECOND_FILE]
    return [_save(stem.with_name(name + SAFETENSORS), {concept.placeholder: vectors})
            for name, vectors in zip(names, parts.values(), strict=False)]


def _save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    precision = lossless_precision(tensors.values())
    return save_tensors(path, {name: tensor.to(precision) for name, tensor in tensors.items()}, {})


Writer = Callable[[AnyConcept, Mapping[str, Tensor], Path], list[Path]]
WRITERS: Mapping[str, Writer] = {
    "a1111": _write_for_web_ui, "diffusers": _write_for_diffusers, "comfyui": _write_by_encoder}
