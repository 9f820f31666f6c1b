"""Estimate C = E[e e^T], the uncentered covariance of token encodings over a caption corpus.

Source: Tewel et al., "Key-Locked Rank One Editing for Text-to-Image Personalization" (arXiv 2305.01644), which uses
100,000 LAION captions. The statistic is from Meng et al., "Locating and Editing Factual Associations in GPT"
(arXiv 2202.05262). Symbols as in `ldm.modules.rank_one`.

C belongs to a text encoder, not to a diffusion model or a concept. `ldm.modules.covariance_files` stores and caches it.
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
"""
from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.progress import show_progress
from ldm.common.text_files import read_text, split_lines
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.rank_one import RIDGE

log = logging.getLogger(__name__)

TOKENS = {
    "words": "the caption's words: no start, no end, no padding",
    "no_padding": "start, words and the first end token",
    "all": "everything the text encoder outputs, including padding",
}
LIMIT = 8192
BATCH_SIZE = 64


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


# Fingerprint


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
