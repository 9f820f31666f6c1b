"""Training of a segmenter that is asked by text, on pictures whose masks are known."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.data.mini.variations import Variations
from ldm.models.clip_images import normalize_for_clip
from ldm.models.open_clip_folder import SETTINGS, load_openclip
from ldm.models.optimization import SharedStepModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.residual_segmenter import ResidualSegmenter

ABSENT = 32  # of so many pictures, one is asked for what it does not show


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice's coefficient of soft masks and true ones, both (B, H, W), a mean over B; 0 where they agree.

    Beside cross-entropy, which counts pixels, it counts things: small ones weigh as much as large ones.
    """
    soft = logits.sigmoid()
    common, total = (soft * target).sum((1, 2)), (soft + target).sum((1, 2))
    return (1 - (2 * common + 1) / (total + 1)).mean()


def intersection_over_union(found: Tensor, true: Tensor) -> Tensor:
    """(N,) of boolean masks (N, H, W); 0 where both are empty."""
    return (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp(min=1)


class SegmenterTrainer(SharedStepModule):
    """Learns to find, in a picture, the thing that a word names; both towers start as those of a trained CLIP.

    Batches bring "image", "mask" and "word", for scenes of two things "second_mask" and "second_word", and with "other"
    a word of something that is not in the picture: that is asked of one picture in 32, and nothing is to be found
    there. (Asked more often, what is drawn unlike everything in training is taken for absent.) Of two things, captions
    mostly name the left one first, so that either is asked for.

    Args:
        clip: folder of the CLIP to start from, with a residual image tower, as `open_clip` keeps it.
        widths: channels of the decoder's levels (see `ResidualSegmenter`).
        varied: how often a training picture is bent, turned and recoloured (see `Variations`); 0: never. Without,
            drawings are learned by heart.
    """

    def __init__(self, clip: str, widths: Sequence[int] = (32, 64, 96, 128, 128), varied: float = 0.0,
                 scheduler_config: Mapping[str, Any] | None = None, monitor: str | None = None) -> None:
        super().__init__()
        settings = json.loads((Path(clip) / SETTINGS).read_text())["model_cfg"]
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self.segmenter = ResidualSegmenter(**settings, widths=widths)
        self.segmenter.clip.load_state_dict(
            {key: value for key, value in load_openclip(clip).state_dict().items() if "attnpool" not in key})
        self.segmenter.to(memory_format=torch.channels_last)
        self.variations = Variations(varied) if varied else None
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def logits(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """(B, H, W) for pictures (B, 3, H, W) in [-1, 1] and a word for each."""
        tokens = self.tokenizer(list(words), truncation=True, max_length=self.segmenter.longest_text, padding=True,
                                return_tensors="pt")["input_ids"].to(self.device)
        return self.segmenter(normalize_for_clip(images), self.segmenter.encode_text(tokens))

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        images, masks = batch["image"], torch.cat([batch["mask"], batch["second_mask"]], 1)
        if split == "train" and self.variations is not None:
            images, masks = self.variations(images, masks)
        words, target, absent = asked(batch, masks)
        logits = self.logits(images, words)
        loss = F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits, target)
        overlap = intersection_over_union(logits > 0, target > 0.5)[~absent]
        self.log_dict({f"{split}/loss": loss.detach(), f"{split}/iou": overlap.mean()}, prog_bar=True,
                      batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(torch.optim.AdamW(self.segmenter.parameters(), lr=self.learning_rate,
                                                        fused=can_use_fused_optimizer(self)), self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8) -> dict[str, Tensor]:
        """Pictures, and what is found in them of the thing named first."""
        images = batch["image"][:N].to(self.device)
        found = self.logits(images, batch["word"][:N]).sigmoid()[:, None]
        return {"inputs": images, "found": (images + 1) * found - 1}


def asked(batch: Mapping[str, Any], masks: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """What is looked for in each picture of a batch: words, masks (B, H, W), and (B,) whether it is not there.

    `masks` (B, 2, H, W) are those of the things that are there.
    """
    order = torch.arange(len(masks), device=masks.device)
    absent = order % ABSENT == ABSENT - 1
    second = (order % 2 == 1) & torch.tensor([bool(word) for word in batch["second_word"]], device=order.device)
    words = [batch["other" if nowhere else "second_word" if other else "word"][place] for place, (nowhere, other)
             in enumerate(zip(absent.tolist(), second.tolist(), strict=True))]
    target = torch.where(second[:, None, None], masks[:, 1], masks[:, 0])
    return words, target * ~absent[:, None, None], absent
