"""The base class of all text encoders: from prompts, with or without learned words in them, to encodings.

How a prompt reaches a layer
----------------------------
1. `PromptEncoder.tokenize` splits a prompt into word pieces. A placeholder such as `<teddy>` becomes a token index past
   the end of the vocabulary: the j-th placeholder is token V + j for a vocabulary of V word pieces.
2. `PromptEncoder.encode_tokens` looks up the embedding of each token in `token_table`. Where the token is a
   placeholder, it takes the concept's learned vector instead.
3. `PromptEncoder.encode_embedded`, the transformer of a subclass, turns embeddings into encodings e, (B, N, d). Models
   that also read one vector per prompt call `encode_with_pooled`, which returns both.
4. `ldm.modules.edit.Edit.context` computes what the edit needs of e: the gates and e_perp (Eq. 3 of Perfusion).
   The result is a `PromptContext`. Prompts without concepts skip this step, or become a `PromptContext.plain`.
5. `ldm.models.diffusion.wrapper.DiffusionWrapper` passes the context to the U-Net
   (`ldm.modules.diffusionmodules.openaimodel.UNetModel`), which hands it to every cross-attention layer.
6. `ldm.modules.attention.CrossAttention.keys_values` asks the context for the layer's keys and values:
   W e_perp + gate * o*.

`ldm.concepts.prompt_encoder.ConceptPromptEncoder` does steps 1 to 4 when images are generated. The methods of
`ldm.personalization` do them when a concept is trained.
"""
from __future__ import annotations

import logging
import string
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.words import split_at_placeholders
from ldm.modules.fast.cuda_graphs import GraphedEncoder
from ldm.util import has_trainable_parameters, to_device

log = logging.getLogger(__name__)
# Replaces the embeddings of placeholders, given tokens (B, N) and their embeddings (B, N, width): the interface of
# Textual Inversion's embedding manager. `ldm.concepts.embedding_manager.EmbeddingManager` is the one of this package.
EmbeddingManagerLike = Callable[[Tensor, Tensor], Tensor]


class AbstractEncoder(nn.Module):
    """Base class of the modules that turn a batch of conditions into what the U-Net attends to."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


class IdentityEncoder(AbstractEncoder):
    """Return conditions as they are."""

    def forward(self, x: Any) -> Any:
        return x


class OnDeviceOfWeights:
    """Mixin of modules whose inputs go to where the weights are."""

    @property
    def device(self) -> torch.device:
        """The device of the weights. Scripts of the LDM family set it after they moved a model; this is not needed."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: torch.device | str) -> None:
        pass


