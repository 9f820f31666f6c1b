"""Let a CLIP understand the words of concepts, and encode prompts under their edit.

ComfyUI's `CLIP` holds a tokenizer and a text encoder, and hands both on to its clones. Two wrappers take their place:
the tokenizer's puts the learned vector where a prompt names a concept, and the encoder's packs the edit beside the
encoding (see `edit`). So every node that encodes text with this CLIP knows the words, also after nodes that load LoRAs
or choose a layer.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .concept_file import TOWERS, Concept, check_words
from .edit import pack
from .errors import PerfusionError
from .sampling import ENTRY
from .words import markers, replace_words

Sections = list[list[tuple[Any, ...]]]  # tokens of a prompt in sections of 77: (token or vector, weight, ...) each
PREFIX = "clip_"  # of text encoders' names, which tokens have without it


class Delegate:
    """An object that is another one in all that it does not define itself."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "original":  # not yet there while it is copied
            raise AttributeError(name)
        return getattr(self.original, name)


class ConceptTokenizer(Delegate):
    """A tokenizer of ComfyUI that knows the words of concepts.

    Args:
        original: the tokenizer that it wraps.
        concepts: with different words.
    """

    def __init__(self, original: Any, concepts: Sequence[Concept]) -> None:
        super().__init__(original)
        self.concepts = list(concepts)

    def tokenize_with_weights(self, text: str, *args: Any, **options: Any) -> dict[str, Sections]:
        """Tokenize a prompt; where it names a concept, the token is the concept's vector of that text encoder."""
        # Words that the tokenizer keeps in one piece stand for the concepts, so that weights and sections of 77 tokens
        # come out as for any word.
        tower = next(iter(self.concepts[0].vectors))
        stand_ins = markers(getattr(self.original, tower).tokenizer, text, len(self.concepts))
        names, indices = list(stand_ins), {token: index for index, token in enumerate(stand_ins.values())}
        marked = replace_words(text, [concept.word for concept in self.concepts], names.__getitem__)
        tokens = self.original.tokenize_with_weights(marked, *args, **options)

        def vector_of(key: str, token: Any) -> Any:
            index = indices.get(token) if isinstance(token, int) else None
            return token if index is None else self.concepts[index].vectors[PREFIX + key]

        return {key: _map_tokens(sections, lambda token, key=key: vector_of(key, token))
                for key, sections in tokens.items()}


