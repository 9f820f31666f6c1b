"""Training of the zero-shot segmenter, on images whose masks are known."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from ldm.common.paths import resolve_path
from ldm.data.mini.augmentation import MaskedAugmentation
from ldm.models.clip_images import normalize_for_clip
from ldm.models.open_clip_folder import SETTINGS, load_openclip
from ldm.models.optimization import SharedStepModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.residual_segmenter import ResidualSegmenter

ABSENT_EVERY = 32  # one image in 32 is queried for a kind that it does not show


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return 1 - Dice's coefficient of soft masks and true ones, both (B, H, W), averaged over B; 0 if they agree.

    Cross-entropy counts pixels. This loss counts subjects: small ones weigh as much as large ones.
    """
    soft = logits.sigmoid()
    common, total = (soft * target).sum((1, 2)), (soft + target).sum((1, 2))
    return (1 - (2 * common + 1) / (total + 1)).mean()


def intersection_over_union(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the IoU (N,) of boolean masks (N, H, W); 0 if both are empty."""
    return (predicted & target).sum((1, 2)) / (predicted | target).sum((1, 2)).clamp(min=1)


class SegmenterTrainer(SharedStepModule):
    """Learns to segment the subject that a word names. Both towers start as those of a trained CLIP.

    Batches have the items of `SceneDataset`. A scene of two subjects is queried for either, since captions mostly name
    the left one first. One image in 32 is queried for a kind that it does not show, and its target is empty. (With more
    of these queries, the segmenter takes sprites that look unlike all of training for absent.)

    Args:
        clip: folder of the CLIP to start from, with a residual image tower, in the layout of `open_clip`.
        widths: channels of the decoder's levels (see `ResidualSegmenter`).
        augmentation: probability of each augmentation of a training image (see `MaskedAugmentation`); 0: none. Without
            it, the segmenter memorizes the sprites.
        scheduler_config: schedule of the learning rate.
        monitor: name of the logged value that chooses the best checkpoint.
    """

    renamed_params: ClassVar[dict[str, str]] = {"varied": "augmentation"}

    def __init__(self, clip: str, widths: Sequence[int] = (32, 64, 96, 128, 128), augmentation: float = 0.0,
                 scheduler_config: Mapping[str, Any] | None = None, monitor: str | None = None) -> None:
        super().__init__()
        folder = resolve_path(clip)
        settings = json.loads((folder / SETTINGS).read_text())["model_cfg"]
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self.segmenter = ResidualSegmenter(**settings, widths=widths)
        self.segmenter.clip.load_state_dict(
            {key: value for key, value in load_openclip(folder).state_dict().items() if "attnpool" not in key})
        self.segmenter.to(memory_format=torch.channels_last)
        self.augmentation = MaskedAugmentation(augmentation) if augmentation else None
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def logits(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Return mask logits (B, H, W) for images (B, 3, H, W) in [-1, 1] and one word per image."""
        tokens = self.tokenizer(list(words), truncation=True, max_length=self.segmenter.max_text_length, padding=True,
                                return_tensors="pt")["input_ids"].to(self.device)
        return self.segmenter(normalize_for_clip(images), self.segmenter.encode_text(tokens))

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        images, masks = batch["image"], torch.cat([batch["mask"], batch["second_mask"]], 1)
        if split == "train" and self.augmentation is not None:
            images, masks = self.augmentation(images, masks)
        words, target, absent = select_queries(batch, masks)
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
        """Return N images, and the parts of them that are segmented for the first subject's word."""
        images = batch["image"][:N].to(self.device)
        masks = self.logits(images, batch["word"][:N]).sigmoid()[:, None]
        return {"inputs": images, "segmented": (images + 1) * masks - 1}


def select_queries(batch: Mapping[str, Any], masks: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Choose the word that each image is queried for.

    Args:
        batch: items of `SceneDataset`.
        masks: (B, 2, H, W) of the first and the second subject.

    Returns:
        The words, the target masks (B, H, W), and whether the word's kind is absent (B,).
    """
    index = torch.arange(len(masks), device=masks.device)
    absent = index % ABSENT_EVERY == ABSENT_EVERY - 1
    has_second = torch.tensor([bool(word) for word in batch["second_word"]], device=index.device)
    second = (index % 2 == 1) & has_second
    words = []
    for position, (is_absent, is_second) in enumerate(zip(absent.tolist(), second.tolist(), strict=True)):
        key = "absent_kind" if is_absent else "second_word" if is_second else "word"
        words.append(batch[key][position])
    target = torch.where(second[:, None, None], masks[:, 1], masks[:, 0])
    return words, target * ~absent[:, None, None], absent
