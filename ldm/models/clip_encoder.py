"""A CLIP as what looks at pictures: embeddings of pictures and of texts, and their directions for classes."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from ldm.common.errors import UserError
from ldm.models.clip_images import normalize_for_clip, unwrap_features
from ldm.models.open_clip_folder import SETTINGS, load_openclip, silence_logging
from ldm.modules.encoders.clip import tokenizer_folder
from ldm.modules.encoders.vocabulary import load_pretrained

BATCH_SIZE = 256


class ClipEncoder:
    """A CLIP that grades pictures; embeddings have length 1 and lie on the CPU, so that products are cosines.

    This one is a CLIP of `transformers`; `OpenClipEncoder` is one of `open_clip`.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_path(cls, path: str | Path, device: torch.device | str = "cpu") -> ClipEncoder:
        """Loads a CLIP of either library.

        Args:
            path: a folder as `transformers` or as `open_clip` keeps it, a name on the hub of `transformers`' models, or
                ARCHITECTURE/WEIGHTS as `open_clip.list_pretrained` names them, such as ViT-B-32/openai. What is named
                is downloaded unless it has been before.

        Raises:
            UserError: there is none, or it is incomplete, or cannot be downloaded.
        """
        local = Path(path).is_dir()
        if not local:
            check_clip_name(str(path))
        try:
            with silence_logging():
                return cls._loaded(Path(path), device) if local else cls._downloaded(str(path), device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"CLIP {path}: cannot be loaded ({reason}); give a folder that holds one" if local else
                            f"CLIP {path}: neither downloaded before nor to be downloaded now; check the name and the "
                            "network, or give a folder that holds one") from None

    @classmethod
    def _loaded(cls, folder: Path, device: torch.device | str) -> ClipEncoder:
        if (folder / SETTINGS).is_file():
            return OpenClipEncoder(load_openclip(folder).to(device), open_clip.get_tokenizer(f"local-dir:{folder}"))
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(load_pretrained(CLIPModel, folder).to(device), tokenizer)

    @classmethod
    def _downloaded(cls, name: str, device: torch.device | str) -> ClipEncoder:
        architecture, _, weights = name.partition("/")
        if architecture in open_clip.list_models():
            model = open_clip.create_model(architecture, weights, device=device)
            return OpenClipEncoder(model, open_clip.get_tokenizer(architecture))
        return cls(load_pretrained(CLIPModel, name).to(device), CLIPTokenizer.from_pretrained(name))

    @property
    def side(self) -> int:
        """Of the pictures that the image tower takes, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def image_features(self, images: Tensor) -> Tensor:
        """(N, d) for pictures (N, 3, side, side) in [-1, 1]."""
        return unwrap_features(self.model.get_image_features(normalize_for_clip(images)))

    def text_features(self, texts: list[str]) -> Tensor:
        """(N, d); texts that are too long are cut off."""
        longest = self.model.config.text_config.max_position_embeddings
        encoded = self.tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        return unwrap_features(self.model.get_text_features(**encoded.to(self.device)))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(N, d) for pictures (N, 3, H, W) in [-1, 1] of any size."""
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        return torch.cat([_unit(self.image_features(part.to(self.device))) for part in images.split(BATCH_SIZE)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(N, d); texts that are too long are cut off."""
        return torch.cat([_unit(self.text_features(list(texts[start:start + BATCH_SIZE])))
                          for start in range(0, len(texts), BATCH_SIZE)])

    def embed_classes(self, texts: Sequence[Sequence[str]], description: str = "classes") -> Tensor:
        """(C, d): for each class the mean direction of all texts about it (Radford et al. 2021, Sec. 3.1.4)."""
        return torch.cat([_unit(self.embed_texts(about).mean(0, keepdim=True))
                          for about in tqdm(texts, desc=description, leave=False, disable=None)])


class OpenClipEncoder(ClipEncoder):
    """A CLIP of `open_clip` that grades pictures."""

    @property
    def side(self) -> int:
        side = self.model.visual.image_size
        return side if isinstance(side, int) else side[0]

    def image_features(self, images: Tensor) -> Tensor:
        settings = self.model.visual.preprocess_cfg
        return self.model.encode_image(normalize_for_clip(images, settings["mean"], settings["std"]))

    def text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def check_clip_name(name: str) -> None:
    """Raises a UserError for what is neither ARCHITECTURE/WEIGHTS of `open_clip` nor can be a name on a hub."""
    architecture, _, weights = name.partition("/")
    if architecture in open_clip.list_models():
        known = open_clip.list_pretrained_tags_by_model(architecture)
        if weights not in known:
            raise UserError(f"CLIP {name}: name the weights of {architecture} as in {architecture}/WEIGHTS; there are "
                            f"{', '.join(known) or 'none to download'}")
    elif name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"CLIP {name}: no such folder; give one that holds a CLIP, or a name such as ViT-B-32/openai")


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()
