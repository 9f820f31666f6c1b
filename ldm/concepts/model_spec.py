"""Metadata of concept files for people and model browsers: the keys `modelspec.*`.

Source: Stability AI, ModelSpec 1.0 (https://github.com/Stability-AI/ModelSpec), which tools for Stable Diffusion read
and write. All values are texts. Nothing here is read again, except the thumbnail: `perfusion` has the settings.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import torch
from torch import Tensor

from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import base_label

VERSION = "1.0.1"
IMPLEMENTATION = "perfusion-ldm"
ARCHITECTURES = {768: "stable-diffusion-v1", 2048: "stable-diffusion-xl-v1-base"}  # by width of the encodings
STABLE_DIFFUSION_2 = {"v": "stable-diffusion-v2-768-v"}  # by prediction type
PREDICTION_TYPES = {"eps": "epsilon", "v": "v"}  # by what a diffusion model of this project predicts
OTHER_ARCHITECTURE = "latent-diffusion"
ADAPTER = "perfusion"
ALONE = " As a plain embedding, it is the word alone, without the edit."
MOST_DESCRIBED = 8  # concepts; of more, the names say enough


def model_spec(concepts: Sequence[Concept], tensors: Mapping[str, Tensor], thumbnail: str = "") -> dict[str, str]:
    """Return the description of a file, by metadata key.

    Args:
        concepts: those of the file, at least one, in order.
        tensors: those of the file.
        thumbnail: see `ldm.concepts.thumbnail`; "": that of a single concept, or none.
    """
    words = ", ".join(concept.placeholder for concept in concepts)
    first = concepts[0]
    described = {
        "sai_model_spec": VERSION,
        "architecture": f"{_architecture(first)}/{ADAPTER}",
        "implementation": IMPLEMENTATION,
        "title": f"Perfusion concept{'s' if len(concepts) > 1 else ''} {words}",
        "description": "; ".join(describe_concept(concept) for concept in concepts[:MOST_DESCRIBED]),
        "trigger_phrase": words,
        "tags": ", ".join(dict.fromkeys(concept.super_category for concept in concepts)),
        "usage_hint": f"Use {words} in prompts." + (ALONE if len(concepts) == 1 else ""),
        "date": max(concept.date for concept in concepts),
        "resolution": first.resolution,
        "prediction_type": first.prediction_type,
        "hash_sha256": f"0x{hash_tensors(tensors)}",
        "thumbnail": thumbnail or (first.thumbnail if len(concepts) == 1 else ""),
    }
    return {f"modelspec.{name}": text for name, text in described.items() if text}


def current_date() -> str:
    """Return today's date in UTC, or that of $SOURCE_DATE_EPOCH if it is set, so that a build can be reproduced."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    return now.date().isoformat()


def describe_concept(concept: Concept) -> str:
    """Return a concept in a line: "<my-teddy>: teddy bear, learned on sd-v1-5 in 400 steps, 16 layers"."""
    return (f"{concept.placeholder}: {concept.super_category}, learned on {base_label(concept)} in {concept.steps} "
            f"steps, {len(concept.target_outputs_v)} layers")


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes in a safetensors file, in its order: wider numbers first, then names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _architecture(concept: Concept) -> str:
    """Return the name of the base model's kind, as the specification's list has it for public models."""
    if concept.context_width == 1024:
        return STABLE_DIFFUSION_2.get(concept.prediction_type, "stable-diffusion-v2-512")
    return ARCHITECTURES.get(concept.context_width, OTHER_ARCHITECTURE)
