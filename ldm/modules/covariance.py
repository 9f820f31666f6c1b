"""C = E[e e^T], the uncentered covariance of token encodings over a caption corpus, computed once and kept.

Source: Tewel et al., "Key-Locked Rank One Editing for Text-to-Image Personalization" (arXiv 2305.01644), which takes
100,000 LAION captions; the statistic itself is that of Meng et al., "Locating and Editing Factual Associations in
GPT" (arXiv 2202.05262). Symbols as in `ldm.modules.rank_one`.

Our readings:

* Corpus. Captions that come with `open_clip`: ImageNet's 1,000 class names in CLIP's 80 templates. Any text file
  with one caption per line takes its place (see `read_captions`). A text encoder that was trained on few words needs
  captions of its own: measured half-way through the training of the mini world's CLIP (240 of its captions, i* of 24
  kinds, beta 0.75, tau 0.1), the highest gate at another token is 0.16 with its own captions, 0.46 with the default.
* Which tokens count. `TOKENS` names the choices; "words" is the default. In the same trial the similarity at the
  concept's own word is 0.59, 0.60 and 0.64 for "words", "no_padding" and "all", its highest at another word of the
  prompt 0.38, 0.40 and 0.48. Padding is most of "all", so that it calms padding (0.17 instead of 0.29, both far below
  beta) at the expense of telling words apart, which is what the gate is for.
* How many captions. A large text tower without a GPU is slow, so `cached_covariance` takes `LIMIT` of the 80,000,
  evenly spread. In the same trial C is then within 0.34 % of that of all of them, and similarities change by 0.007
  (root mean square, 0.048 at most), little against tau; with 1,024 they change by 0.023, with 256 by 0.041.

File format 1 (safetensors). Tensor `covariance` (d, d) float32: C is a mean of products of encodings that a network
computed in float32 or float16, so more digits than that would be noise, and the ridge of `invert_covariance` lies above
what is rounded off. Metadata key `covariance`, JSON: {"format_version": 1, "source": where the captions are from,
"captions": how many, "tokens": which of `TOKENS`, "encoder": `encoder_fingerprint`}.
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
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.modules.rank_one import RIDGE

log = logging.getLogger(__name__)

TOKENS = {
    "words": "the caption's words: no start, no end, no padding",
    "no_padding": "start, words and the first end token",
    "all": "everything the text encoder gives, padding included",
}
LIMIT = 8192
BATCH_SIZE = 64
FORMAT_VERSION = 1
METADATA_KEY = "covariance"
REMEDY = "compute it with scripts/compute_covariance.py"


class TextEncoder(Protocol):
    """What is needed of a text encoder; `ldm.modules.encoders.modules.FrozenCLIPEmbedder` is one."""

    tokenizer: Any
    max_length: int

    def tokenize(self, prompts: Sequence[str]) -> Tensor: ...

    def encode_tokens(self, tokens: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Estimate:
    """A covariance and what it was estimated from.

    Attributes:
        covariance: C, (d, d) float64 on the CPU.
        captions: how many were used.
        skipped: how many have more tokens than the text encoder takes.
        tokens: how many encodings were averaged over.
    """

    covariance: Tensor
    captions: int
    skipped: int
    tokens: int


def default_captions(limit: int | None = None) -> list[str]:
    """80,000 captions: ImageNet's class names in CLIP's zero-shot templates, or `limit` of them, evenly spread."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    captions = [template(name) for name in IMAGENET_CLASSNAMES for template in OPENAI_IMAGENET_TEMPLATES]
    return evenly_spread(captions, limit)


def default_source() -> str:
    """What the default captions are called in files; another release of `open_clip` may have others."""
    return f"ImageNet names in CLIP templates, open_clip {version('open_clip_torch')}"


def evenly_spread(captions: Sequence[str], limit: int | None) -> list[str]:
    """The first `limit` of the captions in an order in which every beginning is spread over the whole list.

    Steps of the golden ratio's length visit each caption once and leave no large gap at any point, and unlike equal
    steps they do not keep hitting the same template of a list that goes through its templates in turn.
    """
    total = len(captions)
    if limit is None or limit >= total:
        return list(captions)
    step = next(n for n in range(round(total * (math.sqrt(5) - 1) / 2), 2 * total) if math.gcd(n, total) == 1)
    return [captions[number * step % total] for number in range(limit)]


