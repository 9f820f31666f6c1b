"""What a CLIP sees in pictures: embeddings of pictures and texts, and the class a picture is closest to.

Classes are recognised as in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021), Sec. 3.1.4: a class is the mean of the embeddings of several texts about it, and a picture belongs to the class
of the highest cosine.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from ldm.errors import UserError
from ldm.models.clip import clip_pixels
from ldm.modules.encoders.clip import TOKENIZER
from ldm.modules.encoders.vocabulary import load_pretrained

BATCH_SIZE = 256


class Recogniser:
    """A CLIP that grades pictures; embeddings have length 1 and lie on the CPU, so that products are cosines."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_path(cls, path: str | Path, device: torch.device | str = "cpu") -> Recogniser:
        """Loads a CLIP as `transformers` keeps it: a folder or a hub name.

        Raises:
            UserError: there is none, or it is incomplete.
        """
        folder = Path(path)
        own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        try:
            model = load_pretrained(CLIPModel, path)
            tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER if folder.is_dir() and not own else path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"CLIP {path}: cannot be loaded ({reason}); give a folder that holds one") from None
        return cls(model.to(device), tokenizer)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(N, d) for pictures (N, 3, H, W) in [-1, 1] of any size."""
        side = self.model.config.vision_config.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return torch.cat([_unit(self.model.get_image_features(clip_pixels(part.to(self.model.device))))
                          for part in images.split(BATCH_SIZE)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, d); texts that are too long are cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(texts), BATCH_SIZE):
            encoded = self.tokenizer(list(texts[start:start + BATCH_SIZE]), truncation=True, max_length=longest,
                                     padding=True, return_tensors="pt").to(self.model.device)
            parts.append(_unit(self.model.get_text_features(encoded["input_ids"], encoded["attention_mask"])))
        return torch.cat(parts)

    def embed_classes(self, texts: Sequence[Sequence[str]], description: str = "classes") -> Tensor:
        """(C, d): for each class the mean direction of all texts about it."""
        return torch.cat([_unit(self.embed_texts(about).mean(0, keepdim=True))
                          for about in tqdm(texts, desc=description, leave=False, disable=None)])


def closest(embeddings: Tensor, classes: Tensor) -> Tensor:
    """(N,) the class of the highest cosine for each of (N, d) embeddings, among (C, d) classes; all of length 1."""
    return (embeddings @ classes.T).argmax(1)


def _unit(features: object) -> Tensor:
    """Projected features at length 1; `transformers` 5 gives them inside of an output."""
    projected = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(projected.float(), dim=-1).cpu()
