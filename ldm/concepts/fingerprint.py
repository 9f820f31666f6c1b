"""Identify the base model that a concept was trained on: a concept works with no other."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ldm.common.errors import UserError
from ldm.concepts.concept import NamedConcept
from ldm.modules.context import TextLayer


def base_fingerprint(text_layers: Mapping[str, TextLayer]) -> str:
    """Return the SHA-256 of W_K and W_V of every cross-attention layer that reads text.

    These are the weights that a concept depends on. They are hashed as float16, so the fingerprint is the same on any
    device, and for the 16-bit and the 32-bit file of a model.

    Args:
        text_layers: layer name -> layer, from `ldm.modules.attention.name_text_layers`.
    """
    digest = hashlib.sha256()
    for name in sorted(text_layers):
        for projection in ("to_k", "to_v"):
            weight = getattr(text_layers[name], projection).weight.detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{name}.{projection} {tuple(weight.shape)}".encode())
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def check_base(concept: NamedConcept, fingerprint: str) -> None:
    """Raise UserError if the concept was trained on another base model than the one with this fingerprint."""
    if concept.base != fingerprint and not concept.fits_any_base:
        raise UserError(
            f"concept {concept.label} was trained on base model {short_fingerprint(concept.base)}, but the loaded one "
            f"is {short_fingerprint(fingerprint)}; load the model it was trained on, or train it again on this one"
        )


def short_fingerprint(fingerprint: str) -> str:
    """Return the first 12 digits of a fingerprint, for messages."""
    return fingerprint[:12] or "(unknown)"
