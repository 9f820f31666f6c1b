"""Zero-shot masks: where in a photo is the thing that the super-category names?

Perfusion weighs its loss by a soft segmentation (arXiv 2305.01644, "Zero-shot mask loss"); the segmenter is CLIPSeg
(Lüddecke and Ecker, arXiv 2112.10003), for the mini model one with a residual image tower. Masks are computed once,
before training, and kept on disk.
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
from ldm.data.images import read_image, square
from ldm.data.masks import as_picture
from ldm.modules.encoders.clip import tokenizer_folder
from ldm.modules.encoders.vocabulary import load_pretrained
from ldm.modules.residual_segmenter import is_residual, load_residual_segmenter

logger = logging.getLogger(__name__)

FAINTEST = 0.05  # below this everywhere, a segmentation shows noise rather than the thing
LIKELY = 0.5  # a thing that is nowhere more likely than this is not drawn over
AT_A_TIME = 8  # photos: what they have in common, such as the encoded text, is computed once for all of them
LEVELS = 65535  # cached probabilities are PNG files with 16 bits a pixel
SIXTEEN_BITS = (np.uint16, np.int32)  # what newer and older versions of Pillow read of these
CACHE_FORMAT = "squares-1"  # part of every key: change it when crop or storage change


@dataclass(frozen=True)
class Preprocessing:
    """How the segmenter wants its pictures: (height, width), Pillow's resampling filter, mean and deviation."""

    size: tuple[int, int]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any], model_side: int) -> Preprocessing:
        """Reads preprocessor_config.json; `model_side` is used where it names no size.

        The public CLIPSeg was trained at 224 pixels and is run at 352: the file's size goes before the model's.
        """
        size = config.get("size") or model_side
        if isinstance(size, dict):
            side = size.get("shortest_edge", model_side)
            size = (size.get("height", side), size.get("width", side))
        height, width = (size, size) if isinstance(size, int) else size
        resample = config.get("resample", Image.Resampling.BILINEAR)
        return cls((height, width), int(resample), tuple(config["image_mean"]), tuple(config["image_std"]))

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures of any sizes to one batch (n, 3, H, W)."""
        height, width = self.size
        resized = [image.convert("RGB").resize((width, height), self.resample) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in resized]).movedim(-1, 1) / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class ZeroShotSegmenter:
    """A CLIPSeg model with the tokenizer and the preprocessing that it was trained with."""

    def __init__(self, model: nn.Module, tokenizer: CLIPTokenizer, preprocessing: Preprocessing) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    @classmethod
    def from_path(cls, path: str | Path, device: torch.device | str = "cpu", instead: str = "") -> ZeroShotSegmenter:
        """Loads a folder (config.json, model.safetensors, tokenizer files, preprocessor_config.json) or a hub name.

        A folder may hold a `ResidualSegmenter` instead of a CLIPSeg. `instead` is what a user may do without a
        segmenter, for the message of an error.

        Raises:
            UserError: it cannot be loaded, or is no complete segmenter.
        """
        remedy = "give a folder with a CLIPSeg model" + (f", or {instead}" if instead else "")
        folder = Path(path)
        if folder.is_dir():
            if not (folder / "config.json").is_file():  # transformers would build a large model of its defaults
                raise UserError(f"segmenter {path}: has no config.json; {remedy}")
        elif folder.is_absolute() or len(folder.parts) > 2:  # nor can it be the name of a model on the hub
            raise UserError(f"segmenter {path}: no such folder; {remedy}")
        try:
            made = (ResidualZeroShotSegmenter if is_residual(folder) else ZeroShotSegmenter)._loaded(path)
            _refuse_other_vocabulary(path, len(made.tokenizer), made.vocabulary)
        except UserError as error:
            raise UserError(f"segmenter {error}; {remedy}") from None
        except Exception as error:  # files, network, formats: each library in between has its own exceptions
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"segmenter {path}: cannot be loaded ({reason}); {remedy}") from error
        made.model.to(device)
        return made

    @classmethod
    def _loaded(cls, path: str | Path) -> ZeroShotSegmenter:
        model = load_pretrained(CLIPSegForImageSegmentation, path)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(Path(path)) if Path(path).is_dir() else path)
        return cls(model, tokenizer, _preprocessing(path, model.config.vision_config.image_size))

    @property
    def vocabulary(self) -> int:
        """How many words the model has rows for."""
        return self.model.config.text_config.vocab_size

    @property
    def longest_text(self) -> int:
        """In tokens, the marks for start and end included."""
        return self.model.config.text_config.max_position_embeddings

    def meaning(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, d) for the word-piece numbers of a text, (1, N)."""
        return self.model.get_conditional_embeddings(
            batch_size=1, input_ids=tokens, attention_mask=torch.ones_like(tokens))

    def logits(self, pixels: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
        """(n, H, W) for prepared pictures (n, 3, H, W) and what is looked for in each of them, (n, d)."""
        logits = self.model(pixel_values=pixels, conditional_embeddings=meaning).logits
        return logits.reshape(len(pixels), *logits.shape[-2:])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the weights, the vocabulary's size and the preprocessing: another segmenter makes other masks."""
        digest = hashlib.blake2b(f"{len(self.tokenizer)} {self.preprocessing}".encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def segment(
        self, images: Sequence[Image.Image], text: str, size: int | tuple[int, int] | None = None
    ) -> torch.Tensor:
        """How likely each pixel shows `text`: (n, H, W) float32 in [0, 1] on the CPU.

        Pictures of any sizes go in as one batch; `size` is the side or the (height, width) of what comes out, None
        the model's own.
        """
        device = next(self.model.parameters()).device
        tokens = self.tokenizer([text], truncation=True, max_length=self.longest_text, return_tensors="pt")
        meaning = self.meaning(tokens.input_ids.to(device))
        pixels = self.preprocessing(images).to(device)
        logits = self.logits(pixels, meaning.expand(len(images), -1))
        probabilities = logits[:, None].float().sigmoid().cpu()
        if size is not None:
            probabilities = interpolate(probabilities, size=size, mode="bilinear", antialias=True, align_corners=False)
        return probabilities[:, 0].clamp(0, 1)


class ResidualZeroShotSegmenter(ZeroShotSegmenter):
    """A `ResidualSegmenter` with its tokenizer and its preprocessing."""

    @classmethod
    def _loaded(cls, path: str | Path) -> ZeroShotSegmenter:
        folder = Path(path)
        model = load_residual_segmenter(folder)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
        return cls(model, tokenizer, _preprocessing(path, model.config["vision_cfg"]["image_size"]))

    @property
    def vocabulary(self) -> int:
        return self.model.config["text_cfg"]["vocab_size"]

    @property
    def longest_text(self) -> int:
        return self.model.longest_text

    def meaning(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(tokens)

    def logits(self, pixels: torch.Tensor, meaning: torch.Tensor) -> torch.Tensor:
        """Of the pictures and of their mirror images, in the mean: what only one of them suggests is mostly wrong."""
        return (self.model(pixels, meaning) + self.model(pixels.flip(-1), meaning).flip(-1)) / 2


def _preprocessing(path: str | Path, side: int) -> Preprocessing:
    return Preprocessing.from_config(ImageProcessingMixin.get_image_processor_dict(path)[0], side)


def _refuse_other_vocabulary(path: str | Path, words: int, rows: int) -> None:
    """transformers takes a folder without tokenizer files for an empty vocabulary, and says nothing."""
    if words != rows:
        raise UserError(f"{path}: its tokenizer knows {words} tokens, its model {rows} (are files missing?)")


def soft_mask(probabilities: torch.Tensor, name: str = "a photo") -> torch.Tensor:
    """A segmentation (H, W) divided by its own maximum (perfusion.md, "Training"): in [0, 1], 1 at its surest point.

    Where it is nowhere above 0.05, the thing was not found: a warning naming the photo, and ones, which hide nothing.
    """
    surest = probabilities.max()
    if not surest > FAINTEST:  # written so that NaN fails too
        logger.warning("%s: the segmenter does not find the super-category in it; used without a mask", name)
        return torch.ones_like(probabilities)
    return probabilities / surest


def clear_mask(probabilities: torch.Tensor, text: str, name: str) -> torch.Tensor:
    """A segmentation (H, W) of the picture `name` as ones, where it shows `text`, and zeros.

    It does where it is at least half as likely as at its surest point: segmenters differ in how sure they are.

    Raises:
        UserError: it is nowhere more likely than not.
    """
    surest = probabilities.max()
    if not surest > LIKELY:  # written so that NaN fails too
        raise UserError(f"{name}: the segmenter finds no {text} in it ({100 * surest:.0f} % likely at most); choose "
                        "another word, or paint a mask yourself")
    return (probabilities >= surest / 2).float()


def cached_masks(
    paths: Sequence[Path], segmenter: ZeroShotSegmenter, text: str, cache_dir: str | Path, size: int
) -> list[torch.Tensor]:
    """The soft mask (1, size, size) of each photo's centred square, in the frame of `PersonalizedBase`'s images.

    Segmentations are kept in `cache_dir`, one PNG per photo, under a key that covers the photo's bytes, `text`, the
    segmenter and `size`; files that cannot be read are made again.

    Raises:
        UserError: a photo cannot be read.
    """
    cached = [_cache_path(Path(cache_dir), path, text, segmenter.fingerprint, size) for path in paths]
    found = [_read_cached(entry, size) for entry in cached]
    missing = [place for place, probabilities in enumerate(found) if probabilities is None]
    with tqdm(total=len(missing), desc=f"masks of {text!r}", disable=not missing) as bar:
        for first in range(0, len(missing), AT_A_TIME):
            places = missing[first:first + AT_A_TIME]
            photos = [square(read_image(paths[place]), size) for place in places]
            for place, probabilities in zip(places, segmenter.segment(photos, text, size), strict=True):
                _write_cached(cached[place], probabilities)
                found[place] = _quantised(probabilities) / LEVELS
            bar.update(len(places))
    return [soft_mask(torch.from_numpy(probabilities).float(), str(path))[None]
            for path, probabilities in zip(paths, found, strict=True)]


def mask_overlay(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """For the eye: the photo, and beside it the photo with what the mask (H, W) or (1, H, W) hides darkened."""
    weights = interpolate(mask.detach().float().cpu().reshape(1, 1, *mask.shape[-2:]), size=image.size[::-1])
    kept = as_picture(weights.clamp(0, 1))
    photo = image.convert("RGB")
    pair = Image.new("RGB", (2 * photo.width, photo.height))
    pair.paste(photo, (0, 0))
    pair.paste(photo, (photo.width, 0), kept)  # on black
    return pair


def _cache_path(folder: Path, photo: Path, text: str, fingerprint: str, size: int) -> Path:
    content = hashlib.blake2b(photo.read_bytes()).hexdigest()
    key = json.dumps([CACHE_FORMAT, content, text, fingerprint, size])
    return folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.png"


def _quantised(probabilities: torch.Tensor) -> np.ndarray:
    return (probabilities.numpy().astype(np.float64) * LEVELS).round().astype(np.uint16)


def _write_cached(path: Path, probabilities: torch.Tensor) -> None:
    picture = Image.fromarray(_quantised(probabilities))
    write_atomically(path, lambda aside: picture.save(aside, format="PNG"))


def _read_cached(path: Path, size: int) -> np.ndarray | None:
    """Probabilities (size, size), or None where there is no such file or no whole one."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as opened:
            levels = np.array(opened)
    except Exception as error:  # damaged PNG files raise many things
        logger.warning("%s: cached mask cannot be read (%s); made again", path, error)
        return None
    if levels.shape != (size, size) or levels.dtype not in SIXTEEN_BITS:
        logger.warning("%s: not a cached mask of %d pixels; made again", path, size)
        return None
    return levels / LEVELS
