"""Estimate C = E[e e^T], the uncentered covariance of token encodings over a caption corpus, and cache it in a file.

Source: Tewel et al., "Key-Locked Rank One Editing for Text-to-Image Personalization" (arXiv 2305.01644), which uses
100,000 LAION captions. The statistic is from Meng et al., "Locating and Editing Factual Associations in GPT"
(arXiv 2202.05262). Symbols as in `ldm.modules.rank_one`.

C belongs to a text encoder, not to a diffusion model or a concept. `cached_covariance` computes it once per encoder,
corpus and choice of tokens, and stores it in `$PERFUSION_CACHE`, by default `~/.cache/perfusion`.
`scripts/compute_covariance.py` computes one from other captions.

Our readings where the paper leaves something open:

* Corpus. We use captions that come with `open_clip`: ImageNet's 1,000 class names in CLIP's 80 templates. Any text file
  with one caption per line can replace them (see `read_captions`). A text encoder that was trained on few words needs
  captions of its own. Measured half-way through the training of the mini world's CLIP (240 of its captions, i* of 24
  kinds of subjects, beta 0.75, tau 0.1): the highest gate at another token is 0.16 with its own captions and 0.46 with
  the default ones.
* Which tokens count. `TOKENS` lists the choices; "words" is the default. In the same measurement, the similarity at the
  concept's own word is 0.59, 0.60 and 0.64 for "words", "no_padding" and "all", and the highest similarity at another
  word of the prompt is 0.38, 0.40 and 0.48. Most tokens of "all" are padding. It therefore lowers the similarity of
  padding (0.17 instead of 0.29, both far below beta), but separates words less well, which is the gate's purpose.
* How many captions. A large text encoder is slow without a GPU, so `cached_covariance` uses `LIMIT` of the 80,000,
  spread evenly. In the same measurement, C is then within 0.34 % of the C of all captions, and similarities change by
  0.007 (root mean square; at most 0.048), which is little compared to tau. With 1,024 captions they change by 0.023,
  with 256 by 0.041.

* Two text encoders, as in Stable Diffusion XL. Their encodings are concatenated, and so C also has the covariance
  between them. They are taken before the final norm: outliers and the start token are then large. Measured with two
  trained encoders of the mini world in that form (width 128 + 128, one with outputs eight times as large as the other,
  3,000 captions, 4 prompts for each of its kinds): the ridge of `invert_covariance` may be smaller but not larger. The
  highest gate at another word of the prompt is 0.14, 0.17, 0.22 and 0.24 for ridges of 1e-6, 1e-4, 1e-3 and 1e-2, and
  if the second encoder's outputs are ten times as large, 0.14, 0.24 and 0.65 for 1e-6, 1e-4 and 1e-2: the ridge is
  relative to the mean diagonal, which the larger outputs dominate. With the start token in C ("no_padding") it is 0.22
  in place of 0.17 at 1e-4. So both defaults stay. Encoders of random weights separate words badly whatever the ridge is
  (0.90 to 0.95). We had no access to the public weights to repeat this with them.

File format 1 (safetensors). Tensor `covariance`: C, (d, d) float32. C is a mean of products of encodings that a network
computed in float32 or float16. More digits would be noise, and the rounding is below the ridge of `invert_covariance`.
Metadata key `covariance`, JSON: {"format_version": 1, "source": where the captions are from, "captions": how many,
"tokens": one of `TOKENS`, "encoder": `encoder_fingerprint`}.
"""
from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.common.progress import show_progress
from ldm.common.text_files import read_text, split_lines
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.rank_one import RIDGE, invert_covariance

log = logging.getLogger(__name__)

TOKENS = {
    "words": "the caption's words: no start, no end, no padding",
    "no_padding": "start, words and the first end token",
    "all": "everything the text encoder outputs, including padding",
}
LIMIT = 8192
BATCH_SIZE = 64
FORMAT_VERSION = 1
METADATA_KEY = "covariance"
CAPTIONS_TO_CHECK = 64  # by which it is seen whether C describes the outputs of a text encoder
MOST_ENERGY = 4.0
REMEDY = "compute it with scripts/compute_covariance.py"


# Captions


def default_captions(limit: int | None = None) -> list[str]:
    """Return ImageNet's class names in CLIP's zero-shot templates, 80,000 captions or `limit` of them.

    Args:
        limit: number of captions, spread evenly (see `spread_evenly`); None: all.
    """
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    captions = [template(name) for name in IMAGENET_CLASSNAMES for template in OPENAI_IMAGENET_TEMPLATES]
    return spread_evenly(captions, limit)