class PromptEncoder(OnDeviceOfWeights, AbstractEncoder):
    """Base class of text encoders. Prompts may hold placeholders, words that the vocabulary does not have.

    A subclass sets `tokenizer` and `max_length` and implements `token_table`, `word_parts`, `encode_embedded`,
    `_special_tokens` and `_whole_words`. Callers use `vocabulary_size`, `embedding_width` and `embed_pieces` in place
    of the table, because an encoder of several towers has several tables.

    Attributes:
        tokenizer: a tokenizer of `transformers`.
        max_length: N, the number of tokens per prompt, start and end tokens included.
        graphs: runs `encode_embedded` by CUDA graphs; None until `enable_fast_inference` is called.
        awaits_weights: whether the weights are random until a checkpoint is loaded, where the public encoder of this
            name downloads pretrained ones.
        has_pooled: whether `encode_with_pooled` returns a pooled encoding.
        zeroes_unconditional: whether zeros stand for the empty negative prompt, in place of its encoding.

    Example::

        tokens = encoder.tokenize(["a photo of a <teddy>"], placeholders=["<teddy>"])  # (1, N)
        encoding = encoder.encode_tokens(tokens, vectors)  # vectors (1, width), the embedding of <teddy>; to (1, N, d)
    """

    tokenizer: Any
    max_length: int
    graphs: GraphedEncoder | None = None
    awaits_weights = False
    has_pooled = False
    zeroes_unconditional = False
    _warned_of_truncation = False

    # What a subclass implements.

    @property
    def word_tokenizer(self) -> Any:
        """The tokenizer of `transformers`; the same as `tokenizer` in encoders whose public code has that name."""
        return self.tokenizer

    @property
    def token_table(self) -> Tensor:
        """The embedding of every word piece, (V, width)."""
        raise NotImplementedError

    @property
    def word_parts(self) -> dict[str, int]:
        """Name of each tower's word vector in files -> its width, in the order in which vectors join them."""
        raise NotImplementedError

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        """Encode tokens whose embeddings are given: (B, N, width) to (B, N, d)."""
        raise NotImplementedError

    def _special_tokens(self) -> tuple[int, int, int]:
        """Return the indices of the start, end and padding tokens."""
        raise NotImplementedError

    def _whole_words(self) -> dict[str, int]:
        """Return the word pieces that are whole words, with their indices."""
        raise NotImplementedError

    # The table of words, whatever it consists of.

    @property
    def vocabulary_size(self) -> int:
        """V, the number of word pieces. Placeholders have indices from V on."""
        return len(self.token_table)

    @property
    def embedding_width(self) -> int:
        """The width of a word's vector, the sum over `word_parts`."""
        return sum(self.word_parts.values())

    def embed_pieces(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the embeddings (n, embedding_width) of n word pieces."""
        return self.token_table[indices]

    # Prompts to encodings.

    def forward(self, text: Sequence[str] | str, embedding_manager: EmbeddingManagerLike | None = None) -> Tensor:
        """Encode prompts as the public encoders do: what does not fit is cut off, with one logged warning.

        Args:
            text: B prompts, or one.
            embedding_manager: replaces the embeddings of placeholders (Textual Inversion); None: there are none.

        Returns:
            (B, N, d)
        """
        texts = [text] if isinstance(text, str) else text
        new_words = getattr(embedding_manager, "new_words", ())
        return self.encode_managed(self.tokenize(texts, new_words, truncate=True), embedding_manager)

    def encode_managed(self, tokens: Tensor, embedding_manager: EmbeddingManagerLike | None = None) -> Tensor:
        """Encode tokens (B, N), after `embedding_manager` has replaced embeddings, to (B, N, d)."""
        return self._encode_embedded(self.managed_embeddings(tokens, embedding_manager), tokens)

    def managed_embeddings(self, tokens: Tensor, embedding_manager: EmbeddingManagerLike | None = None) -> Tensor:
        """Return the embeddings (B, N, width) of tokens, after `embedding_manager` has replaced some."""
        embedded = self.embed_tokens(tokens)
        return embedded if embedding_manager is None else embedding_manager(to_device(tokens, self.device), embedded)

    def tokenize(self, prompts: Sequence[str | Sequence[str]], placeholders: Sequence[str] = (),
                 counts: Sequence[int] | None = None, truncate: bool = False) -> Tensor:
        """Turn prompts into token indices. Placeholders get indices past the vocabulary, in their order.

        Args:
            prompts: B prompts; one may be given as parts, of which no word piece spans two.
            placeholders: the words of concepts, matched as whole words in any case.
            counts: number of tokens of each placeholder; None: one each. With one each, the j-th placeholder has the
                index V + j. With `counts`, the j-th is a run of counts[j] tokens.
            truncate: whether to cut off what does not fit, and to log a warning the first time.

        Returns:
            (B, N) integers on the CPU, with start, end and padding tokens.

        Raises:
            UserError: if a prompt has more tokens than fit, unless `truncate` is set.
        """
        all_parts = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        pieces_of_parts = iter(self.word_pieces_with(list(chain.from_iterable(all_parts)), placeholders, counts))
        rows = []
        for parts in all_parts:
            pieces = list(chain.from_iterable(islice(pieces_of_parts, len(parts))))
            rows.append(self._pad(self._fit("".join(parts), pieces, truncate)))
        return torch.stack(rows)

    def word_pieces_with(self, texts: Sequence[str], placeholders: Sequence[str] = (),
                         counts: Sequence[int] | None = None) -> list[list[int]]:
        """Return the word pieces of each text, with the tokens of placeholders. Arguments as for `tokenize`."""
        # Give each placeholder its range of indices past the vocabulary.
        indices: list[range] = []
        start = self.vocabulary_size
        for count in counts or [1] * len(placeholders):
            indices.append(range(start, start + count))
            start += count

        # Tokenize what is between placeholders, in all texts in one call.
        split = [split_at_placeholders(text, placeholders) for text in texts]
        between = [part for parts in split for part in parts if isinstance(part, str)]
        pieces_between = iter(self.word_pieces_of(between))

        # Join the pieces of each text again.
        joined = []
        for parts in split:
            pieces: list[int] = []
            for part in parts:
                pieces += next(pieces_between) if isinstance(part, str) else indices[part]
            joined.append(pieces)
        return joined

    def _fit(self, prompt: str, pieces: Sequence[int], truncate: bool) -> Sequence[int]:
        """Return the word pieces of a prompt; if there are too many, raise UserError or cut off the last ones."""
        room = self.max_length - 2
        if len(pieces) <= room:
            return pieces
        shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
        vectors = sum(piece >= self.vocabulary_size for piece in pieces)
        of_concepts = f" ({vectors} of them are vectors of placeholders)" if vectors > 1 else ""
        problem = f"the prompt {shown!r} has {len(pieces)} tokens{of_concepts}, but the text encoder takes {room}"
        if not truncate:
            raise UserError(f"{problem}; shorten it")
        if not self._warned_of_truncation:
            log.warning("%s: the end of this and of other long prompts is cut off", problem)
            self._warned_of_truncation = True
        return pieces[:room]

    def _pad(self, pieces: Sequence[int]) -> Tensor:
        """Return the tokens (N,) of a prompt: start, word pieces, end, padding."""
        start, end, padding = self._special_tokens()
        return torch.tensor([start, *pieces, end, *[padding] * (self.max_length - 2 - len(pieces))])

    def encode_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Encode tokens, of which some may be placeholders.

        Gradients reach `vectors`. They cost no more than the vectors do, and nothing inside the encoder is replaced.

        Args:
            tokens: (B, N), as `tokenize` returns them. Keep them on the CPU: this method inspects them, and on another
                device it would have to wait for earlier work.
            vectors: (J, width), the embeddings of the placeholder tokens V, V + 1, ...; None: there are none.

        Returns:
            (B, N, d)
        """
        return self._encode_embedded(self.embed_tokens(tokens, vectors), tokens)

    def encode_with_pooled(self, tokens: Tensor, vectors: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode tokens as `encode_tokens` does, and each prompt as a whole.

        Returns:
            The encodings (B, N, d), and the pooled encoding (B, m); None for it if the encoder has none.
        """
        return self._encode_with_pooled(self.embed_tokens(tokens, vectors), tokens)

    def encode_unconditional(self) -> tuple[Tensor, Tensor | None]:
        """Return the encoding (1, N, d) and the pooled encoding of the empty negative prompt.

        They are zeros if `zeroes_unconditional`, and those of the prompt "" otherwise.
        """
        encoding, pooled = self.encode_with_pooled(self.tokenize([""]))
        if not self.zeroes_unconditional:
            return encoding, pooled
        return torch.zeros_like(encoding), None if pooled is None else torch.zeros_like(pooled)

    def embed_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Return the embeddings (B, N, width) of tokens. Arguments as for `encode_tokens`."""
        table, tokens = self.token_table, tokens.cpu()
        is_placeholder = tokens >= len(table)
        known_tokens = tokens.masked_fill(is_placeholder, 0)  # any index will do: the next lines replace its embedding
        embedded = nn.functional.embedding(to_device(known_tokens, table.device), table)
        if vectors is None:
            return embedded
        positions = [to_device(indices, table.device) for indices in is_placeholder.nonzero(as_tuple=True)]
        replacements = vectors.to(table)[to_device(tokens[is_placeholder] - len(table), table.device)]
        return embedded.index_put(positions, replacements)

    def _encode_embedded(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """Encode embeddings (B, N, width) of these tokens (B, N), by CUDA graphs if they are enabled."""
        return (self.graphs or self.encode_embedded)(embedded)

    def _encode_with_pooled(self, embedded: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode embeddings (B, N, width) of these tokens (B, N), and each prompt as a whole."""
        return self._encode_embedded(embedded, tokens), None

    # Word pieces and the words that the encoder was trained on.

    def word_pieces(self, text: str) -> list[int]:
        """Return the indices of the word pieces of a text, without start and end tokens."""
        return self.word_pieces_of([text])[0]

    def word_pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the word pieces of several texts; one call is three times as fast as a call for each text."""
        return self.word_tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text, without punctuation, of which no word piece was trained."""
        words = dict.fromkeys(bare for word in text.split() if (bare := word.strip(string.punctuation)))
        untrained = self._untrained_rows()
        untrained[self.word_tokenizer.unk_token_id] = True
        return [word for word in words if bool(untrained[self.word_pieces(word)].all())]

    def known_words(self) -> list[str]:
        """Return every trained word that consists of letters, sorted; an empty list if most rows were trained."""
        untrained = self._untrained_rows()
        if not untrained.any():
            return []
        return sorted(word for word, index in self._whole_words().items() if word.isalpha() and not untrained[index])

    def _untrained_rows(self) -> Tensor:
        """Return a mask (V,) of the rows that equal most others, as in tables that were trained on few words."""
        table = self.token_table.detach()
        # If most rows are equal, the median of each column is that row.
        common_row = table[::max(1, len(table) // 255)].median(0).values
        is_common = (table == common_row).all(1)
        return is_common & (2 * is_common.sum() > len(table))

    # State of the module.

    def freeze(self) -> None:
        """Take all parameters out of training."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PromptEncoder:
        """Set the training mode; a frozen encoder stays in evaluation mode."""
        return super().train(mode and has_trainable_parameters(self))

    def enable_fast_inference(self) -> None:
        """Run a frozen encoder on a CUDA device by CUDA graphs while the vectors of concepts are trained."""
        self.graphs = GraphedEncoder(self.encode_embedded)


def word_vector(encoder: PromptEncoder, word: str) -> Tensor:
    """Return the embedding (1, width) of a word; the mean of its pieces' embeddings if it has several.

    Raises:
        UserError: if the vocabulary has no piece for it.
    """
    pieces = [piece for piece in encoder.word_pieces(word) if piece != encoder.word_tokenizer.unk_token_id]
    if not pieces:
        raise UserError(f"the super-category {word!r} cannot be expressed in the text encoder's vocabulary; "
                        "give a plain word, such as \"teddy bear\"")
    return encoder.embed_pieces(pieces).mean(0, keepdim=True)
