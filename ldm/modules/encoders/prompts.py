"""What all encoders of prompts share: words to numbers, placeholders of concepts among them, and back from vectors."""
from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.words import split_at_placeholders
from ldm.modules.fast.cuda_graphs import GraphedEncoder
from ldm.util import has_trainable_parameters, to_device


class AbstractEncoder(nn.Module):
    """Something that turns a batch of conditions into what the U-Net attends to."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


class PromptEncoder(AbstractEncoder):
    """Prompts to encodings (B, max_length, d), where words may stand that the vocabulary has not got.

    A subclass has a `tokenizer` of `transformers`' kind, a `max_length` and a `token_table`, and says how tokens are
    framed and how their rows of the table become encodings.

    Attributes:
        graphs: what calls `encode_embedded` in its place, see `enable_fast_inference`; None: nothing.
    """

    tokenizer: Any
    max_length: int
    graphs: GraphedEncoder | None = None

    @property
    def token_table(self) -> Tensor:
        """(vocabulary, width): the embedding of every word piece."""
        raise NotImplementedError

    def _frame(self) -> tuple[int, int, int]:
        """The numbers of the tokens that start, end and fill up a prompt."""
        raise NotImplementedError

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        """Encodings (B, N, d) of tokens whose embeddings (B, N, width) are given."""
        raise NotImplementedError

    def _whole_words(self) -> dict[str, int]:
        """Word pieces that are whole words, and their numbers."""
        raise NotImplementedError

    def enable_fast_inference(self) -> None:
        """Makes a frozen encoder on a CUDA device as fast as it can be while vectors are learned, by graphs."""
        self.graphs = GraphedEncoder(self.encode_embedded)

    def freeze(self) -> None:
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PromptEncoder:
        """A frozen encoder stays in evaluation mode."""
        return super().train(mode and has_trainable_parameters(self))

    @property
    def device(self) -> torch.device:
        return self.token_table.device

    def word_pieces(self, text: str) -> list[int]:
        """The numbers of the word pieces of `text`, without start and end."""
        return self.word_pieces_of([text])[0]

    def word_pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for each of several texts; to ask for them one by one takes three times as long."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, without punctuation, that have no piece with a row that training has touched."""
        words = dict.fromkeys(bare for word in text.split() if (bare := word.strip(string.punctuation)))
        untouched = self._untouched_rows()
        untouched[self.tokenizer.unk_token_id] = True
        return [word for word in words if bool(untouched[self.word_pieces(word)].all())]

    def known_words(self) -> list[str]:
        """Every whole word of letters that training has touched, sorted; none where it has touched most of them."""
        untouched = self._untouched_rows()
        if not untouched.any():
            return []
        return sorted(word for word, number in self._whole_words().items() if word.isalpha() and not untouched[number])

    def _untouched_rows(self) -> Tensor:
        """(vocabulary,) booleans: rows that equal most others, as in tables that were trained on few words."""
        table = self.token_table.detach()
        usual = table[::max(1, len(table) // 255)].median(0).values  # column by column that of a row, if most are equal
        untouched = (table == usual).all(1)
        return untouched & (2 * untouched.sum() > len(table))

    def tokenize(self, prompts: Sequence[str], placeholders: Sequence[str] = (),
                 counts: Sequence[int] | None = None) -> Tensor:
        """(B, max_length) numbers of word pieces; placeholders have numbers past the vocabulary's, counted on.

        Without `counts` a placeholder is one token, so that the j-th has the number `vocabulary size + j`; with them
        the j-th is counts[j] tokens in a row.

        Raises:
            UserError: a prompt has more tokens than fit.
        """
        numbers: list[range] = []
        for count in counts or [1] * len(placeholders):
            first = numbers[-1].stop if numbers else len(self.token_table)
            numbers.append(range(first, first + count))
        split = [split_at_placeholders(prompt, placeholders) for prompt in prompts]
        spelt = iter(self.word_pieces_of([part for parts in split for part in parts if isinstance(part, str)]))
        return torch.stack([
            self._row(prompt, [piece for part in parts
                               for piece in (next(spelt) if isinstance(part, str) else numbers[part])])
            for prompt, parts in zip(prompts, split, strict=True)])

    def _row(self, prompt: str, pieces: Sequence[int]) -> Tensor:
        room = self.max_length - 2
        if len(pieces) > room:
            shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
            raise UserError(f"the prompt {shown!r} has {len(pieces)} tokens, but the text encoder takes {room}; "
                            "shorten it")
        start, end, padding = self._frame()
        return torch.tensor([start, *pieces, end, *[padding] * (room - len(pieces))])

    def encode_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Encodings (B, N, d) of tokens (B, N), where numbers past the vocabulary stand for the rows of `vectors`.

        A gradient with respect to `vectors` (J, width) costs no more than they do, and nothing inside the encoder is
        replaced. Tokens are best on the CPU, where they are looked at: another device would have to finish its work
        first.
        """
        table, tokens = self.token_table, tokens.cpu()
        new = tokens >= len(table)
        embedded = nn.functional.embedding(to_device(tokens.masked_fill(new, 0), table.device), table)
        if vectors is not None:
            places = [to_device(place, table.device) for place in new.nonzero(as_tuple=True)]
            instead = vectors.to(table)[to_device(tokens[new] - len(table), table.device)]
            embedded = embedded.index_put(places, instead)
        return (self.graphs or self.encode_embedded)(embedded)

    def forward(self, text: Sequence[str] | str) -> Tensor:
        return self.encode_tokens(self.tokenize([text] if isinstance(text, str) else text))


def word_vector(encoder: PromptEncoder, word: str) -> Tensor:
    """(1, width): the embedding of a word; of several word pieces, the mean of theirs, as one virtual token.

    Raises:
        UserError: the vocabulary has no piece for it.
    """
    pieces = [piece for piece in encoder.word_pieces(word) if piece != encoder.tokenizer.unk_token_id]
    if not pieces:
        raise UserError(f"the super-category {word!r} cannot be expressed in the text encoder's vocabulary; "
                        "give a plain word, such as \"teddy bear\"")
    return encoder.token_table[pieces].mean(0, keepdim=True)


