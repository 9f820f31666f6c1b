"""Stand-ins for what ComfyUI hands to nodes: a MODEL, a CLIP, and a sampling run. They keep its contract, no more.

They are made of our own small models, so that our own sampler is the oracle of what nodes do to them.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.modules.encoders.clip import TOKENIZER

load_tokenizer = functools.cache(CLIPTokenizer.from_pretrained)
WEIGHTED = re.compile(r"\(([^()]*):([\d.]+)\)")
Conditioning = list[list[Any]]


class StandInTokenizer:
    """Turns prompts into sections of (token, weight), by the key of each text encoder."""

    def __init__(self, towers: dict[str, Any]) -> None:
        self.towers = towers
        for name in towers:
            setattr(self, name, SimpleNamespace(tokenizer=load_tokenizer(TOKENIZER)))

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False) -> dict[str, list]:
        return {name.removeprefix("clip_"): self._sections(text, tower) for name, tower in self.towers.items()}

    def _sections(self, text: str, tower: Any) -> list[list[tuple[Any, float]]]:
        parts = WEIGHTED.split(text)  # plain, weighted, weight, plain, ...
        weights = [float(parts[index + 1]) if index % 3 == 1 else 1.0 for index in range(len(parts))]
        pieces = [(token, weight) for index, (part, weight) in enumerate(zip(parts, weights, strict=True))
                  if index % 3 != 2 for token in tower.word_pieces(part)]
        room = tower.max_length - 2
        start, end, padding = tower._special_tokens()
        return [[(token, 1.0) if isinstance(token, int) else token for token in
                 (start, *pieces[at:at + room], end, *[padding] * (room - len(pieces[at:at + room])))]
                for at in range(0, max(len(pieces), 1), room)]


class StandInEncoder:
    """Encodes sections of tokens, among which may be vectors, and weights each token against the empty prompt's."""

    def __init__(self, encoder: Any, towers: dict[str, Any]) -> None:
        self.encoder = encoder
        self.tokenizer = StandInTokenizer(towers)
        for name, tower in towers.items():
            setattr(self, name, SimpleNamespace(transformer=SimpleNamespace(
                get_input_embeddings=lambda tower=tower: StandInTable(tower.token_table))))

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor | None]:
        encoding, pooled = self._encode(tokens)
        empty, _ = self._encode(self.tokenizer.tokenize_with_weights(""))
        widths = [getattr(self, f"clip_{key}").transformer.get_input_embeddings().weight.shape[1] for key in tokens]
        weights = torch.cat([torch.tensor([[weight for _, weight in section] for section in sections])[..., None]
                             .expand(-1, -1, width) for sections, width in zip(tokens.values(), widths, strict=True)],
                            -1)
        weighted = torch.where(weights == 1, encoding, empty + weights * (encoding - empty))
        return weighted.flatten(0, 1)[None], None if pooled is None else pooled[:1]

    def _encode(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor | None]:
        rows, vectors = [], []
        for sections in zip(*tokens.values(), strict=True):
            row = []
            for of_towers in zip(*sections, strict=True):
                token = of_towers[0][0]
                if not isinstance(token, int):
                    vectors.append(torch.cat([vector for vector, _ in of_towers]))
                    token = self.encoder.vocabulary_size + len(vectors) - 1
                row.append(token)
            rows.append(row)
        with torch.no_grad():
            return self.encoder.encode_with_pooled(torch.tensor(rows), torch.stack(vectors) if vectors else None)


