"""Contrastive training of a CLIP of any size (Radford et al., "Learning Transferable Visual Models", ICML 2021)."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.data.mini.backgrounds import PLACES
from ldm.data.mini.scenes import with_article
from ldm.data.mini.world import KIND_NAMES
from ldm.models.clip_images import normalize_for_clip
from ldm.models.optimization import SharedStepModule, can_use_fused_optimizer, optimizer_and_schedule

KIND_TEMPLATE = "a photo of {}"


def share_of_kinds(batch: Mapping[str, Any]) -> Tensor:
    """(B, kinds): 1 for the one thing in a scene, a half for each of two."""
    first = F.one_hot(batch["kind"].cpu(), len(KIND_NAMES)).float()
    second = batch["second_kind"].cpu()
    other = F.one_hot(second.clamp(min=0), len(KIND_NAMES)).float()
    return torch.where((second >= 0)[:, None], (first + other) / 2, first)


class ContrastiveTrainer(SharedStepModule):
    """Learns two towers from pictures with captions; which towers, subclasses say.

    They set `clip`, a module whose `logit_scale` is the logarithm of the logits' factor, and give `text_features` and
    `image_features`.

    Args:
        tokenizer: folder of the CLIP tokenizer.
        max_length: tokens per caption.
        weight_decay: of all matrices but the embedding tables.
        kinds_weight: of a second loss, which asks of every picture which of all the kinds of the mini world are in it.
            In a small batch places and colours tell most captions apart, so that kinds are learned slowly without it.
        places_weight: of a third one, which asks in which of all the places of the mini world it is.
    """

    clip: nn.Module

    def __init__(self, tokenizer: str, max_length: int = 77, weight_decay: float = 0.05, kinds_weight: float = 0.0,
                 places_weight: float = 0.0, scheduler_config: Mapping[str, Any] | None = None,
                 monitor: str | None = None) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        self.max_length, self.weight_decay = max_length, weight_decay
        self.class_weights = {"kind": kinds_weight, "place": places_weight}
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def text_features(self, tokens: Tensor) -> Tensor:
        """(B, d) for the word-piece numbers of B texts, (B, N)."""
        raise NotImplementedError

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, d) for pictures (B, 3, H, W) as `normalize_for_clip` gives them."""
        raise NotImplementedError

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, N) word-piece numbers, padded to the longest caption: what follows a caption's end is never looked at."""
        encoded = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding=True,
                                 return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def text_directions(self, captions: list[str]) -> Tensor:
        """(B, d), of length 1."""
        return self._directions(self.tokens(captions))

    def _directions(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_features(tokens), dim=-1)

    @functools.cached_property
    def _kind_tokens(self) -> Tensor:
        return self.tokens([KIND_TEMPLATE.format(with_article(name)) for name in KIND_NAMES])

    def _place_tokens(self) -> Tensor:
        """A text about each place, with a kind drawn anew each time: what is there must not matter."""
        kinds = torch.randint(len(KIND_NAMES), (len(PLACES),)).tolist()
        return self.tokens([f"{KIND_TEMPLATE.format(with_article(KIND_NAMES[kind]))} {wheres[0]}"
                            for kind, (_, wheres) in zip(kinds, PLACES.values(), strict=True)])

    def _classes(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """Of each loss over C classes: name, weight, the classes' tokens, their shares of pictures (B, C)."""
        if self.class_weights["kind"]:
            yield "kind", self.class_weights["kind"], self._kind_tokens.to(self.device), share_of_kinds(batch)
        if self.class_weights["place"]:
            shares = F.one_hot(batch["place"].cpu(), len(PLACES)).float()
            yield "place", self.class_weights["place"], self._place_tokens(), shares

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        scale = self.clip.logit_scale.exp()
        images = F.normalize(self.image_features(normalize_for_clip(batch["image"])), dim=-1)
        logits = scale * self.text_directions(list(batch["caption"])) @ images.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        top = (logits[:64, :64].argmax(0) == target[:64]).float().mean()
        numbers = {f"{split}/loss": loss.detach(), f"{split}/top1_of_64": top}
        for name, weight, tokens, shares in self._classes(batch):
            found, shares = scale * images @ self._directions(tokens).T, shares.to(images)
            loss = loss + weight * F.cross_entropy(found, shares)
            numbers[f"{split}/{name}_top1"] = shares.gather(1, found.argmax(1, keepdim=True)).gt(0).float().mean()
        self.log_dict(numbers, prog_bar=True, batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for name, p in self.clip.named_parameters() if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in self.clip.named_parameters() if p.ndim <= 1 or "embedding" in name]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": self.weight_decay},
                                       {"params": others, "weight_decay": 0.0}], lr=self.learning_rate,
                                      betas=(0.9, 0.98), fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)
