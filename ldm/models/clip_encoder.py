"""Embed images and texts with a CLIP of `transformers` or `open_clip`."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from ldm.common import hub
from ldm.common.errors import UserError, brief_reason
from ldm.common.paths import resolve_path
from ldm.common.progress import show_progress
from ldm.models.clip_images import normalize_for_clip, unwrap_features
from ldm.models.open_clip_folder import SETTINGS, load_openclip, silence_logging
from ldm.modules.encoders.clip import tokenizer_folder
from ldm.modules.encoders.openclip_activation import create_pretrained
from ldm.modules.encoders.vocabulary import load_pretrained

log = logging.getLogger(__name__)

BATCH_SIZE = 256


class ClipEncoder:
    """A frozen CLIP of `transformers`. For one of `open_clip` see `OpenClipEncoder`.

    Embeddings have length 1, so that products are cosines, and are on the CPU.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._long: set[str] = set()  # texts that a warning has named as too long

    @classmethod
    def from_path(cls, path: str | Path, device: torch.device | str = "cpu") -> ClipEncoder:
        """Load a CLIP of either library.

        Args:
            path: a folder in the layout of `transformers` or `open_clip`, a name on the Hugging Face hub, or
                ARCHITECTURE/WEIGHTS as `open_clip.list_pretrained` lists them, such as ViT-B-32/openai. A named model
                is downloaded once.

        Raises:
            UserError: if there is no such model, or it is incomplete, or cannot be downloaded.
        """
        folder = resolve_path(path)
        local = folder.is_dir()
        if not local:
            hub.check_clip_name("CLIP", str(path))
            check_clip_name(str(path))
        try:
            with silence_logging():
                return cls._from_folder(folder, device) if local else cls._from_hub(str(path), device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = brief_reason(error)
            raise UserError(f"CLIP {path}: cannot be loaded ({reason}); give a folder that holds one" if local else
                            f"CLIP {path}: not downloaded yet, and the download failed; check the name and the "
                            "network, or give a folder that holds one") from None

    @classmethod
    def _from_folder(cls, folder: Path, device: torch.device | str) -> ClipEncoder:
        if (folder / SETTINGS).is_file():
            return OpenClipEncoder(load_openclip(folder).to(device), open_clip.get_tokenizer(f"local-dir:{folder}"))
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(load_pretrained(CLIPModel, folder).to(device), tokenizer)

    @classmethod
    def _from_hub(cls, name: str, device: torch.device | str) -> ClipEncoder:
        architecture, _, weights = name.partition("/")
        if architecture in open_clip.list_models():
            model = create_pretrained(architecture, weights, device=device)
            return OpenClipEncoder(model, open_clip.get_tokenizer(architecture))
        return cls(load_pretrained(CLIPModel, name).to(device), CLIPTokenizer.from_pretrained(name))

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the image tower takes."""
        return self.model.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def image_features(self, images: Tensor) -> Tensor:
        """Return the features (N, d) of images (N, 3, image_size, image_size) in [-1, 1]."""
        return unwrap_features(self.model.get_image_features(normalize_for_clip(images)))

    @property
    def max_length(self) -> int:
        """Number of tokens of a text that the text tower reads, start and end tokens included."""
        return self.model.config.text_config.max_position_embeddings

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, start and end tokens included, before it is truncated."""
        return [len(tokens) for tokens in self.tokenizer(list(texts), verbose=False)["input_ids"]]

    def text_features(self, texts: list[str]) -> Tensor:
        """Return the features (N, d) of texts. Long texts are truncated."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, padding=True,
                                 return_tensors="pt")
        return unwrap_features(self.model.get_text_features(**encoded.to(self.device)))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return the embeddings (N, d) of images (N, 3, H, W) in [-1, 1] of any size."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return torch.cat([_normalize(self.image_features(part.to(self.device))) for part in images.split(BATCH_SIZE)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (N, d) of texts. Long texts are truncated, and a warning tells how many."""
        self.warn_of_long_texts(texts)
        return torch.cat([_normalize(self.text_features(list(texts[start:start + BATCH_SIZE])))
                          for start in range(0, len(texts), BATCH_SIZE)])

    def warn_of_long_texts(self, texts: Sequence[str]) -> None:
        """Log a warning with the number of texts that are longer than the text tower reads, each text once."""
        # A token has at least one byte, so most texts need no tokenizer.
        room = self.max_length - 2
        new = [text for text in dict.fromkeys(texts) if len(text.encode()) > room and text not in self._long]
        counts = self.token_counts(new) if new else []
        long = [text for text, count in zip(new, counts, strict=True) if count > self.max_length]
        if not long:
            return
        self._long.update(long)
        shown = long[0] if len(long[0]) <= 60 else f"{long[0][:59]}…"
        log.warning("warning: %d of %d texts are longer than the %d tokens that this CLIP reads, such as %r; their "
                    "ends do not count", len(long), len(set(texts)), room, shown)

    def embed_classes(self, texts: Sequence[Sequence[str]], description: str = "classes") -> Tensor:
        """Return one embedding per class, (C, d): the mean of its texts' (Radford et al. 2021, Sec. 3.1.4).

        Args:
            texts: the texts of each class.
            description: shown by the progress bar.
        """
        progress = show_progress(texts, description=description)
        return torch.cat([_normalize(self.embed_texts(class_texts).mean(0, keepdim=True)) for class_texts in progress])


class OpenClipEncoder(ClipEncoder):
    """A frozen CLIP of `open_clip`."""

    @property
    def image_size(self) -> int:
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def image_features(self, images: Tensor) -> Tensor:
        settings = self.model.visual.preprocess_cfg
        return self.model.encode_image(normalize_for_clip(images, settings["mean"], settings["std"]))

    @property
    def max_length(self) -> int:
        return self.tokenizer.context_length

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        return [len(tokens) for tokens in self.tokenizer.tokenizer(list(texts), verbose=False)["input_ids"]]

    def text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def check_clip_name(name: str) -> None:
    """Raise UserError unless `name` is ARCHITECTURE/WEIGHTS of `open_clip` or may be a name on the hub."""
    architecture, _, weights = name.partition("/")
    if architecture in open_clip.list_models():
        known = open_clip.list_pretrained_tags_by_model(architecture)
        if weights not in known:
            raise UserError(f"CLIP {name}: name the weights of {architecture} as in {architecture}/WEIGHTS; available: "
                            f"{', '.join(known) or 'none'}")
    elif name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"CLIP {name}: no such folder; give one that holds a CLIP, or a name such as ViT-B-32/openai")


def _normalize(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()