class StandInTable:
    """An embedding layer."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, indices: Tensor, out_dtype: torch.dtype) -> Tensor:
        return self.weight[indices].to(out_dtype)


class StandInClip:
    """A CLIP; clones share its parts."""

    def __init__(self, encoder: Any) -> None:
        parts = getattr(encoder, "towers", [encoder])
        towers = {next(iter(tower.word_parts)): tower for tower in parts}
        self.cond_stage_model = StandInEncoder(encoder, towers)
        self.tokenizer = StandInTokenizer(towers)

    def clone(self) -> StandInClip:
        copied = object.__new__(StandInClip)
        copied.__dict__.update(self.__dict__)
        return copied

    def tokenize(self, text: str) -> dict[str, list]:
        return self.tokenizer.tokenize_with_weights(text, False)

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> Conditioning:
        encoding, pooled, *entries = self.cond_stage_model.encode_token_weights(tokens)
        return [[encoding, {"pooled_output": pooled, **(entries[0] if entries else {})}]]

    def encode(self, text: str) -> Conditioning:
        """Encode as the node CLIP Text Encode does."""
        return self.encode_from_tokens_scheduled(self.tokenize(text))


class StandInModel:
    """A MODEL: a U-Net shared by clones, each with patches of its own that are on only while it samples."""

    def __init__(self, unet: nn.Module) -> None:
        self.model = SimpleNamespace(diffusion_model=unet)
        self.object_patches: dict[str, Any] = {}
        self.wrappers: dict[tuple[str, str], list[Callable[..., Any]]] = {}

    def clone(self) -> StandInModel:
        copied = StandInModel(self.model.diffusion_model)
        copied.object_patches = dict(self.object_patches)
        copied.wrappers = {key: list(wrappers) for key, wrappers in self.wrappers.items()}
        return copied

    def add_object_patch(self, name: str, patch: Any) -> None:
        self.object_patches[name] = patch

    def get_model_object(self, name: str) -> Any:
        parent, attribute = self._split(name)
        return self.object_patches.get(name, getattr(parent, attribute))

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault((kind, key), []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.pop((kind, key), None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable[..., Any]]:
        return self.wrappers.get((kind, key), [])

    @contextmanager
    def loaded(self) -> Iterator[nn.Module]:
        """Put the patches on the U-Net, and take them off again."""
        before = {name: self._split(name) for name in self.object_patches}
        originals = {name: getattr(*where) for name, where in before.items()}
        for name, where in before.items():
            setattr(*where, self.object_patches[name])
        try:
            yield self.model.diffusion_model
        finally:
            for name, where in before.items():
                setattr(*where, originals[name])

    def _split(self, name: str) -> tuple[Any, str]:
        path, _, attribute = name.rpartition(".")
        parent: Any = self.model
        for part in path.split("."):
            parent = getattr(parent, part)
        return parent, attribute


def predict(model: StandInModel, conditionings: Sequence[Conditioning], latents: Tensor, vector: Tensor | None = None
            ) -> list[Tensor]:
    """Return what the U-Net predicts under each conditioning, as in the first step of a sampling run.

    Args:
        conditionings: such as the prompt's and the negative prompt's.
        latents: (1, 4, h, w).
        vector: of the label embedding, (1, v).
    """
    guider = SimpleNamespace(conds=conds_of(conditionings))

    def run() -> list[Tensor]:
        with model.loaded() as unet, torch.no_grad():
            return [unet(latents, torch.tensor([500]), context=cond["cross_attn"], y=vector)
                    for conds in guider.conds.values() for cond in conds]

    for (kind, _), wrappers in model.wrappers.items():
        if kind == "outer_sample":
            for wrapper in wrappers:
                run = _wrapped(run, wrapper, guider)
    return run()


def conds_of(conditionings: Sequence[Conditioning]) -> dict[str, list[dict[str, Any]]]:
    """Return conditionings in the form that a sampling run has them."""
    return {str(index): [{**entries, "cross_attn": encoding} for encoding, entries in conditioning]
            for index, conditioning in enumerate(conditionings)}


def _wrapped(run: Callable[[], Any], wrapper: Callable[..., Any], guider: Any) -> Callable[[], Any]:
    class Executor:
        class_obj = guider

        def __call__(self) -> Any:
            return run()

    return lambda: wrapper(Executor())