def default_source() -> str:
    """Return the name of the default captions in files; another release of `open_clip` may have other captions."""
    return f"ImageNet names in CLIP templates, open_clip {version('open_clip_torch')}"


def spread_evenly(captions: Sequence[str], limit: int | None) -> list[str]:
    """Return `limit` of the captions, spread evenly over the list. A larger limit only adds captions.

    The captions are visited in steps of the golden ratio times their number. Such steps visit each caption once and
    leave no large gap at any limit. Unlike equal steps, they do not hit the same template again and again in a list
    that repeats its templates.
    """
    total = len(captions)
    if limit is None or limit >= total:
        return list(captions)
    # The smallest step from the golden ratio upwards that shares no factor with the total, so it visits every caption.
    step = round(total * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, total) != 1:
        step += 1
    return [captions[index * step % total] for index in range(limit)]


def read_captions(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 text file, without surrounding white space and blank lines.

    Raises:
        UserError: the file is missing, is not text, or has no caption in it.
    """
    text = read_text(path, str(path), "one caption per line")
    captions = [line.strip() for line in split_lines(text) if line.strip()]
    if not captions:
        raise UserError(f"{path}: no captions in it; give one per line")
    return captions


# Estimation


@dataclass(frozen=True)
class CovarianceEstimate:
    """A covariance and the data it was estimated from.

    Attributes:
        covariance: C, (d, d) float64 on the CPU.
        captions: number of captions used.
        skipped: number of captions left out because the text encoder cannot take so many tokens.
        tokens: number of encodings averaged over.
    """

    covariance: Tensor
    captions: int
    skipped: int
    tokens: int


def token_covariance(embedder: PromptEncoder, captions: Sequence[str], tokens: str = "words",
                     batch_size: int = BATCH_SIZE, progress: bool = True) -> Tensor:
    """Return C, (d, d) float64 on the CPU: `estimate_covariance` without its counts."""
    return estimate_covariance(embedder, captions, tokens, batch_size, progress).covariance


def estimate_covariance(embedder: PromptEncoder, captions: Sequence[str], tokens: str = "words",
                        batch_size: int = BATCH_SIZE, progress: bool = True) -> CovarianceEstimate:
    """Average e e^T over the tokens that count, with sums in float64.

    Args:
        embedder: the text encoder, in evaluation mode, on any device.
        captions: prompts in plain words. Those too long for the encoder are left out, and their number is logged.
        tokens: which tokens of a caption count, a key of `TOKENS`.
        batch_size: number of captions encoded at a time.
        progress: show how far it is.

    Raises:
        UserError: `tokens` is unknown, no token counts, or encodings are not finite.
    """
    if tokens not in TOKENS:
        raise UserError(f"tokens {tokens!r}: give one of {', '.join(TOKENS)}")
    pieces = _tokenize_short(embedder, captions)
    skipped = len(captions) - len(pieces)

    # Sum e e^T over all batches.
    total, count = torch.zeros((), dtype=torch.float64), 0
    bar = show_progress(total=len(pieces), description="covariance", unit="captions", leave=True, enabled=progress)
    with torch.inference_mode(), bar:
        for batch, word_counts in _batches(embedder, pieces, batch_size, tokens):
            rows = _counted_encodings(embedder, batch, word_counts, tokens)
            total = total + (rows.mT @ rows).cpu()
            count += len(rows)
            bar.update(len(batch))

    room = embedder.max_length - 2
    if not count:
        raise UserError(f"no token to estimate a covariance from in {len(captions)} captions ({skipped} have more than "
                        f"{room}); give others")
    if skipped:
        log.warning("%d of %d captions left out: more than %d tokens", skipped, len(captions), room)
    if not total.isfinite().all():
        raise UserError("the text encoder returns numbers that are not finite; load undamaged weights, in float32")
    return CovarianceEstimate(total / count, len(pieces), skipped, count)


def _tokenize_short(embedder: PromptEncoder, captions: Sequence[str]) -> list[list[int]]:
    """Return the word pieces of each caption that fits, shortest first, so that batches have similar lengths."""
    if not captions:
        return []
    encoded = embedder.word_tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]
    return sorted((row for row in encoded if len(row) <= embedder.max_length - 2), key=len)


def _batches(embedder: PromptEncoder, pieces: list[list[int]], batch_size: int, choice: str
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens (B, N) of captions and their numbers of words (B,).

    Tokens after the last one that counts are left out if they cannot influence the encodings. N is then the length of
    the longest caption of the batch, without end tokens if only words count.
    """
    start, end, *padding = embedder.tokenize([""])[0].tolist()
    rows = [[start, *row, end] for row in pieces]
    trim = bool(rows) and choice != "all" and not _reads_ahead(embedder, rows[0], padding)
    for first in range(0, len(rows), batch_size):
        batch = rows[first:first + batch_size]
        length = embedder.max_length
        if trim:
            length = len(batch[-1]) - 1 if choice == "words" else len(batch[-1])
        tokens = torch.tensor([(row + padding[:length - len(row)])[:length] for row in batch])
        yield tokens, torch.tensor([len(row) - 2 for row in batch])


def _reads_ahead(embedder: PromptEncoder, row: list[int], padding: list[int]) -> bool:
    """Return whether encodings depend on the padding after them. In a causal encoder such as CLIP's they do not."""
    padded_row = row + padding[:embedder.max_length - len(row)]
    alone = embedder.encode_tokens(torch.tensor([row])).float()
    padded = embedder.encode_tokens(torch.tensor([padded_row])).float()
    return bool((alone - padded[:, :len(row)]).norm() > 1e-2 * alone.norm())


def _counted_encodings(embedder: PromptEncoder, tokens: Tensor, word_counts: Tensor, choice: str) -> Tensor:
    """Encode tokens (B, N) and return the encodings that count, (n, d) float64, on a device that supports float64."""
    encoding = embedder.encode_tokens(tokens)

    # A caption is: start at 0, words at 1 ... word_counts, end at word_counts + 1, padding.
    position = torch.arange(tokens.shape[1])
    if choice == "words":
        first, last = 1, word_counts
    elif choice == "no_padding":
        first, last = 0, word_counts + 1
    else:
        first, last = 0, word_counts + len(position)
    counts = (position >= first) & (position <= last[:, None])

    rows = encoding[counts.to(encoding.device)]
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


# Diagnostics


def condition_number(covariance: Tensor, ridge: float = RIDGE) -> float:
    """Return the ratio of the largest to the smallest eigenvalue of the ridged C, which `invert_covariance` inverts.

    Args:
        covariance: C, (d, d).
        ridge: as for `invert_covariance`.
    """
    values = _eigenvalues(covariance, ridge)
    return float(values[-1] / values[0])


def mean_energy(covariance: Tensor, ridge: float = RIDGE) -> float:
    """Return E ||e||^2 over the corpus, tr(C^-1 C), a measure of selectivity: at most d, less if the ridge hides C.

    The root mean square of the similarity to i* over the corpus is at most 1 / ||i*||, since
    E[<i*, e>^2] = i*^T C^-1 C C^-1 i* <= ||i*||^2. So the higher the energy, the closer s is to 0 for unrelated tokens.

    Args:
        covariance: C, (d, d).
        ridge: as for `invert_covariance`.
    """
    plain, ridged = (_eigenvalues(covariance, amount) for amount in (0.0, ridge))
    return float((plain / ridged).sum())


def _eigenvalues(covariance: Tensor, ridge: float) -> Tensor:
    """Return the eigenvalues of C with the ridge of `invert_covariance`, (d,) float64, ascending."""
    exact = covariance.detach().to("cpu").double()
    return torch.linalg.eigvalsh((exact + exact.mT) / 2) + ridge * exact.diagonal().mean()


# Files


def encoder_fingerprint(embedder: PromptEncoder) -> str:
    """Return the SHA-256 of a text encoder: its weights, and the layer that encodings are taken from.

    Weights are hashed as float16, so the fingerprint is the same on any device, and for the 16-bit and the 32-bit file
    of an encoder. Their names in `state_dict` are hashed, too; no release of `transformers` changes them. Weights that
    encodings do not depend on (`unread_keys` of the encoder) are skipped, since some files lack them.
    """
    unread, layer = tuple(getattr(embedder, "unread_keys", ())), getattr(embedder, "layer_idx", None)
    if hasattr(embedder, "towers"):  # several text encoders, which come first among the embedders
        layer = [getattr(tower, "layer_idx", None) for tower in embedder.towers]
        for index, tower in enumerate(embedder.towers):
            unread += tuple(f"embedders.{index}.{key}" for key in getattr(tower, "unread_keys", ()))
    digest = hashlib.sha256(f"layer {layer}".encode())
    for name, weight in sorted(embedder.state_dict().items()):
        if weight.is_floating_point() and not name.startswith(unread):
            half = weight.detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{name} {tuple(half.shape)}".encode())
            digest.update(half.numpy())
    return digest.hexdigest()


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
