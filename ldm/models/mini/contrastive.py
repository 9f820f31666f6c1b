"""Contrastive training of a CLIP of any size (Radford et al., "Learning Transferable Visual Models", ICML 2021)."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.common.paths import resolve_path
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import with_article
from ldm.data.mini.world import KIND_NAMES
from ldm.models.clip_images import normalize_for_clip
from ldm.models.optimization import SharedStepModule, can_use_fused_optimizer, optimizer_and_schedule

KIND_TEMPLATE = "a photo of {}"


def kind_shares(batch: Mapping[str, Any]) -> Tensor:
    """Return the share of each kind in the subjects of each scene, (B, kinds): 1, or a half for each of two."""
    first = F.one_hot(batch["kind"].cpu(), len(KIND_NAMES)).float()
    second = batch["second_kind"].cpu()
    other = F.one_hot(second.clamp(min=0), len(KIND_NAMES)).float()
    return torch.where((second >= 0)[:, None], (first + other) / 2, first)


class ContrastiveTrainer(SharedStepModule):
    """Base class: trains an image tower and a text tower on images with captions.

    Subclasses set `clip`, a module whose `logit_scale` is the logarithm of the logits' scale, and implement
    `text_features` and `image_features`.

    Args:
        tokenizer: folder of the CLIP tokenizer.
        max_length: tokens per caption.
        weight_decay: weight decay of all matrices except the embedding tables.
        kinds_weight: weight of a second loss, which classifies the kinds of subjects in each image. In a small batch,
            backgrounds and colors distinguish most captions, so the towers learn kinds slowly without it.
        backgrounds_weight: weight of a third loss, which classifies the background.
        scheduler_config: schedule of the learning rate.
        monitor: name of the logged value that chooses the best checkpoint.
    """

    renamed_params: ClassVar[dict[str, str]] = {"places_weight": "backgrounds_weight"}
    clip: nn.Module

    def __init__(self, tokenizer: str, max_length: int = 77, weight_decay: float = 0.05, kinds_weight: float = 0.0,
                 backgrounds_weight: float = 0.0, scheduler_config: Mapping[str, Any] | None = None,
                 monitor: str | None = None) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(str(resolve_path(tokenizer)))
        self.max_length, self.weight_decay = max_length, weight_decay
        self.class_weights = {"kind": kinds_weight, "background": backgrounds_weight}
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def text_features(self, tokens: Tensor) -> Tensor:
        """Return features (B, d) of texts, given their tokens (B, N)."""
        raise NotImplementedError

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return features (B, d) of images (B, 3, H, W), normalized by `normalize_for_clip`."""
        raise NotImplementedError

    def tokens(self, captions: list[str]) -> Tensor:
        """Return tokens (B, N), padded to the longest caption. The text tower ignores what follows the end token."""
        encoded = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding=True,
                                 return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def embed_texts(self, captions: list[str]) -> Tensor:
        """Return embeddings (B, d) of length 1."""
        return self._embed_tokens(self.tokens(captions))

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_features(tokens), dim=-1)

    @functools.cached_property
    def _kind_tokens(self) -> Tensor:
        """One text per kind."""
        return self.tokens([KIND_TEMPLATE.format(with_article(name)) for name in KIND_NAMES])

    def _background_tokens(self) -> Tensor:
        """One text per background, each about a random kind: the subject must not matter."""
        kinds = torch.randint(len(KIND_NAMES), (len(BACKGROUNDS),)).tolist()
        texts = []
        for kind, (_, phrases) in zip(kinds, BACKGROUNDS.values(), strict=True):
            texts.append(f"{KIND_TEMPLATE.format(with_article(KIND_NAMES[kind]))} {phrases[0]}")
        return self.tokens(texts)

    def _classification_losses(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """Yield what each loss over C classes needs: name, weight, the classes' tokens (C, N), the target (B, C)."""
        if self.class_weights["kind"]:
            yield "kind", self.class_weights["kind"], self._kind_tokens.to(self.device), kind_shares(batch)
        if self.class_weights["background"]:
            target = F.one_hot(batch["background"].cpu(), len(BACKGROUNDS)).float()
            yield "background", self.class_weights["background"], self._background_tokens(), target

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        # The contrastive loss: the caption of each image among all captions, and the image of each caption.
        scale = self.clip.logit_scale.exp()
        images = F.normalize(self.image_features(normalize_for_clip(batch["image"])), dim=-1)
        logits = scale * self.embed_texts(list(batch["caption"])) @ images.T
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        top1 = (logits[:64, :64].argmax(0) == target[:64]).float().mean()
        metrics = {f"{split}/loss": loss.detach(), f"{split}/top1_of_64": top1}

        for name, weight, tokens, shares in self._classification_losses(batch):
            class_logits = scale * images @ self._embed_tokens(tokens).T
            shares = shares.to(images)
            loss = loss + weight * F.cross_entropy(class_logits, shares)
            correct = shares.gather(1, class_logits.argmax(1, keepdim=True)).gt(0)
            metrics[f"{split}/{name}_top1"] = correct.float().mean()
        self.log_dict(metrics, prog_bar=True, batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for name, p in self.clip.named_parameters() if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in self.clip.named_parameters() if p.ndim <= 1 or "embedding" in name]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": self.weight_decay},
                                       {"params": others, "weight_decay": 0.0}], lr=self.learning_rate,
                                      betas=(0.9, 0.98), fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)
