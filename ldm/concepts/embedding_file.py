"""Read and write the files of Textual Inversion's public code (Gal et al., ICLR 2023, arXiv 2208.01618).

The code stores `{"string_to_token": {word: token}, "string_to_param": ParameterDict of word: (k, width)}` by
`torch.save`. Nothing of a file's content is run: the ParameterDict is read by a stand-in.

Relatives of the format can be read too:

    stable-diffusion-webui   plain dictionaries in place of the ParameterDict, or their tensors as safetensors; the word
                             is the file's name. Also within a PNG image
    diffusers                `{word: (width,) or (k, width)}`; for two text encoders a second file, `..._2`
    ComfyUI and others       `{"clip_l": (k, width)}`, for Stable Diffusion XL "clip_g" too; the word is the file's name
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.early_checks import OWN_METADATA, holds_image_embedding
from ldm.checkpoints.families import identify_family
from ldm.checkpoints.header import read_header
from ldm.checkpoints.other_kinds import Role
from ldm.checkpoints.pickled import read_pickled
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_format
from ldm.common.files import load_tensors, write_atomically
from ldm.common.paths import user_path
from ldm.concepts.concept import CLIP_G, CLIP_H, CLIP_L
from ldm.concepts.image_embedding import read_image_embedding

NAMELESS = ("emb_params", "string_to_param.*")  # names of tensors that are no words
TOWERS = {"clip_l": CLIP_L, "text_encoders_0": CLIP_L, "clip_h": CLIP_H, "clip_g": CLIP_G, "text_encoders_1": CLIP_G}
SECOND_FILE = "_2"  # after the name of diffusers' file of the first text encoder
TOKENS, VECTORS = "string_to_token", "string_to_param"


class _ParameterDictState:
    """Stands in for a ParameterDict of a file: stores its parameters, whichever version of torch wrote them."""

    parameters: Mapping[Any, Any] = MappingProxyType({})

    def __setstate__(self, state: Any) -> None:
        self.parameters = state.get("_parameters", {}) if isinstance(state, Mapping) else {}


STAND_INS = {"torch.nn.modules.container.ParameterDict": _ParameterDictState}


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """One placeholder of a file.

    Attributes:
        word: the placeholder.
        vectors: (k, width) on the CPU, in the dtype of the file; of two text encoders, side by side.
        token: its index in the vocabulary of the text encoder; None if the file does not say it.
        word_parts: name of each text encoder -> width of its part of the vectors; empty if the file does not say it.
    """

    word: str
    vectors: Tensor
    token: int | None = None
    word_parts: Mapping[str, int] = field(default_factory=dict)


def load_learned_words(path: str | Path) -> list[LearnedWord]:
    """Return the placeholders of a file, in its order.

    Raises:
        UserError: the file is missing, cut off or of another kind, or has vectors that are not finite.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one that Textual Inversion wrote, such as embeddings.pt")
    content = _read(path)
    if not isinstance(content, Mapping):
        raise _other_kind(path)
    if content and content.keys() <= TOWERS.keys():
        return [_word_of_towers(path, content)]
    vectors, tokens = content.get(VECTORS, content), content.get(TOKENS, {})
    if isinstance(vectors, _ParameterDictState):
        vectors = vectors.parameters
    if not isinstance(vectors, Mapping) or not vectors or not isinstance(tokens, Mapping):
        raise _other_kind(path)
    if list(vectors) == ["*"] and "name" in content:  # of stable-diffusion-webui
        return [LearnedWord(_word_of(path), _check_vectors(path, "*", vectors["*"]))]
    words = [LearnedWord(_check_word(path, word), _check_vectors(path, word, value), _token_of(path, tokens.get(word)))
             for word, value in vectors.items()]
    return [_with_second_tower(path, word) for word in words]


