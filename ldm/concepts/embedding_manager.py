"""Textual Inversion as the original LDM configs run it (`personalization_config`).

Source: Gal et al., "An Image is Worth One Word" (ICLR 2023, arXiv 2208.01618), Sec. 3, Eq. 2, and its public code,
whose interface this is. A placeholder in a prompt stands for vectors that are trained while all else is frozen.

A text encoder takes the manager as `encoder.encode(prompts, embedding_manager=manager)`. A placeholder that the
vocabulary has as one token, such as "*", is found by this token. Any other word, such as "<my-teddy>", gets a token
past the end of the vocabulary (see `ldm.modules.encoders.prompts`).
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.embedding_file import LearnedWord, load_learned_words, save_learned_words
from ldm.concepts.embedding_insertion import insert_vectors, replace_token
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.placeholders import find_duplicate
from ldm.concepts.storage import TEXTUAL_INVERSION, UNKNOWN_SUPER_CATEGORY, load_concepts, save_concepts
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import PromptEncoder, word_vector

CONCEPT_FILE = ".safetensors"
DEFAULT_PLACEHOLDER_TOKEN = ["*"]
PROGRESSIVE_SCALE = 2000  # calls after which progressive words take one vector more

log = logging.getLogger(__name__)


class EmbeddingManager(nn.Module):
    """Trainable vectors for placeholders, which replace the embeddings of these words.

    Args:
        embedder: the text encoder of the model; the constructor only reads its embedding table.
        placeholder_strings: the words that stand for the vectors; None: "*".
        initializer_words: a plain word for each placeholder; its embedding is the start of the vectors. Placeholders
            without a word start at random numbers from 0 to 1.
        per_image_tokens: whether each training photo has a word of its own in addition.
        num_vectors_per_token: number of vectors that one placeholder stands for.
        progressive_words: whether to begin with one vector, and to use one more after each 2,000 calls.
        embedding_manager_ckpt: a file to continue from (see `load`); None or "": none.
        kwargs: ignored, as the public code ignores them. Configs are checked before.

    Attributes:
        string_to_token_dict: placeholder -> token, a tensor without dimensions.
        string_to_param_dict: placeholder -> vectors (k, width), which are trained.
        initial_embeddings: placeholder -> where its vectors started (k, width), for those with an initializer word.
        max_vectors_per_token: the largest k.
        progressive_counter: number of calls so far, counted per placeholder.

    Raises:
        UserError: two placeholders are equal, a word cannot be a placeholder, or the vocabulary cannot express an
            initializer word.
    """

    def __init__(self, embedder: PromptEncoder, placeholder_strings: Sequence[str] | None = None,
                 initializer_words: Sequence[str] | None = None, per_image_tokens: bool = False,
                 num_vectors_per_token: int = 1, progressive_words: bool = False,
                 embedding_manager_ckpt: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        if kwargs:
            log.warning("EmbeddingManager ignores %s", ", ".join(kwargs))
        words = list(DEFAULT_PLACEHOLDER_TOKEN if placeholder_strings is None else placeholder_strings)
        if per_image_tokens:
            from ldm.data.personalized import per_img_token_list  # reads images, which other managers do not need

            words += per_img_token_list
        self.max_vectors_per_token = num_vectors_per_token
        self.progressive_words = progressive_words
        self.progressive_counter = 0
        self.initializer_words = list(initializer_words or ())
        self._super_categories = dict(zip(words, self.initializer_words, strict=False))
        self._vocabulary_size, self._width = embedder.vocabulary_size, embedder.embedding_width
        self._word_pieces = embedder.word_pieces
        self._unknown_token = embedder.word_tokenizer.unk_token_id

        self.string_to_token_dict: dict[str, Tensor] = {}
        self.string_to_param_dict = nn.ParameterDict()
        self.initial_embeddings = nn.ParameterDict()
        self.register_load_state_dict_pre_hook(_rename_old_keys)
        self.register_load_state_dict_pre_hook(_take_shapes)
        vectors = {}
        for word in _check_words(words):
            if word in self._super_categories:
                vectors[word] = _start(embedder, self._super_categories[word]).repeat(num_vectors_per_token, 1)
                self.initial_embeddings[word] = nn.Parameter(vectors[word].clone(), requires_grad=False)
            else:
                vectors[word] = torch.rand(num_vectors_per_token, self._width).to(embedder.device)
        self._set_words([LearnedWord(word, value) for word, value in vectors.items()])
        if embedder.awaits_weights:
            embedder.register_load_state_dict_post_hook(self._restart)
        if embedding_manager_ckpt:
            self.load(embedding_manager_ckpt)

    @torch.no_grad()
    def _restart(self, embedder: PromptEncoder, _: Any) -> None:
        """Move vectors that have not been trained yet to their words in the weights that were loaded just now."""
        for word, start in self.initial_embeddings.items():
            untrained = word in self.string_to_param_dict and torch.equal(self.string_to_param_dict[word], start)
            if untrained and start.shape[1] == self._width:
                start.copy_(_start(embedder, self._super_categories[word]).expand_as(start))
                self.string_to_param_dict[word].copy_(start)

    def _set_words(self, words: Sequence[LearnedWord]) -> None:
        """Replace placeholders, tokens and vectors."""
        self.string_to_token_dict, self.string_to_param_dict = {}, nn.ParameterDict()
        for word in words:
            known = word.token is not None and word.token < self._vocabulary_size
            token = torch.tensor(word.token) if known else self.get_token_for_string(word.word)
            self.string_to_token_dict[word.word] = token
            self.string_to_param_dict[word.word] = nn.Parameter(word.vectors)

    def get_token_for_string(self, word: str) -> Tensor:
        """Return the token of a word, or the next one past the vocabulary if the word is not exactly one token."""
        pieces = self._word_pieces(word)
        if len(pieces) == 1 and pieces[0] != self._unknown_token:
            return torch.tensor(pieces[0])
        return torch.tensor(self._vocabulary_size + len(self.new_words))

    @property
    def placeholders(self) -> list[str]:
        """The words that stand for vectors."""
        return list(self.string_to_token_dict)

    @property
    def new_words(self) -> list[str]:
        """The placeholders whose tokens are past the end of the vocabulary, in the order of these tokens."""
        tokens = {word: int(token) for word, token in self.string_to_token_dict.items()}
        return [word for word in sorted(tokens, key=tokens.__getitem__) if tokens[word] >= self._vocabulary_size]

    def forward(self, tokenized_text: Tensor, embedded_text: Tensor) -> Tensor:
        """Replace the embeddings of placeholders by their vectors.

        Args:
            tokenized_text: tokens (B, N).
            embedded_text: their embeddings (B, N, width); not modified.

        Returns:
            (B, N, width). A placeholder of several vectors moves what follows to the right; what no longer fits is cut
            off.

        Raises:
            UserError: the vectors have another width than the embeddings.
        """
        tokens, embedded = tokenized_text, embedded_text
        for word, token in self.string_to_token_dict.items():
            self._check_width(word, embedded)
            vectors = self.string_to_param_dict[word].to(embedded)[:self._count_vectors()]
            if len(vectors) == 1:
                embedded = replace_token(tokens, embedded, int(token), vectors)
            else:
                tokens, embedded = insert_vectors(tokens, embedded, int(token), vectors)
        return embedded

    def _check_width(self, word: str, embedded: Tensor) -> None:
        width = self.string_to_param_dict[word].shape[1]
        if width != embedded.shape[-1]:
            raise UserError(f"the vectors of {word} have width {width}, and the words of this model "
                            f"{embedded.shape[-1]}; choose the model that they were trained on")

    def _count_vectors(self) -> int:
        """Return how many vectors of a placeholder this call may use."""
        if not self.progressive_words or self.max_vectors_per_token == 1:
            return self.max_vectors_per_token
        self.progressive_counter += 1
        return 1 + self.progressive_counter // PROGRESSIVE_SCALE

    # What training reads.

    def embedding_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the vectors of each placeholder."""
        return self.string_to_param_dict.parameters()

    def get_embedding_norms_squared(self) -> Tensor:
        """Return the squared length of each vector of all placeholders, (number of vectors,)."""
        return torch.cat(list(self.string_to_param_dict.values())).square().sum(-1)

    def embedding_to_coarse_loss(self) -> Tensor:
        """Return D D^T (k, k), averaged over placeholders, for the differences D (k, width) of vectors and their start.

        Only placeholders with an initializer word count; without any, the result is 0.
        """
        losses = []
        for word, start in self.initial_embeddings.items():
            if word in self.string_to_param_dict:
                difference = self.string_to_param_dict[word] - start
                losses.append(difference @ difference.T / len(self.initial_embeddings))
        return torch.stack(losses).sum(0) if losses else torch.zeros(())

    # Files.

    def save(self, ckpt_path: str | Path, base: str = "", steps: int = 0) -> Path:
        """Write all placeholders to a file. The file is complete or not written at all.

        Args:
            ckpt_path: the file; an existing one is replaced. `.safetensors` is a concept file, which the generation
                scripts read; any other suffix is the format of the public code (`ldm.concepts.embedding_file`).
            base: `base_fingerprint` of the U-Net that the vectors were trained with; for concept files.
            steps: number of training steps; for concept files.
        """
        if Path(ckpt_path).suffix != CONCEPT_FILE:
            return save_learned_words(ckpt_path, self.string_to_token_dict, self.string_to_param_dict)
        concepts = []
        for placeholder, vectors in self.string_to_param_dict.items():
            concepts.append(FinetunedConcept(
                method=TEXTUAL_INVERSION,
                placeholder=placeholder,
                super_category=self._super_categories.get(placeholder, UNKNOWN_SUPER_CATEGORY),
                vectors=vectors.detach(),
                parameter_count=vectors.numel(),
                steps=steps,
                base=base,
            ))
        return save_concepts(ckpt_path, concepts, precision=None)

    def load(self, ckpt_path: str | Path) -> None:
        """Replace placeholders and vectors by those of a file: one that `save` or the public code wrote.

        As in the public code, the width of vectors in a public file matters only when they are used.

        Raises:
            UserError: the file is missing, of another kind, or a concept for a text encoder of another width.
        """
        is_concept_file = Path(ckpt_path).suffix == CONCEPT_FILE
        words = _load_concept_file(ckpt_path) if is_concept_file else dict.fromkeys(load_learned_words(ckpt_path))
        if is_concept_file and any(word.vectors.shape[1] != self._width for word in words):
            raise UserError(f"{ckpt_path}: its vectors are not of width {self._width}, unlike the words of this "
                            "model; choose the model that it was trained on")
        old = next(iter(self.string_to_param_dict.values()))
        _check_words([word.word for word in words])
        self._super_categories |= {word.word: category for word, category in words.items() if category is not None}
        self.max_vectors_per_token = max([self.max_vectors_per_token, *(len(word.vectors) for word in words)])
        self._set_words([LearnedWord(word.word, word.vectors.to(old), word.token) for word in words])


