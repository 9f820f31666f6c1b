"""Files of covariances, and the cache of those that are computed on the way.

`cached_covariance` computes the C of a text encoder once for each corpus and choice of tokens, and stores it in
`$PERFUSION_CACHE`, by default `~/.cache/perfusion`.

File format 1 (safetensors). Tensor `covariance`: C, (d, d) float32. C is a mean of products of encodings that a network
computed in float32 or float16. More digits would be noise, and the rounding is below the ridge of `invert_covariance`.
Metadata key `covariance`, JSON: {"format_version": 1, "source": where the captions are from, "captions": how many,
"tokens": one of `TOKENS`, "encoder": `encoder_fingerprint`}.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.modules.covariance import (
    BATCH_SIZE,
    LIMIT,
    default_captions,
    default_source,
    encoder_fingerprint,
    estimate_covariance,
    token_covariance,
)
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.rank_one import invert_covariance

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
METADATA_KEY = "covariance"
CAPTIONS_TO_CHECK = 64  # by which it is seen whether C describes the outputs of a text encoder
MOST_ENERGY = 4.0
REMEDY = "compute it with scripts/compute_covariance.py"


def save_covariance(path: str | Path, covariance: Tensor, *, source: str, captions: int, tokens: str,
                    encoder: str) -> Path:
    """Write C to a file in float32, with its origin. The file is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        covariance: C, (d, d).
        source: name of the captions' source.
        captions: number of captions.
        tokens: which tokens counted, a key of `TOKENS`.
        encoder: `encoder_fingerprint` of the text encoder.
    """
    origin = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "captions": captions,
        "tokens": tokens,
        "encoder": encoder,
    }
    return save_tensors(path, {"covariance": covariance.float()}, {METADATA_KEY: origin})


def load_covariance(path: str | Path, fingerprint: str | None = None) -> Tensor:
    """Load C from a file that `save_covariance` wrote.

    Args:
        path: the file.
        fingerprint: `encoder_fingerprint` of the text encoder it will be used with; None: do not check.

    Returns:
        (d, d) float32, on the CPU.

    Raises:
        UserError: the file is missing, holds no covariance, or one of another text encoder.
    """
    tensors, metadata = load_tensors(path)
    covariance, origin = tensors.get("covariance"), metadata.get(METADATA_KEY)
    if covariance is None or not isinstance(origin, dict) or origin.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a covariance file of format {FORMAT_VERSION}; {REMEDY}")
    if covariance.ndim != 2 or len(covariance) != covariance.shape[1] or not covariance.isfinite().all():
        raise UserError(f"{path}: damaged, its covariance is not a square matrix of finite numbers; {REMEDY}")
    if fingerprint is not None and origin.get("encoder") != fingerprint:
        raise UserError(f"{path}: the covariance of text encoder {str(origin.get('encoder'))[:12]}, but the loaded "
                        f"one is {fingerprint[:12]}; {REMEDY}")
    return covariance.float()


def load_covariance_for(path: str | Path, embedder: PromptEncoder) -> Tensor:
    """Load C for a text encoder, as `load_covariance` does.

    The encoder may have other weights than the one that C was estimated with, such as the same in another precision,
    if C describes its outputs: those of a few captions then have the energy that is expected.

    Raises:
        UserError: as for `load_covariance`.
    """
    fingerprint = encoder_fingerprint(embedder)
    try:
        return load_covariance(path, fingerprint)
    except UserError:
        covariance = load_covariance(path)  # raises again unless it is of another text encoder
        if not _describes_outputs(covariance, embedder):
            raise
    return covariance


def _describes_outputs(covariance: Tensor, embedder: PromptEncoder) -> bool:
    """Return whether tr(C^-1 C') / d of the covariance C' of a few captions is near 1.

    For the mini model it is 1.7, for a fine-tune of its text encoder by 10 % 1.9, and for another one 463.
    """
    few = token_covariance(embedder, default_captions(CAPTIONS_TO_CHECK), progress=False)
    if few.shape != covariance.shape:
        return False
    energy = float((few * invert_covariance(covariance).double().cpu()).sum()) / len(few)
    return 1 / MOST_ENERGY < energy < MOST_ENERGY


def cached_covariance(embedder: PromptEncoder, cache_dir: str | Path | None = None,
                      captions: Sequence[str] | None = None, tokens: str = "words", batch_size: int = BATCH_SIZE,
                      progress: bool = True) -> Tensor:
    """Return C of a text encoder: estimated the first time, and loaded from a cache file after that.

    Args:
        embedder: the text encoder.
        cache_dir: folder of the cache files; None: $PERFUSION_CACHE, or ~/.cache/perfusion.
        captions: the corpus; None: `LIMIT` of the default captions.
        tokens, batch_size, progress: as for `estimate_covariance`.

    Returns:
        (d, d) float32, on the CPU.

    Raises:
        UserError: as for `estimate_covariance`. A broken cache file is not an error: it is replaced.
    """
    # One file per text encoder, corpus, choice of tokens and prompt length.
    encoder = encoder_fingerprint(embedder)
    source = f"{LIMIT} {default_source()}" if captions is None else f"captions {_digest(captions)}"
    key = _digest([encoder, source, tokens, str(embedder.max_length)])
    path = _cache_folder(cache_dir) / f"covariance-{key[:32]}.safetensors"
    if path.is_file():
        try:
            return load_covariance(path, encoder)
        except UserError as error:
            log.warning("%s: computing it again", error)

    corpus = default_captions(LIMIT) if captions is None else captions
    log.info("covariance of %d captions: computed once and stored as %s", len(corpus), path)
    estimate = estimate_covariance(embedder, corpus, tokens, batch_size, progress)
    try:
        save_covariance(path, estimate.covariance, source=source, captions=estimate.captions, tokens=tokens,
                        encoder=encoder)
    except (UserError, OSError, SafetensorError) as error:
        log.warning("the covariance is not stored (%s); set PERFUSION_CACHE to a folder that can be written to", error)
    return estimate.covariance.float()


def _cache_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or os.environ.get("PERFUSION_CACHE") or Path.home() / ".cache" / "perfusion").expanduser()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