def _read(path: Path) -> Any:
    if holds_image_embedding(path):
        return read_image_embedding(path)
    if check_format(path) is not Format.SAFETENSORS:
        return read_pickled(path, STAND_INS)
    tensors = load_tensors(path)[0]
    return {_word_of(path) if key in NAMELESS else key: value for key, value in tensors.items()}


def _word_of_towers(path: Path, content: Mapping[str, Any]) -> LearnedWord:
    """Return the word of a file that names the text encoders of its tensors, and not the word."""
    parts = {TOWERS[key]: _check_vectors(path, key, content[key]) for key in TOWERS if key in content}
    if len({len(vectors) for vectors in parts.values()}) > 1:
        counts = ", ".join(f"{name} {len(vectors)}" for name, vectors in parts.items())
        raise UserError(f"{path}: has different numbers of vectors for the two text encoders ({counts}); copy or "
                        "download it again")
    widths = {name: vectors.shape[1] for name, vectors in parts.items()}
    return LearnedWord(_word_of(path), torch.cat(list(parts.values()), 1), None, widths)


def _with_second_tower(path: Path, word: LearnedWord) -> LearnedWord:
    """Return a word with the vectors of a second text encoder, if the file beside this one has them."""
    second = path.with_name(f"{path.stem}{SECOND_FILE}{path.suffix}")
    if word.token is not None or not second.is_file():
        return word
    value = _read(second)
    value = value.get(word.word) if isinstance(value, Mapping) else None
    if value is None:
        return word
    vectors = _check_vectors(second, word.word, value)
    if vectors.shape[1] <= word.vectors.shape[1] or len(vectors) != len(word.vectors):
        return word
    widths = {CLIP_L: word.vectors.shape[1], CLIP_G: vectors.shape[1]}
    return replace(word, vectors=torch.cat([word.vectors.to(vectors), vectors], 1), word_parts=widths)


def is_word_file(path: str | Path, metadata: Mapping[str, object]) -> bool:
    """Return whether a safetensors file without metadata of this project holds word vectors alone."""
    header = read_header(user_path(path))
    if header is None or OWN_METADATA & metadata.keys():
        return False
    family = identify_family(header.shapes)
    return family is not None and family.role is Role.EMBEDDING


def save_learned_words(path: str | Path, tokens: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> Path:
    """Write placeholders as the public code does, which can load the file. It is complete or not written at all.

    Args:
        path: the file; an existing one is replaced.
        tokens: word -> its token, a tensor without dimensions.
        vectors: word -> (k, width).
    """
    parameters = nn.ParameterDict()
    for word, value in vectors.items():  # one by one, since a ParameterDict would sort the words of a dictionary
        parameters[word] = nn.Parameter(value.detach().cpu().clone())
    content = {TOKENS: {word: token.cpu().clone() for word, token in tokens.items()}, VECTORS: parameters}
    return write_atomically(path, lambda temporary: torch.save(content, temporary))


def _word_of(path: Path) -> str:
    """Return the word of a file that names none: the file's name."""
    return f"<{'-'.join(path.stem.split()).strip('<>')}>"


def _other_kind(path: Path) -> UserError:
    return UserError(f"{path}: not written by Textual Inversion; choose another file")


def _check_word(path: Path, word: Any) -> str:
    if not isinstance(word, str) or not word:
        raise _other_kind(path)
    return word


def _check_vectors(path: Path, word: str, value: Any) -> Tensor:
    """Return vectors as (k, width); raise UserError if they are none, or not finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        raise _other_kind(path)
    if not value.isfinite().all():
        raise UserError(f"{path}: the vectors of {word} are not finite: training diverged; choose an earlier file")
    return value.detach().reshape(-1, value.shape[-1]).clone()  # the file may be memory-mapped


def _token_of(path: Path, token: Any) -> int | None:
    """Return a token that is stored as a number or as a tensor."""
    if isinstance(token, Tensor) and token.numel() == 1 and not token.is_floating_point():
        return int(token)
    if token is None or isinstance(token, int):
        return token
    raise _other_kind(path)
