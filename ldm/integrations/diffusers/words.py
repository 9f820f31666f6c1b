"""Put the learned words of concepts into the text encoders of a pipeline, without changing either.

Tokenizers and embedding tables stay as they are. While a prompt is encoded, each placeholder is replaced by a carrier,
a word of the vocabulary that occurs in none of the prompts, and a hook replaces the carrier's embedding. So there is
nothing to resize or to restore, offloaded tables work, and the end token keeps the highest id, by which text encoders
with an old config (`eos_token_id: 2`, as SDXL's second) find it for their pooled vector.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.words import find_words, fold_word, split_at_placeholders
from ldm.concepts.concept import Concept

WORD_END = "</w>"  # marks vocabulary entries that are whole words


class Tower:
    """A text encoder of a pipeline, with its tokenizer.

    Attributes:
        encoder: a CLIP text model of `transformers`; it may be compiled or offloaded.
        tokenizer: its tokenizer.
        width: of the word embeddings.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.width: int = encoder.get_input_embeddings().embedding_dim

    @classmethod
    def all_of(cls, pipe: Any) -> list[Tower]:
        """Return the text encoders of a pipeline, in the order in which it joins their encodings."""
        names = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        return [cls(getattr(pipe, encoder), getattr(pipe, tokenizer)) for encoder, tokenizer in names
                if getattr(pipe, encoder, None) is not None and getattr(pipe, tokenizer, None) is not None]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, without start and end tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    @torch.no_grad()
    def mean_vector(self, words: str) -> Tensor:
        """Return the mean embedding (width,) of the word pieces of a super-category, as one virtual token."""
        pieces = [piece for piece in self.ids([words])[0] if piece != self.tokenizer.unk_token_id]
        table = self.encoder.get_input_embeddings()
        device = "cpu" if table.weight.device.type == "meta" else table.weight.device
        return table(torch.tensor(pieces, device=device)).float().mean(0)


def super_vectors(towers: Sequence[Tower], concept: Concept) -> list[Tensor]:
    """Return the embedding of a concept's super-category in each text encoder."""
    return [tower.mean_vector(concept.super_category) for tower in towers]


def concept_vectors(towers: Sequence[Tower], concept: Concept) -> list[Tensor]:
    """Return the learned embedding of a concept in each text encoder.

    Raises:
        UserError: it has another width than those of the text encoders together.
    """
    widths = [tower.width for tower in towers]
    if concept.embedding.shape[1] != sum(widths):
        raise UserError(f"concept {concept.label} does not fit this pipeline: its embedding has "
                        f"{concept.embedding.shape[1]} numbers, words of its text encoders have "
                        f"{' + '.join(map(str, widths))}; load the model that it was trained on")
    return list(concept.embedding[0].float().split(widths))


def choose_carriers(towers: Sequence[Tower], count: int, texts: Sequence[str]) -> dict[str, int]:
    """Return `count` words of one token each that occur in none of the texts, and their ids.

    The last entries of a vocabulary are the rarest, so they come first.
    """
    tokenizer = towers[0].tokenizer
    used = {token for tower in towers for ids in tower.ids(texts) for token in ids}
    carriers: dict[str, int] = {}
    for token in range(tokenizer.vocab_size - 1, -1, -1):
        entry = tokenizer.convert_ids_to_tokens(token)
        word = entry.removesuffix(WORD_END)
        is_word = entry.endswith(WORD_END) and word.isascii() and word.isalpha()
        if is_word and token not in used and all(tower.ids([word]) == [[token]] for tower in towers):
            carriers[word] = token
            if len(carriers) == count:
                return carriers
    raise UserError(f"the vocabulary of {type(tokenizer).__name__} has no {count} free words for concepts; use a "
                    "pipeline with CLIP's tokenizer")


def replace_placeholders(text: str, placeholders: Sequence[str], carriers: Sequence[str]) -> str:
    """Return the text with the carrier of each placeholder in its place, as a word of its own."""
    parts = split_at_placeholders(text, placeholders)
    return "".join(part if isinstance(part, str) else f" {carriers[part]} " for part in parts)


@contextmanager
def replaced_embeddings(towers: Sequence[Tower], tokens: Sequence[int], vectors: Sequence[Sequence[Tensor]]
                        ) -> Iterator[None]:
    """Replace the embeddings of some tokens while the context manager is open.

    Args:
        towers: T text encoders; the tokens have the same ids in each.
        tokens: J ids.
        vectors: for each token one vector per text encoder.
    """
    with ExitStack() as hooks:
        # Code compiled before does not know the hooks.
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for index, tower in enumerate(towers):
            rows = {token: parts[index] for token, parts in zip(tokens, vectors, strict=True)}
            table: nn.Module = tower.encoder.get_input_embeddings()
            hooks.callback(table.register_forward_hook(_embedding_hook(rows)).remove)
        yield


def _embedding_hook(rows: Mapping[int, Tensor]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        ids = inputs[0].to(embedded.device)
        for token, vector in rows.items():
            embedded = torch.where((ids == token)[..., None], vector.to(embedded), embedded)
        return embedded

    return hook


def find_carriers(tower: Tower, prompts: Sequence[str], tokens: Collection[int]) -> list[list[tuple[int, int]]]:
    """Return the position and the id of each carrier in each prompt.

    Raises:
        UserError: a carrier is in the part of a prompt that the pipeline cuts off.
    """
    room = tower.tokenizer.model_max_length - 2
    found = []
    for ids in tower.ids(prompts):
        found.append([(position, token) for position, token in enumerate(ids) if token in tokens])
        if found[-1] and found[-1][-1][0] >= room:
            raise UserError(f"a prompt with the word of a concept has {len(ids)} tokens, but the text encoder takes "
                            f"{room}, and the word is cut off; shorten the prompt")
    return found


def added_words(towers: Sequence[Tower]) -> set[str]:
    """Return the words, folded, that were added to the tokenizers, as by `load_textual_inversion`."""
    return {fold_word(word) for tower in towers for word in tower.tokenizer.get_added_vocab()}


def names_in_decoded(text: str, placeholders: Sequence[str]) -> list[str]:
    """Return the placeholders in a decoded text, in which the tokenizer has put spaces around punctuation."""
    joined = "".join(fold_word(text).split())
    found = [placeholders[word.index] for word in find_words(text, placeholders)]
    return found + [word for word in placeholders if word.startswith("<") and fold_word(word) in joined]
