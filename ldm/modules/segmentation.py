"""Zero-shot masks: a segmenter finds, in each photo, the subject that the super-category names.

Perfusion weights its loss by a soft segmentation (arXiv 2305.01644, "Zero-shot mask loss"). The segmenter is CLIPSeg
(Lüddecke and Ecker, arXiv 2112.10003), or, for the mini model, one with a residual image tower. Masks are computed
once, before training, and cached on disk.
"""
from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from tqdm import tqdm
from transformers import CLIPSegForImageSegmentation, CLIPTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from ldm.common.errors import UserError
from ldm.common.files import write_atomically
from ldm.common.paths import resolve_path
from ldm.data.images import crop_square, read_image
from ldm.data.masks import mask_to_image
from ldm.modules.encoders.clip import tokenizer_folder
from ldm.modules.encoders.vocabulary import load_pretrained
from ldm.modules.residual_segmenter import is_residual, load_residual_segmenter

logger = logging.getLogger(__name__)

MIN_CONFIDENCE = 0.05  # a segmentation that is below this everywhere shows noise rather than the subject
MIN_PROBABILITY = 0.5  # an image in which no pixel is more likely than this gets no mask for inpainting
BATCH_SIZE = 8  # photos per call of the segmenter, which encodes the text once per call
LEVELS = 65535  # cached probabilities are PNG files with 16 bits per pixel
CACHED_DTYPES = (np.uint16, np.int32)  # the dtypes in which newer and older versions of Pillow read these files
CACHE_FORMAT = "squares-1"  # part of every cache key: change it when the crop or the file format changes


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
    """

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
        elif folder.is_absolute() or len(folder.parts) > 2:  # it cannot be the name of a model on the hub either
            raise UserError(f"segmenter {path}: no such folder; {remedy}")
        try:
            segmenter = (ResidualZeroShotSegmenter if is_residual(folder) else ZeroShotSegmenter)._load(path)
            _check_vocabulary(path, len(segmenter.tokenizer), segmenter.vocab_size)
        except UserError as error:
            raise UserError(f"segmenter {error}; {remedy}") from None
        except Exception as error:  # files, network, formats: each library involved has its own exceptions
            reason = " ".join(str(error).split())[:200]
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


def soft_mask(probabilities: torch.Tensor, name: str = "a photo") -> torch.Tensor:
    """Divide a segmentation (H, W) by its own maximum: the weights of the mask loss, in [0, 1].

    If the maximum is at most 0.05, the subject was not found. Then the function logs a warning that names the photo,
    and returns ones, which mask nothing.
    """
    maximum = probabilities.max()
    if not maximum > MIN_CONFIDENCE:  # this form is true for NaN, too
        logger.warning("%s: the segmenter does not find the super-category in it; used without a mask", name)
        return torch.ones_like(probabilities)
    return probabilities / maximum


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


def cached_masks(
    paths: Sequence[Path], segmenter: ZeroShotSegmenter, text: str, cache_dir: str | Path, size: int
) -> list[torch.Tensor]:
    """Compute the soft mask of each photo's centered square, the crop that `ConceptPhotos` trains on.

    Segmentations are cached, one PNG file per photo. The file's name depends on the photo's bytes, `text`, the
    segmenter and `size`. Files that cannot be read are made again.

    Args:
        paths: the photos.
        segmenter: the segmenter.
        text: what the photos show, the super-category.
        cache_dir: folder of the cached segmentations.
        size: side of the masks in pixels.

    Returns:
        One mask (1, size, size) per photo, in [0, 1].

    Raises:
        UserError: if a photo cannot be read.
    """
    # Read the segmentations that are cached.
    cache_paths = [_cache_path(Path(cache_dir), path, text, segmenter.fingerprint, size) for path in paths]
    segmentations = [_read_cached(cache_path, size) for cache_path in cache_paths]
    missing = [index for index, segmentation in enumerate(segmentations) if segmentation is None]

    # Compute the others, a batch of photos at a time.
    with tqdm(total=len(missing), desc=f"masks of {text!r}", disable=not missing) as bar:
        for first in range(0, len(missing), BATCH_SIZE):
            indices = missing[first:first + BATCH_SIZE]
            photos = [crop_square(read_image(paths[index]), size) for index in indices]
            for index, probabilities in zip(indices, segmenter.segment(photos, text, size), strict=True):
                _write_cached(cache_paths[index], probabilities)
                segmentations[index] = _quantize(probabilities) / LEVELS
            bar.update(len(indices))

    return [soft_mask(torch.from_numpy(segmentation).float(), str(path))[None]
            for path, segmentation in zip(paths, segmentations, strict=True)]


def mask_overlay(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Show a mask (H, W) or (1, H, W): the photo, and to its right the photo darkened where the mask is low."""
    weights = interpolate(mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:]), size=image.size[::-1])
    photo = image.convert("RGB")
    pair = Image.new("RGB", (2 * photo.width, photo.height))
    pair.paste(photo, (0, 0))
    pair.paste(photo, (photo.width, 0), mask_to_image(weights.clamp(0, 1)))  # onto black
    return pair


def _cache_path(folder: Path, photo: Path, text: str, fingerprint: str, size: int) -> Path:
    content = hashlib.blake2b(photo.read_bytes()).hexdigest()
    key = json.dumps([CACHE_FORMAT, content, text, fingerprint, size])
    return folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.png"


def _quantize(probabilities: torch.Tensor) -> np.ndarray:
    return (probabilities.numpy().astype(np.float64) * LEVELS).round().astype(np.uint16)


def _write_cached(path: Path, probabilities: torch.Tensor) -> None:
    image = Image.fromarray(_quantize(probabilities))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def _read_cached(path: Path, size: int) -> np.ndarray | None:
    """Read probabilities (size, size); return None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            levels = np.array(opened)
    except Exception as error:  # damaged PNG files raise many exceptions
        logger.warning("%s: cached mask cannot be read (%s); made again", path, error)
        return None
    if levels.shape != (size, size) or levels.dtype not in CACHED_DTYPES:
        logger.warning("%s: not a cached mask of %d pixels; made again", path, size)
        return None
    return levels / LEVELS
