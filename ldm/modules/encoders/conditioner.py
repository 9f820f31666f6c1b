"""Several encoders side by side: the conditioner of Stable Diffusion XL (Podell et al., "SDXL", 2023, Sec. 2).

Two CLIP towers read the same prompt. Their encodings are concatenated on the last axis. The U-Net also reads a vector:
the pooled encoding of the second tower, and features of sizes (`ldm.modules.encoders.sizes`).

Source: Stability-AI/generative-models, `GeneralConditioner`, for names, params and behavior.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.instantiate import EMBEDDER_KEYS
from ldm.modules.context import PromptContext
from ldm.modules.encoders.prompts import EmbeddingManagerLike, PromptEncoder
from ldm.modules.encoders.sizes import SIZE_COLUMNS, ConcatTimestepEmbedderND, default_sizes, sizes_of_batch
from ldm.util import has_trainable_parameters, instantiate_from_config

KINDS = {2: "vector", 3: "crossattn", 4: "concat"}  # number of dimensions of an output -> its name
JOINED_AXES = {"vector": 1, "crossattn": 2, "concat": 1}


class GeneralConditioner(PromptEncoder):
    """Encode a prompt by several embedders, and sizes by others.

    As a `PromptEncoder` it is one text encoder: its word vectors and encodings are those of its towers, concatenated.
    The tokens of a prompt are those of the first tower. Other towers read the same tokens with their own padding.
    Called with a batch, it does what the public class of this name does.

    Args:
        emb_models: configs (`target`, `params`) of embedders, each with its `input_key` or `input_keys` in a batch,
            `is_trainable` (default: false), `ucg_rate`, the share of a batch's outputs that become zero (default: 0),
            and `legacy_ucg_value`, which replaces inputs instead.

    Attributes:
        embedders: all of them, in the order of the config.

    Raises:
        UserError: an entry lacks its input key or has an unknown key, no embedder reads text, or one that does comes
            after others.
    """

    zeroes_unconditional = True

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(_embedder(number, config) for number, config in enumerate(emb_models))
        if not self.towers:
            raise UserError("GeneralConditioner: none of emb_models reads text; give a text encoder first")
        kinds = [isinstance(embedder, PromptEncoder) for embedder in self.embedders]
        if kinds != sorted(kinds, reverse=True):
            raise UserError("GeneralConditioner: text encoders must come before the other embedders in emb_models")
        lengths = {tower.max_length for tower in self.towers}
        if len(lengths) > 1:
            raise UserError(f"GeneralConditioner: text encoders take {' and '.join(map(str, sorted(lengths)))} tokens; "
                            "give them the same max_length")
        self.max_length = lengths.pop()

    # The towers, as one text encoder

    @property
    def towers(self) -> list[PromptEncoder]:
        """The embedders that read text."""
        return [embedder for embedder in self.embedders if isinstance(embedder, PromptEncoder)]

    @property
    def awaits_weights(self) -> bool:
        return any(tower.awaits_weights for tower in self.towers)

    @property
    def has_pooled(self) -> bool:
        return any(tower.has_pooled for tower in self.towers)

    @property
    def tokenizer(self) -> Any:
        return self.towers[0].tokenizer

    @property
    def word_tokenizer(self) -> Any:
        return self.towers[0].word_tokenizer

    @property
    def vocabulary_size(self) -> int:
        return self.towers[0].vocabulary_size

    @property
    def word_parts(self) -> dict[str, int]:
        return {name: width for tower in self.towers for name, width in tower.word_parts.items()}

    def embed_pieces(self, indices: Sequence[int] | Tensor) -> Tensor:
        return torch.cat([tower.embed_pieces(indices) for tower in self.towers], dim=-1)

    def embed_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        parts = [None] * len(self.towers) if vectors is None else self._split(vectors)
        return torch.cat([tower.embed_tokens(self._tokens_of(tower, tokens), part)
                          for tower, part in zip(self.towers, parts, strict=True)], dim=-1)

    def _split(self, vectors: Tensor) -> Sequence[Tensor]:
        """Return each tower's part of word vectors (..., width)."""
        return vectors.split([tower.embedding_width for tower in self.towers], dim=-1)

    def _tokens_of(self, tower: PromptEncoder, tokens: Tensor) -> Tensor:
        """Return tokens (B, N) of the first tower with the padding of another one."""
        end, padding = self._special_tokens()[1:]
        own_padding = tower._special_tokens()[2]
        if own_padding == padding:
            return tokens
        # The first of the last tokens that are alike is the end token if padding equals it.
        trailing = (tokens == padding).flip(1).cumprod(1).flip(1).bool()
        if padding == end:
            trailing = trailing & torch.nn.functional.pad(trailing[:, :-1], (1, 0))
        return tokens.masked_fill(trailing, own_padding)

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        return torch.cat([tower.encode_embedded(part)
                          for tower, part in zip(self.towers, self._split(embedded), strict=True)], dim=-1)

    def _encode_embedded(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([tower._encode_embedded(part, self._tokens_of(tower, tokens))
                          for tower, part in zip(self.towers, self._split(embedded), strict=True)], dim=-1)

    def _encode_with_pooled(self, embedded: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = [tower._encode_with_pooled(part, self._tokens_of(tower, tokens))
                   for tower, part in zip(self.towers, self._split(embedded), strict=True)]
        pooled = [one for _, one in outputs if one is not None]
        return torch.cat([encoding for encoding, _ in outputs], dim=-1), torch.cat(pooled, dim=-1) if pooled else None

    def _special_tokens(self) -> tuple[int, int, int]:
        return self.towers[0]._special_tokens()

    def _whole_words(self) -> dict[str, int]:
        return self.towers[0]._whole_words()

    def _untrained_rows(self) -> Tensor:
        return self.towers[0]._untrained_rows()

    def enable_fast_inference(self) -> None:
        for tower in self.towers:
            tower.enable_fast_inference()

    def train(self, mode: bool = True) -> GeneralConditioner:
        """Set the training mode; embedders that are frozen stay in evaluation mode."""
        super().train(mode)
        for embedder in self.embedders:
            embedder.train(mode and has_trainable_parameters(embedder))
        return self

    # Sizes

    @property
    def size_embedders(self) -> list[ConcatTimestepEmbedderND]:
        """The embedders that read sizes."""
        return [embedder for embedder in self.embedders if embedder.input_key in SIZE_COLUMNS]

    def size_features(self, sizes: Tensor) -> Tensor:
        """Return what the vector holds of sizes, (B, features).

        Args:
            sizes: (B, 6) pixels: height and width of the original, top and left of the crop, height and width of the
                target.
        """
        sizes = sizes.to(self.device)
        return torch.cat([embedder(sizes[:, SIZE_COLUMNS[embedder.input_key]]) for embedder in self.size_embedders], 1)

    def add_sizes(self, context: PromptContext, sizes: Tensor) -> PromptContext:
        """Return the same prompts with the vector of their pooled encodings and of sizes (B, 6)."""
        return replace(context, vector=self.vector(context.pooled, sizes))

    def vector(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Return the vector (B, v) of pooled encodings (B, m) and sizes (B, 6)."""
        return torch.cat([pooled, self.size_features(sizes).to(pooled)], dim=1)

    # Conditions of a `LatentDiffusion`

    @property
    def prompt_key(self) -> str:
        """The key of prompts in a batch."""
        return self.towers[0].input_key

    def condition(self, prompts: Mapping[str, Any] | Sequence[str] | str, image_size: tuple[int, int],
                  embedding_manager: EmbeddingManagerLike | None = None) -> dict[str, Any]:
        """Return what the U-Net reads for prompts, as the samplers of the LDM family take it.

        Args:
            prompts: B prompts; or a batch with prompts and, if they are known, sizes (`SIZE_COLUMNS`).
            image_size: (height, width) for sizes that are not given.
            embedding_manager: see `PromptEncoder.forward`.

        Returns:
            "c_crossattn", a list of (B, N, d), and "c_adm", (B, v).
        """
        batch = prompts if isinstance(prompts, Mapping) else {self.prompt_key: prompts}
        texts = batch[self.prompt_key]
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = self.tokenize(texts, getattr(embedding_manager, "new_words", ()), truncate=True)
        encoding, pooled = self._encode_with_pooled(self.managed_embeddings(tokens, embedding_manager), tokens)
        sizes = sizes_of_batch(batch, len(texts), default_sizes(*image_size))
        return {"c_crossattn": [encoding], "c_adm": self.vector(pooled, sizes)}

    def unconditional_condition(self, count: int, prompt: str | Sequence[str] | None, image_size: tuple[int, int]
                                ) -> dict[str, Any]:
        """Return the condition of `count` images to steer away from: zeros, or a negative prompt that is not empty."""
        text = prompt if isinstance(prompt, str | None) else prompt[0]
        encoding, pooled = self.encode_unconditional() if not text else self.encode_with_pooled(
            self.tokenize([text], truncate=True))
        sizes = default_sizes(*image_size).expand(count, -1)
        vector = self.vector(pooled.expand(count, -1), sizes)
        return {"c_crossattn": [encoding.expand(count, -1, -1)], "c_adm": vector}

    # Batches, as in the public code

    def forward(self, batch: Mapping[str, Any] | Sequence[str] | str,
                force_zero_embeddings: Sequence[str] | None = None,
                embedding_manager: EmbeddingManagerLike | None = None) -> Any:
        """Encode a batch by all embedders, or prompts alone as a `PromptEncoder`.

        Args:
            batch: input key -> prompts or numbers (B, n); or B prompts.
            force_zero_embeddings: input keys of which the outputs become zeros.
            embedding_manager: see `PromptEncoder.forward`; for prompts alone.

        Returns:
            Of a batch: "crossattn" (B, N, d), "vector" (B, v) and, if an embedder returns maps, "concat". Of prompts:
            (B, N, d).
        """
        if not isinstance(batch, Mapping):
            return super().forward(batch, embedding_manager)
        outputs: dict[str, list[Tensor]] = {}
        for embedder in self.embedders:
            encoded = self._outputs(embedder, batch)
            for output in encoded if isinstance(encoded, list | tuple) else [encoded]:
                output = _drop(output, embedder)
                if embedder.input_key in (force_zero_embeddings or ()):
                    output = torch.zeros_like(output)
                outputs.setdefault(KINDS[output.ndim], []).append(output)
        return {kind: torch.cat(parts, JOINED_AXES[kind]) for kind, parts in outputs.items()}

    def _outputs(self, embedder: Any, batch: Mapping[str, Any]) -> Any:
        """Return what one embedder makes of its inputs in a batch."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and embedder.is_trainable):
            if embedder.input_key is None:
                return embedder(*(batch[key] for key in embedder.input_keys))
            values = batch[embedder.input_key]
            if embedder.legacy_ucg_value is not None:
                dropped = np.random.random(len(values)) < embedder.ucg_rate
                values = [embedder.legacy_ucg_value if drop else value
                          for value, drop in zip(values, dropped, strict=True)]
            if not isinstance(embedder, PromptEncoder):
                return embedder(values.to(self.device) if isinstance(values, Tensor) else values)
            tokens = self.tokenize([values] if isinstance(values, str) else values, truncate=True)
            encoding, pooled = embedder.encode_with_pooled(self._tokens_of(embedder, tokens))
            return encoding if pooled is None else (encoding, pooled)

    def get_unconditional_conditioning(
        self, batch_c: Mapping[str, Any], batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Sequence[str] | None = None,
        force_cond_zero_embeddings: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encode two batches for guidance, without dropping anything.

        Args:
            batch_c: the batch to follow.
            batch_uc: the batch to steer away from; None: the same.
            force_uc_zero_embeddings, force_cond_zero_embeddings: input keys whose outputs become zeros in either.
        """
        with self._without_dropout():
            return (self(batch_c, force_cond_zero_embeddings),
                    self(batch_c if batch_uc is None else batch_uc, force_uc_zero_embeddings))

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        rates = [embedder.ucg_rate for embedder in self.embedders]
        for embedder in self.embedders:
            embedder.ucg_rate = 0.0
        try:
            yield
        finally:
            for embedder, rate in zip(self.embedders, rates, strict=True):
                embedder.ucg_rate = rate


def _embedder(number: int, config: Mapping[str, Any]) -> Any:
    """Build one embedder, with the settings of its entry as attributes."""
    unknown = sorted(set(config) - set(EMBEDDER_KEYS))
    if unknown:
        raise UserError(f"GeneralConditioner: emb_models[{number}] has an unknown key {', '.join(unknown)}; "
                        f"it may have {', '.join(EMBEDDER_KEYS)}")
    if ("input_key" in config) == ("input_keys" in config):
        raise UserError(f"GeneralConditioner: emb_models[{number}] needs an input_key or input_keys: what it reads in "
                        "a batch, such as txt")
    embedder = instantiate_from_config({key: config[key] for key in ("target", "params") if key in config})
    embedder.is_trainable = bool(config.get("is_trainable", False))
    embedder.ucg_rate = float(config.get("ucg_rate", 0.0))
    embedder.legacy_ucg_value = config.get("legacy_ucg_value")
    embedder.input_key = config.get("input_key")
    embedder.input_keys = list(config.get("input_keys", ()))
    embedder.requires_grad_(embedder.is_trainable)
    return embedder if embedder.is_trainable else embedder.eval()


def _drop(output: Tensor, embedder: Any) -> Tensor:
    """Return an output in which each row is zero with the probability `ucg_rate`."""
    if embedder.ucg_rate <= 0 or embedder.legacy_ucg_value is not None:
        return output
    kept = torch.bernoulli(torch.full((len(output),), 1.0 - embedder.ucg_rate, device=output.device))
    return output * kept.view(-1, *(1,) * (output.ndim - 1))
