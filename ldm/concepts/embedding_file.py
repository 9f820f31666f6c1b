"""Read and write the files of Textual Inversion's public code (Gal et al., ICLR 2023, arXiv 2208.01618).

The code stores `{"string_to_token": {word: token}, "string_to_param": ParameterDict of word: (k, width)}` by
`torch.save`. Nothing of a file's content is run: the ParameterDict is read by a stand-in.

Relatives of the format can be read too: plain dictionaries in place of the ParameterDict, as stable-diffusion-webui
writes them; `{word: tensor}`, as in the learned_embeds.bin of diffusers; and safetensors files of either, of which the
former have no word but their file's name.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.early_checks import OWN_METADATA
from ldm.checkpoints.families import identify_family
from ldm.checkpoints.header import read_header
from ldm.checkpoints.other_kinds import Role
from ldm.checkpoints.pickled import read_pickled
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_format
from ldm.common.files import load_tensors, write_atomically
from ldm.common.paths import user_path

NAMELESS = ("emb_params", "clip_l", "string_to_param.*")  # names of tensors that are no words
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
        vectors: (k, width) on the CPU, in the dtype of the file.
        token: its index in the vocabulary of the text encoder; None if the file does not say it.
    """

    word: str
    vectors: Tensor
    token: int | None = None


def load_learned_words(path: str | Path) -> list[LearnedWord]:
    """Return the placeholders of a file, in its order.

    Raises:
        UserError: the file is missing, cut off or of another kind, or has vectors that are not finite.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one that Textual Inversion wrote, such as embeddings.pt")
    if check_format(path) is Format.SAFETENSORS:
        content: Any = {_word_of(path, key): value for key, value in load_tensors(path)[0].items()}
    else:
        content = read_pickled(path, STAND_INS)
    if not isinstance(content, Mapping):
        raise _other_kind(path)
    vectors, tokens = content.get(VECTORS, content), content.get(TOKENS, {})
    if isinstance(vectors, _ParameterDictState):
        vectors = vectors.parameters
    if not isinstance(vectors, Mapping) or not vectors or not isinstance(tokens, Mapping):
        raise _other_kind(path)
    return [LearnedWord(_check_word(path, word), _check_vectors(path, word, value), _token_of(path, tokens.get(word)))
            for word, value in vectors.items()]


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


def _word_of(path: Path, key: str) -> str:
    """Return the word of a tensor in a safetensors file: its name, or the file's if the name is no word."""
    return f"<{'-'.join(path.stem.split())}>" if key in NAMELESS else key


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
