"""Zero-shot masks: a segmenter finds, in each photo, the subject that the super-category names.

Perfusion weights its loss by a soft segmentation (arXiv 2305.01644, "Zero-shot mask loss"). The segmenter is CLIPSeg
(Lüddecke and Ecker, arXiv 2112.10003), or, for the mini model, one with a residual image tower. Masks are computed
once, before training, and cached on disk.
"""
from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from ldm.common.errors import UserError, brief_reason
from ldm.common.hub import check_model_name
from ldm.common.paths import resolve_path
from ldm.data.masks import mask_to_image
from ldm.modules.encoders.clip import tokenizer_folder
from ldm.modules.encoders.vocabulary import load_pretrained
from ldm.modules.residual_segmenter import is_residual, load_residual_segmenter

logger = logging.getLogger(__name__)

MIN_CONFIDENCE = 0.05  # a segmentation that is below this everywhere shows noise rather than the subject
MIN_PROBABILITY = 0.5  # an image in which no pixel is more likely than this gets no mask for inpainting


@dataclass(frozen=True)
class Preprocessing:
    """Prepare images as the segmenter expects them.

    Attributes:
        size: (height, width) in pixels.
        resample: Pillow's number of the resampling filter.
        mean, std: mean and standard deviation of each color channel, for pixels in [0, 1].
    """

    size: tuple[int, int]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any], model_side: int) -> Preprocessing:
        """Read the settings of a preprocessor_config.json; `model_side` is the size if the file has none.

        The public CLIPSeg was trained at 224 pixels and is run at 352, so the file's size has precedence.
        """
        size = config.get("size") or model_side
        if isinstance(size, dict):
            side = size.get("shortest_edge", model_side)
            size = (size.get("height", side), size.get("width", side))
        height, width = (size, size) if isinstance(size, int) else size
        resample = config.get("resample", Image.Resampling.BILINEAR)
        return cls((height, width), int(resample), tuple(config["image_mean"]), tuple(config["image_std"]))

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Turn n images of any sizes into one batch (n, 3, H, W)."""
        height, width = self.size
        resized = [image.convert("RGB").resize((width, height), self.resample) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in resized]).movedim(-1, 1) / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class ZeroShotSegmenter:
    """A CLIPSeg model with its tokenizer and preprocessing.

    Example::

        segmenter = ZeroShotSegmenter.from_path("models/mini/segmenter")
        probabilities = segmenter.segment([image], "teddy bear", size=512)  # (1, 512, 512) in [0, 1]

    Attributes:
        needs_varied_views: whether `ldm.modules.subject_masks` shows it several views of a photo.
    """

    needs_varied_views: ClassVar[bool] = False

    def __init__(self, model: nn.Module, tokenizer: CLIPTokenizer, preprocessing: Preprocessing) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    @classmethod
    def from_path(cls, path: str | Path, device: torch.device | str = "cpu", instead: str = "") -> ZeroShotSegmenter:
        """Load a CLIPSeg model or a `ResidualSegmenter`.

        Args:
            path: a folder with config.json, model.safetensors, preprocessor_config.json and tokenizer files, or the
                name of a model on the hub.
            device: device of the model.
            instead: what a user can do without a segmenter; completes the error message.

        Raises:
            UserError: if it cannot be loaded, or is not a complete segmenter.
        """
        remedy = "give a folder with a CLIPSeg model" + (f", or {instead}" if instead else "")
        folder = resolve_path(path)
        if folder.is_dir():
            path = folder
            if not (folder / "config.json").is_file():  # transformers would build a large model of its defaults
                raise UserError(f"segmenter {path}: has no config.json; {remedy}")
        else:
            check_model_name("segmenter", path, remedy)
        try:
            segmenter = (ResidualZeroShotSegmenter if is_residual(folder) else ZeroShotSegmenter)._load(path)
            _check_vocabulary(path, len(segmenter.tokenizer), segmenter.vocab_size)
        except UserError as error:
            raise UserError(f"segmenter {error}; {remedy}") from None
        except Exception as error:  # files, network, formats: each library involved has its own exceptions
            reason = brief_reason(error)
            raise UserError(f"segmenter {path}: cannot be loaded ({reason}); {remedy}") from error
        segmenter.model.to(device)
        return segmenter

    @classmethod
    def _load(cls, path: str | Path) -> ZeroShotSegmenter:
        model = load_pretrained(CLIPSegForImageSegmentation, path)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(Path(path)) if Path(path).is_dir() else path)
        return cls(model, tokenizer, _read_preprocessing(path, model.config.vision_config.image_size))

    @property
    def vocab_size(self) -> int:
        """Number of rows of the model's word table."""
        return self.model.config.text_config.vocab_size

    @property
    def max_text_length(self) -> int:
        """Number of tokens that the model reads, start and end tokens included."""
        return self.model.config.text_config.max_position_embeddings

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed the tokens (1, N) of a text, to (1, d)."""
        return self.model.get_conditional_embeddings(
            batch_size=1, input_ids=tokens, attention_mask=torch.ones_like(tokens))

    def logits(self, pixels: torch.Tensor, text_embedding: torch.Tensor) -> torch.Tensor:
        """Compute the logits (n, H, W) of preprocessed images (n, 3, H, W) for a text each, (n, d)."""
        logits = self.model(pixel_values=pixels, conditional_embeddings=text_embedding).logits
        return logits.reshape(len(pixels), *logits.shape[-2:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the weights, the vocabulary's size and the preprocessing, on which the masks depend."""
        digest = hashlib.blake2b(f"{len(self.tokenizer)} {self.preprocessing}".encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def segment(
        self, images: Sequence[Image.Image], text: str, size: int | tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Compute how likely each pixel shows what `text` names.

        Args:
            images: n images of any sizes; they go through the model as one batch.
            text: what to look for; words past `max_text_length` are cut off.
            size: side or (height, width) of the result; None: the model's own size.

        Returns:
            (n, H, W) float32 in [0, 1], on the CPU.
        """
        device = next(self.model.parameters()).device
        tokens = self.tokenizer([text], truncation=True, max_length=self.max_text_length, return_tensors="pt")
        text_embedding = self.embed_text(tokens.input_ids.to(device))
        pixels = self.preprocessing(images).to(device)
        logits = self.logits(pixels, text_embedding.expand(len(images), -1))
        probabilities = logits[:, None].float().sigmoid().cpu()
        if size is not None:
            probabilities = interpolate(probabilities, size=size, mode="bilinear", antialias=True, align_corners=False)
        return probabilities[:, 0].clamp(0, 1)


class ResidualZeroShotSegmenter(ZeroShotSegmenter):
    """A `ResidualSegmenter` with its tokenizer and preprocessing."""

    needs_varied_views: ClassVar[bool] = True

    @classmethod
    def _load(cls, path: str | Path) -> ZeroShotSegmenter:
        folder = Path(path)
        model = load_residual_segmenter(folder)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(model, tokenizer, _read_preprocessing(path, model.config["vision_cfg"]["image_size"]))

    @property
    def vocab_size(self) -> int:
        return self.model.config["text_cfg"]["vocab_size"]

    @property
    def max_text_length(self) -> int:
        return self.model.max_text_length

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens)

    def logits(self, pixels: torch.Tensor, text_embedding: torch.Tensor) -> torch.Tensor:
        """Average the logits of the images and of their mirror images: an error is rarely in both."""
        mirrored = self.model(pixels.flip(-1), text_embedding).flip(-1)
        return (self.model(pixels, text_embedding) + mirrored) / 2


def _read_preprocessing(path: str | Path, model_side: int) -> Preprocessing:
    return Preprocessing.from_config(ImageProcessingMixin.get_image_processor_dict(path)[0], model_side)


def _check_vocabulary(path: str | Path, tokenizer_size: int, model_size: int) -> None:
    """Raise UserError if the tokenizer is not the model's. Without its files transformers uses an empty vocabulary."""
    if tokenizer_size != model_size:
        raise UserError(f"{path}: its tokenizer knows {tokenizer_size} tokens, its model {model_size} "
                        "(are files missing?)")


def threshold_mask(probabilities: torch.Tensor, text: str, name: str) -> torch.Tensor:
    """Turn a segmentation (H, W) into ones, where the image shows `text`, and zeros.

    The threshold is half of the maximum, because segmenters differ in how confident they are.

    Args:
        probabilities: (H, W) in [0, 1].
        text: what was looked for.
        name: name of the image, for the error message.

    Raises:
        UserError: if no pixel is more likely than not.
    """
    maximum = probabilities.max()
    if not maximum > MIN_PROBABILITY:  # this form is true for NaN, too
        raise UserError(f"{name}: the segmenter finds no {text} in it ({100 * maximum:.0f} % likely at most); choose "
                        "another word, or paint a mask yourself")
    return (probabilities >= maximum / 2).float()


def mask_overlay(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Show a mask (H, W) or (1, H, W): the photo, and to its right the photo darkened where the mask is low."""
    weights = interpolate(mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:]), size=image.size[::-1])
    photo = image.convert("RGB")
    pair = Image.new("RGB", (2 * photo.width, photo.height))
    pair.paste(photo, (0, 0))
    pair.paste(photo, (photo.width, 0), mask_to_image(weights.clamp(0, 1)))  # onto black
    return pair
