"""Training of a CLIPSeg of any size (Lüddecke & Ecker, "Image Segmentation Using Text and Image Prompts", 2022)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

from ldm.models.clip import clip_pixels, features_of
from ldm.models.optimisation import OneStepModule, may_fuse, optimizer_and_schedule
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.encoders.vocabulary import load_pretrained


@torch.no_grad()
def start_smooth(layer: torch.nn.ConvTranspose2d) -> None:
    """Makes every pixel of a patch start alike: from random weights, noise within patches takes long to die out."""
    layer.weight.copy_(layer.weight.sum((2, 3), keepdim=True) / layer.kernel_size[0])


def finer_patches(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """A CLIP's weights with its picture cut into patches of `size` pixels a side rather than those it was trained with.

    A segmenter tells what lies within a patch from a single vector: finer ones have sharper edges. Patch embeddings are
    averaged over the pixels that become one and scaled to keep their sum, positions are interpolated, as in Beyer et
    al., "FlexiViT", 2023.

    Raises:
        ValueError: `size` does not divide the patches that the weights are for.
    """
    embeddings = "vision_model.embeddings."
    patch, place = embeddings + "patch_embedding.weight", embeddings + "position_embedding.weight"
    times, left = divmod(tensors[patch].shape[-1], size)
    if left or not times:
        raise ValueError(f"patch_size {size}: it must divide that of the CLIP, {tensors[patch].shape[-1]}")
    whole, grid = tensors[place][:1], tensors[place][1:]
    side = round(len(grid) ** 0.5)
    grid = F.interpolate(grid.T.reshape(1, -1, side, side), scale_factor=times, mode="bicubic", align_corners=False)
    return {**tensors, patch: F.avg_pool2d(tensors[patch], times) * times**2,
            place: torch.cat([whole, grid.flatten(2)[0].T])}


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


class SegmenterTrainer(OneStepModule):
    """Learns to find, in a picture, the thing that a word names; both towers start as those of a trained CLIP.

    Batches bring "image", "mask" and "word", and with "other" a word of something that is not in the picture: that
    is asked of every fourth picture, and nothing is to be found there.

    Args:
        clip: folder of the CLIP to start from.
        reduce_dim, extract_layers, decoder: width of CLIPSeg's decoder, the layers of the image tower that it reads,
            and further settings of `transformers`' CLIPSegConfig.
        text_trainable: whether the text tower is trained along, as is needed where the CLIP tells words hardly apart.
        patch_size: of the image tower in pixels, where finer than the CLIP's own.

    Raises:
        ValueError: `patch_size` does not divide the CLIP's.
    """

    def __init__(self, clip: str, reduce_dim: int = 64, extract_layers: Sequence[int] = (0, 1, 2),
                 decoder: Mapping[str, Any] | None = None, text_trainable: bool = False, patch_size: int | None = None,
                 scheduler_config: Mapping[str, Any] | None = None, monitor: str | None = None) -> None:
        super().__init__()
        start = load_pretrained(CLIPModel, clip)
        vision = start.config.vision_config.to_dict()
        vision["patch_size"] = patch_size or vision["patch_size"]
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self.segmenter = CLIPSegForImageSegmentation(CLIPSegConfig(
            text_config=start.config.text_config.to_dict(), vision_config=vision,
            projection_dim=start.config.projection_dim, reduce_dim=reduce_dim, extract_layers=list(extract_layers),
            **(decoder or {})))
        self.segmenter.clip.load_state_dict(finer_patches(start.state_dict(), vision["patch_size"]))
        start_smooth(self.segmenter.decoder.transposed_convolution)
        self.segmenter.clip.text_model.requires_grad_(text_trainable)
        self.segmenter.clip.text_projection.requires_grad_(text_trainable)
        self.text_trainable = text_trainable
        self.max_length = start.config.text_config.max_position_embeddings
        self.scheduler_config, self.monitor = scheduler_config, monitor
        self.learning_rate = 1e-3

    def logits(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """(B, H, W) for pictures (B, 3, H, W) in [-1, 1] and a word for each."""
        tokens = self.tokenizer(list(words), truncation=True, max_length=self.max_length, padding=True,
                                return_tensors="pt")["input_ids"].to(self.device)
        with torch.set_grad_enabled(self.text_trainable and torch.is_grad_enabled()):
            asked = features_of(self.segmenter.clip.get_text_features(tokens))
        output = self.segmenter(pixel_values=clip_pixels(images), conditional_embeddings=asked)
        return output.logits.reshape(len(images), *images.shape[-2:])

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        absent = torch.arange(len(batch["image"]), device=self.device) % 4 == 3
        pairs = zip(batch["word"], batch["other"], absent.tolist(), strict=True)
        logits = self.logits(batch["image"], [other if is_absent else word for word, other, is_absent in pairs])
        target = batch["mask"][:, 0] * ~absent[:, None, None]
        loss = F.binary_cross_entropy_with_logits(logits, target) + dice_loss(logits, target)
        overlap = intersection_over_union(logits > 0, target > 0.5)[~absent]
        self.log_dict({f"{split}/loss": loss.detach(), f"{split}/iou": overlap.mean()}, prog_bar=True,
                      batch_size=len(logits))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [p for p in self.segmenter.parameters() if p.requires_grad]
        return optimizer_and_schedule(torch.optim.AdamW(trained, lr=self.learning_rate, fused=may_fuse(self)),
                                      self.scheduler_config)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8) -> dict[str, Tensor]:
        """Pictures, and what is found in them of the thing named first."""
        images = batch["image"][:N].to(self.device)
        found = self.logits(images, batch["word"][:N]).sigmoid()[:, None]
        return {"inputs": images, "found": (images + 1) * found - 1}