class ConceptEncoder(Delegate):
    """A text encoder of ComfyUI that encodes prompts under the edit of concepts.

    Args:
        original: the encoder that it wraps.
        tokenizer: the tokenizer without concepts.
        concepts: with the biases and temperatures to use.
        global_locking: take the keys of a whole prompt from the prompt with the super-categories in place of concepts.
    """

    def __init__(self, original: Any, tokenizer: Any, concepts: Sequence[Concept], global_locking: bool = False
                 ) -> None:
        super().__init__(original)
        self.tokenizer = tokenizer
        self.concepts = list(concepts)
        self.global_locking = global_locking

    def encode_token_weights(self, tokens: Mapping[str, Sections]) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Encode a prompt.

        Returns:
            The packed encoding (1, N, 3 d + 2 J), the pooled one, and entries for the conditioning.
        """
        acting = self._find_concepts(tokens)
        if acting:
            encoding, pooled, *others = self._encode_edited(tokens, acting)
        else:
            encoding, pooled, *others = self.original.encode_token_weights(tokens)
            encoding = pack(encoding, self.concepts, [])
        entries = {ENTRY: self.concepts}
        return encoding, pooled, {**others[0], **entries} if others else entries

    def _encode_edited(self, tokens: Mapping[str, Sections], acting: Sequence[int]) -> tuple[Any, ...]:
        """Return what `encode_token_weights` returns for a prompt that names concepts."""
        unweighted = {key: _without_weights(sections) for key, sections in tokens.items()}
        encoding, pooled, *others = self.original.encode_token_weights(unweighted)

        # Global locking: the same prompt with super-categories, for the keys
        super_encoding = None
        if self.global_locking:
            super_encoding, *_ = self._encode_supers(unweighted, acting)
        # The pooled encoding reaches SDXL's U-Net without any edit, so concepts lock it to their super-category, too
        locked = [index for index in acting if self.concepts[index].pooled != "concept"]
        if pooled is not None and locked:
            _, pooled, *_ = self._encode_supers(unweighted, locked)

        packed = pack(encoding, self.concepts, acting, super_encoding)
        return self._weighted(packed, tokens), pooled, *others

    def _find_concepts(self, tokens: Mapping[str, Sections]) -> list[int]:
        """Return the indices of the concepts that a prompt names."""
        named = {id(token) for sections in tokens.values() for section in sections for token, *_ in section}
        return [index for index, concept in enumerate(self.concepts)
                if any(id(vector) in named for vector in concept.vectors.values())]

    def _encode_supers(self, tokens: Mapping[str, Sections], indices: Sequence[int]) -> tuple[Any, ...]:
        """Encode a prompt with the super-categories in place of some concepts."""
        vectors: dict[int, Tensor] = {}
        for index in indices:
            concept = self.concepts[index]
            supers = self._super_vectors(concept.super_category)
            vectors |= {id(vector): supers[tower] for tower, vector in concept.vectors.items()}
        return self.original.encode_token_weights(
            {key: _map_tokens(sections, lambda token: vectors.get(id(token), token))
             for key, sections in tokens.items()})

    def _super_vectors(self, super_category: str) -> dict[str, Tensor]:
        """Return the mean embedding of a super-category's word pieces in each text encoder, (width,)."""
        escaped = super_category.replace("(", "\\(").replace(")", "\\)")
        empty = self.tokenizer.tokenize_with_weights("")
        vectors = {}
        for key, sections in self.tokenizer.tokenize_with_weights(escaped).items():
            # A section is: start, word pieces, end, padding.
            end = empty[key][0][1][0]
            _, *tokens = [token for token, *_ in sections[0]]
            table = getattr(self.original, PREFIX + key).transformer.get_input_embeddings()
            pieces = torch.tensor(tokens[:tokens.index(end)], device=table.weight.device)
            vectors[PREFIX + key] = table(pieces, out_dtype=torch.float32).mean(0)
        return vectors

    def _weighted(self, packed: Tensor, tokens: Mapping[str, Sections]) -> Tensor:
        """Apply the weights of tokens as ComfyUI does: move each token away from that of the empty prompt.

        All that is packed is moved, so that a weight acts on keys and values alike; gates are those without a weight.
        """
        weights = {PREFIX + key: [weight for section in sections for _, weight, *_ in section]
                   for key, sections in tokens.items()}
        if all(weight == 1 for of_tower in weights.values() for weight in of_tower):
            return packed
        length, count = packed.shape[1], len(self.concepts)
        empty, *_ = self.original.encode_token_weights(self.tokenizer.tokenize_with_weights(""))
        empty = pack(empty, self.concepts, []).to(packed)
        empty = empty.repeat(1, -(-length // empty.shape[1]), 1)[:, :length]

        # One weight for each text encoder's part of the encoding, and their mean for the gates
        columns = [torch.tensor(weights[tower][:length]).to(packed)[:, None].expand(-1, vector.shape[-1])
                   for tower, vector in self.concepts[0].vectors.items()]
        of_encoding = torch.cat(columns, -1)
        of_gates = torch.stack([column[:, 0] for column in columns]).mean(0)[:, None].expand(-1, 2 * count)
        factor = torch.cat([of_encoding, of_encoding, of_encoding, of_gates], -1)
        return torch.where(factor == 1, packed, empty + factor * (packed - empty))


def _map_tokens(sections: Sections, change: Callable[[Any], Any]) -> Sections:
    return [[(change(token), *others) for token, *others in section] for section in sections]


def _without_weights(sections: Sections) -> Sections:
    return [[(token, 1.0, *others) for token, _, *others in section] for section in sections]


def clip_with_concepts(clip: Any, concepts: Sequence[Concept]) -> Any:
    """Return a clone of a CLIP that knows these concepts, beside those that it knows already.

    Raises:
        PerfusionError: a concept has other text encoders than the CLIP, or has the word of another one.
    """
    encoder, tokenizer = clip.cond_stage_model, clip.tokenizer
    global_locking = False
    if isinstance(encoder, ConceptEncoder):
        concepts = [*encoder.concepts, *concepts]
        global_locking = encoder.global_locking
        encoder, tokenizer = encoder.original, encoder.tokenizer
    check_words(concepts)
    towers = [tower for tower in TOWERS if hasattr(encoder, tower)]
    for concept in concepts:
        if list(concept.vectors) != towers:
            raise PerfusionError(f"concept {concept.label} has a word for {', '.join(concept.vectors)}, but this CLIP "
                                 f"has {', '.join(towers) or 'no text encoder of that kind'}; load a checkpoint of "
                                 "the concept's family")
        for tower, vector in concept.vectors.items():
            width = getattr(encoder, tower).transformer.get_input_embeddings().weight.shape[-1]
            if vector.shape[-1] != width:
                raise PerfusionError(f"concept {concept.label} has a word of {vector.shape[-1]} numbers, but {tower} "
                                     f"of this CLIP reads {width}; load a checkpoint of the concept's family")
    knowing = clip.clone()
    knowing.tokenizer = ConceptTokenizer(tokenizer, concepts)
    knowing.cond_stage_model = ConceptEncoder(encoder, tokenizer, concepts, global_locking)
    return knowing


def with_settings(clip: Any, bias: float | None = None, temperature: float | None = None, word: str = "",
                  global_locking: bool | None = None) -> Any:
    """Return a clone of a CLIP with other settings of its concepts.

    Args:
        clip: from `clip_with_concepts`.
        bias, temperature: of the gates; None: as they are.
        word: of the concept that they are for; empty: all.
        global_locking: see `ConceptEncoder`; None: as it is.

    Raises:
        PerfusionError: the CLIP has no concepts, or none with that word.
    """
    encoder = clip.cond_stage_model
    if not isinstance(encoder, ConceptEncoder):
        raise PerfusionError("this CLIP has no concepts; connect the one of Load Perfusion Concept")
    words = [concept.word for concept in encoder.concepts]
    if word and word.casefold() not in map(str.casefold, words):
        raise PerfusionError(f"no concept has the word {word}; there are {', '.join(words)}")
    changes = {name: value for name, value in (("bias", bias), ("temperature", temperature)) if value is not None}
    concepts = [replace(concept, **changes) if word.casefold() in ("", concept.word.casefold()) else concept
                for concept in encoder.concepts]
    locking = encoder.global_locking if global_locking is None else global_locking
    changed = clip.clone()
    changed.cond_stage_model = ConceptEncoder(encoder.original, encoder.tokenizer, concepts, locking)
    return changed
