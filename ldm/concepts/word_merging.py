"""Combine files of Textual Inversion's public code into one, without changing a number of their vectors."""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, CLIPTokenizer

from ldm.common.errors import UserError
from ldm.common.words import fold_word
from ldm.concepts.embedding_file import LearnedWord, load_learned_words, save_learned_words
from ldm.concepts.placeholders import find_duplicate, is_placeholder
from ldm.modules.encoders.bert import BERT_TOKENIZER
from ldm.modules.encoders.clip import TOKENIZER

BERT_WIDTH = 1280  # of LDM's text-to-image model; the text encoders of Stable Diffusion have 768 and 1024
SPARE_WORDS = tuple("@&%$~^#+=|")  # one token each in CLIP's and in BERT's vocabulary

AskForWord = Callable[[str, Callable[[str], bool]], str | None]


def load_words(paths: Sequence[str | Path]) -> list[tuple[LearnedWord, Path]]:
    """Return the placeholders of all files, each with its file.

    Raises:
        UserError: a file cannot be read, or the vectors are of different widths.
    """
    words = [(word, Path(path)) for path in paths for word in load_learned_words(path)]
    width = words[0][0].vectors.shape[1]
    for word, path in words:
        if len(word.word_parts) > 1:
            raise UserError(f"{path}: has vectors for two text encoders, which this format cannot hold; call the "
                            "output .safetensors")
        if word.vectors.shape[1] != width:
            raise UserError(f"{path}: its vectors have width {word.vectors.shape[1]}, those of {words[0][1]} {width}; "
                            "only files of one text encoder can be combined")
    return words


def tokenizer_for(words: Sequence[LearnedWord], stable_diffusion: bool) -> Any:
    """Return the tokenizer of the text encoder: CLIP's, or BERT's for the width of LDM's text-to-image model."""
    if stable_diffusion or words[0].vectors.shape[1] != BERT_WIDTH:
        return CLIPTokenizer.from_pretrained(TOKENIZER)
    return BertTokenizer.from_pretrained(BERT_TOKENIZER)


def single_token(tokenizer: Any, word: str) -> int | None:
    """Return the token of a word, or None if the vocabulary does not have it as one token."""
    pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
    return pieces[0] if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id else None


def give_distinct_names(words: Sequence[LearnedWord], tokenizer: Any, ask: AskForWord,
                        placeholders: Sequence[str] | None = None) -> list[LearnedWord]:
    """Return the words with different placeholders; vectors stay as they are.

    Args:
        words: in the order of their files; they are not modified.
        tokenizer: of the text encoder.
        ask: called with a placeholder that is taken and a function that tells whether another word may replace it.
            Returns that word, or None to choose a spare one.
        placeholders: a new placeholder for each word; None: only words that are taken get another one.

    Raises:
        UserError: the number of placeholders is wrong, or two are equal, or one is no word, or there is no spare word.
    """
    if placeholders is not None:
        are_words = all(map(is_placeholder, placeholders)) and find_duplicate(placeholders) is None
        if len(placeholders) != len(words) or not are_words:
            raise UserError(f"--placeholders: give {len(words)} different words, one for each placeholder of the files")
        return [word if word.word == name else replace(word, word=name, token=None)
                for word, name in zip(words, placeholders, strict=True)]
    taken: set[str] = set()
    renamed = []
    for word in words:
        if fold_word(word.word) in taken:
            word = replace(word, word=_new_name(word.word, taken, tokenizer, ask), token=None)
        taken.add(fold_word(word.word))
        renamed.append(word)
    return renamed


def _new_name(word: str, taken: Collection[str], tokenizer: Any, ask: AskForWord) -> str:
    """Return another name for a word that is taken: one token of the vocabulary, which public code needs."""

    def fits(name: str) -> bool:
        return fold_word(name) not in taken and single_token(tokenizer, name) is not None

    name = ask(word, fits) or next(filter(fits, SPARE_WORDS), None)
    if name is None:
        raise UserError(f"too many files have the placeholder {word}; name all words with --placeholders")
    return name


def save_words(path: str | Path, words: Sequence[LearnedWord], tokenizer: Any) -> Path:
    """Write words to one file of the public format; those that are no single token get tokens past the vocabulary."""
    tokens, past_end = {}, len(tokenizer)
    for word in words:
        token = word.token if word.token is not None and word.token < len(tokenizer) else None
        token = single_token(tokenizer, word.word) if token is None else token
        if token is None:
            token, past_end = past_end, past_end + 1
        tokens[word.word] = torch.tensor(token)
    return save_learned_words(path, tokens, {word.word: word.vectors for word in words})