def read_captions(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank, without white space around them.

    Raises:
        UserError: the file is missing, no text, or holds no caption.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a text file with one caption per line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: not a UTF-8 text file; give one caption per line, saved as UTF-8")
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    if not captions:
        raise UserError(f"{path}: no captions in it; give one per line")
    return captions


def token_covariance(embedder: TextEncoder, captions: Sequence[str], tokens: str = "words",
                     batch_size: int = BATCH_SIZE, progress: bool = True) -> Tensor:
    """C (d, d), float64, on the CPU: `estimate_covariance` without its counts."""
    return estimate_covariance(embedder, captions, tokens, batch_size, progress).covariance


def estimate_covariance(embedder: TextEncoder, captions: Sequence[str], tokens: str = "words",
                        batch_size: int = BATCH_SIZE, progress: bool = True) -> Estimate:
    """The mean of e e^T over the tokens that count, summed in float64.

    Args:
        embedder: the text encoder, in evaluation mode, on any device.
        captions: prompts in plain words; those too long for the encoder are left out, and how many is logged.
        tokens: which tokens of a caption count, a key of `TOKENS`.
        batch_size: captions encoded at a time.
        progress: show a bar, if stderr is a terminal.

    Raises:
        UserError: an unknown choice of tokens, no token to count, or encodings that are not finite.
    """
    if tokens not in TOKENS:
        raise UserError(f"tokens {tokens!r}: give one of {', '.join(TOKENS)}")
    pieces = _pieces_that_fit(embedder, captions)
    skipped = len(captions) - len(pieces)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with torch.inference_mode(), tqdm(total=len(pieces), desc="covariance", unit=" captions",
                                      disable=None if progress else True) as bar:
        for batch, words in _batches(embedder, pieces, batch_size, tokens):
            rows = _counted_encodings(embedder, batch, words, tokens)
            total = total + (rows.mT @ rows).cpu()
            count += len(rows)
            bar.update(len(batch))
    if not count:
        raise UserError(f"no token to estimate a covariance from in {len(captions)} captions ({skipped} have more than "
                        f"{embedder.max_length - 2}); give others")
    if skipped:
        log.warning("%d of %d captions left out: more than %d tokens", skipped, len(captions), embedder.max_length - 2)
    if not total.isfinite().all():
        raise UserError("the text encoder gives numbers that are not finite; load undamaged weights, in float32")
    return Estimate(total / count, len(pieces), skipped, count)


def _pieces_that_fit(embedder: TextEncoder, captions: Sequence[str]) -> list[list[int]]:
    """The word pieces of each caption that is short enough, shortest first so that batches are of similar lengths."""
    if not captions:
        return []
    encoded = embedder.tokenizer(list(captions), add_special_tokens=False, verbose=False)["input_ids"]
    return sorted((row for row in encoded if len(row) <= embedder.max_length - 2), key=len)


def _batches(embedder: TextEncoder, pieces: list[list[int]], size: int, choice: str
             ) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (B, N) and how many of them are words (B,).

    What follows the last token that counts is left out where it has no say: N is then the longest of a batch, and
    without end tokens where only words count.
    """
    start, end, *padding = embedder.tokenize([""])[0].tolist()
    rows = [[start, *row, end] for row in pieces]
    trim = bool(rows) and choice != "all" and not _reads_ahead(embedder, rows[0], padding)
    for first in range(0, len(rows), size):
        batch = rows[first:first + size]
        length = len(batch[-1]) - (choice == "words") if trim else embedder.max_length
        tokens = torch.tensor([(row + padding[:length - len(row)])[:length] for row in batch])
        yield tokens, torch.tensor([len(row) - 2 for row in batch])


def _reads_ahead(embedder: TextEncoder, row: list[int], padding: list[int]) -> bool:
    """Whether encodings depend on the padding that follows: in a causal tower such as CLIP's they do not."""
    whole = row + padding[:embedder.max_length - len(row)]
    alone, padded = (embedder.encode_tokens(torch.tensor([tokens])).float() for tokens in (row, whole))
    return bool((alone - padded[:, :len(row)]).norm() > 1e-2 * alone.norm())


def _counted_encodings(embedder: TextEncoder, tokens: Tensor, words: Tensor, choice: str) -> Tensor:
    """The encodings that count, (n, d) float64, on the embedder's device unless that knows no float64."""
    encoding = embedder.encode_tokens(tokens)
    place = torch.arange(tokens.shape[1])
    first, last = {"words": (1, words), "no_padding": (0, words + 1), "all": (0, words + len(place))}[choice]
    counts = (place >= first) & (place <= last[:, None])
    rows = encoding[counts.to(encoding.device)]
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def condition_number(covariance: Tensor, ridge: float = RIDGE) -> float:
    """Largest over smallest eigenvalue of what `invert_covariance` inverts: C (d, d) with its ridge."""
    values = _eigenvalues(covariance, ridge)
    return float(values[-1] / values[0])


def mean_energy(covariance: Tensor, ridge: float = RIDGE) -> float:
    """E ||e||^2 over the corpus, tr(C^-1 C): a measure of selectivity, at most d, less where the ridge covers C.

    The root mean square over the corpus of the similarity to i* is at most 1 / ||i*||, since
    E[<i*, e>^2] = i*^T C^-1 C C^-1 i* <= ||i*||^2. So the higher the energy, the closer to 0 is s of unrelated tokens.
    """
    plain, raised = (_eigenvalues(covariance, amount) for amount in (0.0, ridge))
    return float((plain / raised).sum())


def _eigenvalues(covariance: Tensor, ridge: float) -> Tensor:
    """(d,) float64, ascending: those of C with the ridge of `invert_covariance`."""
    exact = covariance.detach().to("cpu").double()
    return torch.linalg.eigvalsh((exact + exact.mT) / 2) + ridge * exact.diagonal().mean()


def encoder_fingerprint(embedder: TextEncoder) -> str:
    """sha256 of the word table and all other weights of a text encoder, and of the layer its encodings are taken from.

    Weights are hashed as float16, so an encoder has the same fingerprint on any device, and whether it was loaded from
    its 16-bit or its 32-bit file; under the names of `state_dict`, which no release of `transformers` changes. Weights
    that encodings do not depend on (the encoder's `unread_keys`) do not count: some files lack them.
    """
    unread = getattr(embedder, "unread_keys", ())
    digest = hashlib.sha256(f"layer {getattr(embedder, 'layer_idx', None)}".encode())
    for name, weight in sorted(embedder.state_dict().items()):
        if weight.is_floating_point() and not name.startswith(unread):
            half = weight.detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{name} {tuple(half.shape)}".encode())
            digest.update(half.numpy())
    return digest.hexdigest()


def save_covariance(path: str | Path, covariance: Tensor, *, source: str, captions: int, tokens: str,
                    encoder: str) -> Path:
    """Writes C (d, d) as float32 and what it belongs to (see the file format above), whole or not at all."""
    belongs = {"format_version": FORMAT_VERSION, "source": source, "captions": captions, "tokens": tokens,
               "encoder": encoder}
    return save_tensors(path, {"covariance": covariance.float()}, {METADATA_KEY: belongs})


def load_covariance(path: str | Path, fingerprint: str | None = None) -> Tensor:
    """C (d, d), float32, on the CPU, from a file that `save_covariance` wrote.

    Args:
        path: the file.
        fingerprint: `encoder_fingerprint` of the encoder it will be used with; None: taken as it is.

    Raises:
        UserError: no such file, no covariance in it, or one of another text encoder.
    """
    tensors, metadata = load_tensors(path)
    covariance, belongs = tensors.get("covariance"), metadata.get(METADATA_KEY)
    if covariance is None or not isinstance(belongs, dict) or belongs.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no covariance file of format {FORMAT_VERSION}; {REMEDY}")
    if covariance.ndim != 2 or len(covariance) != covariance.shape[1] or not covariance.isfinite().all():
        raise UserError(f"{path}: damaged, its covariance is no square matrix of finite numbers; {REMEDY}")
    if fingerprint is not None and belongs.get("encoder") != fingerprint:
        raise UserError(f"{path}: the covariance of text encoder {str(belongs.get('encoder'))[:12]}, but the loaded "
                        f"one is {fingerprint[:12]}; {REMEDY}")
    return covariance.float()


def cached_covariance(embedder: TextEncoder, cache_dir: str | Path | None = None,
                      captions: Sequence[str] | None = None, tokens: str = "words", batch_size: int = BATCH_SIZE,
                      progress: bool = True) -> Tensor:
    """C (d, d), float32, on the CPU: computed the first time, read from a file from then on.

    Args:
        embedder: the text encoder.
        cache_dir: folder of the files; None: $PERFUSION_CACHE, or ~/.cache/perfusion.
        captions: the corpus; None: `LIMIT` of the default captions.
        tokens, batch_size, progress: as for `estimate_covariance`.

    Raises:
        UserError: as for `estimate_covariance`. A broken cache file is no error, it is written again.
    """
    encoder = encoder_fingerprint(embedder)
    source = f"{LIMIT} {default_source()}" if captions is None else f"captions {_digest(captions)}"
    key = _digest([encoder, source, tokens, str(embedder.max_length)])
    path = _cache_folder(cache_dir) / f"covariance-{key[:32]}.safetensors"
    if path.is_file():
        try:
            return load_covariance(path, encoder)
        except UserError as error:
            log.warning("%s: now computed again", error)
    corpus = default_captions(LIMIT) if captions is None else captions
    log.info("covariance of %d captions: computed once and kept as %s", len(corpus), path)
    found = estimate_covariance(embedder, corpus, tokens, batch_size, progress)
    try:
        save_covariance(path, found.covariance, source=source, captions=found.captions, tokens=tokens, encoder=encoder)
    except (UserError, OSError, SafetensorError) as error:
        log.warning("the covariance is not kept (%s); set PERFUSION_CACHE to a folder that can be written to", error)
    return found.covariance.float()


def _cache_folder(given: str | Path | None) -> Path:
    return Path(given or os.environ.get("PERFUSION_CACHE") or Path.home() / ".cache" / "perfusion").expanduser()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
