"""Contrastive training of a CLIP of any size (Radford et al., "Learning Transferable Visual Models", ICML 2021)."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ldm.models.optimisation import OneStepModule, optimizer_and_schedule

# What CLIP's image tower expects of a picture in [0, 1]; the project's own towers are trained with the same figures.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as CLIP's image tower wants them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std


class CLIPTrainer(OneStepModule):
    """Learns a text and an image tower from pictures with captions.

    Args:
        tokenizer: folder of the CLIP tokenizer.
        text_config, vision_config: settings of `transformers`' CLIPTextConfig and CLIPVisionConfig.
        projection_dim: width of the space that both towers meet in.
        max_length: tokens per caption.
        weight_decay: of all matrices but the embedding tables.
    """

    def __init__(self, tokenizer: str, text_config: Mapping[str, Any], vision_config: Mapping[str, Any],
                 projection_dim: int, max_length: int = 77, weight_decay: float = 0.05,
                 scheduler_config: Mapping[str, Any] | None = None, monitor: str | None = None) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
        special = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id,
                   "pad_token_id": self.tokenizer.pad_token_id, "vocab_size": len(self.tokenizer)}
        self.clip = CLIPModel(CLIPConfig(
            text_config={"max_position_embeddings": max_length, **special, **text_config},
            vision_config=dict(vision_config), projection_dim=projection_dim))
        self.max_length, self.weight_decay = max_length, weight_decay
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, max_length) word-piece numbers, padded with the end token as `FrozenCLIPEmbedder` does."""
        encoded = self.tokenizer(captions, truncation=True, max_length=self.max_length, padding="max_length",
                                 return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def similarities(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, B) scaled cosines, captions down and pictures across."""
        output = self.clip(input_ids=self.tokens(list(batch["caption"])), pixel_values=clip_pixels(batch["image"]))
        return output.logits_per_text

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        logits = self.similarities(batch)
        target = torch.arange(len(logits), device=logits.device)
        loss = (torch.nn.functional.cross_entropy(logits, target) +
                torch.nn.functional.cross_entropy(logits.T, target)) / 2
        top = (logits[:64, :64].argmax(0) == target[:64]).float().mean()
        self.log_dict({f"{split}/loss": loss.detach(), f"{split}/top1_of_64": top}, prog_bar=True,
                      batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for name, p in self.clip.named_parameters() if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in self.clip.named_parameters() if p.ndim <= 1 or "embedding" in name]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": self.weight_decay},
                                       {"params": others, "weight_decay": 0.0}], lr=self.learning_rate,
                                      betas=(0.9, 0.98), fused=True)
        return optimizer_and_schedule(optimizer, self.scheduler_config)