def _load_concept_file(path: str | Path) -> dict[LearnedWord, str]:
    """Return the placeholders of a concept file with their super-categories."""
    concepts = load_concepts(path)
    if any(not isinstance(concept, FinetunedConcept) or concept.method != TEXTUAL_INVERSION for concept in concepts):
        raise UserError(f"{path}: not learned by Textual Inversion; choose another file")
    return {LearnedWord(concept.placeholder, concept.vectors): concept.super_category for concept in concepts}


def _check_words(words: Sequence[str]) -> list[str]:
    """Return the placeholders; raise UserError if there are none, two are equal, or one cannot name a parameter."""
    words = list(words)
    if not words or find_duplicate(words) is not None:
        raise UserError(f"placeholder_strings {words}: give one or more different words (case is ignored)")
    attributes = nn.ParameterDict()
    for word in words:
        if not word or "." in word or hasattr(attributes, word):
            raise UserError(f"placeholder {word!r} cannot name a parameter; choose another word, such as <my-teddy>")
    return words


def _start(embedder: PromptEncoder, word: str) -> Tensor:
    """Return the start vector (1, width) of an initializer word in float32: its embedding.

    In CLIP, the public code takes the embedding as it is at the first position, and so do we.
    """
    vector = word_vector(embedder, word).detach().float()
    if isinstance(embedder, FrozenCLIPEmbedder):
        vector = vector + embedder.transformer.text_model.embeddings.position_embedding.weight[0].detach().float()
    return vector


def _rename_old_keys(module: EmbeddingManager, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the keys of a checkpoint of earlier versions, which numbered the placeholders."""
    for index, word in enumerate(module.placeholders):
        old = f"{prefix}vectors.{index}"
        if old in state:
            state[f"{prefix}string_to_param_dict.{word}"] = state.pop(old)


def _take_shapes(module: EmbeddingManager, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give vectors the shapes that they have in a checkpoint, which may be of more vectors than the config names."""
    for name in ("string_to_param_dict", "initial_embeddings"):
        vectors = getattr(module, name)
        for word, value in list(vectors.items()):
            stored = state.get(f"{prefix}{name}.{word}", value)
            if stored.shape != value.shape:
                vectors[word] = nn.Parameter(value.new_zeros(stored.shape), requires_grad=value.requires_grad)
                module.max_vectors_per_token = max(module.max_vectors_per_token, len(stored))
