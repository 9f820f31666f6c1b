"""CLIP's features of whole texts and of images as conditions, for retrieval-augmented and image-conditioned models.

The public classes use OpenAI's package `clip`. These load the same weights, under the same keys, by `open_clip`.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence

import kornia
import open_clip
import torch
from torch import Tensor, nn

from ldm.common.errors import UserError, brief_reason
from ldm.common.paths import resolve_path
from ldm.modules.encoders.openclip_activation import create_pretrained
from ldm.modules.encoders.prompts import AbstractEncoder, OnDeviceOfWeights

log = logging.getLogger(__name__)

IMAGE_SIZE = (224, 224)


class FrozenCLIPTextEmbedder(OnDeviceOfWeights, AbstractEncoder):
    """Encode texts by CLIP: `forward` returns (B, d), `encode` repeats it to (B, n_repeat, d).

    Args:
        version: the CLIP, see `load_clip`.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        max_length: ignored, kept for the public configs; CLIP takes 77 tokens, and longer texts are cut off.
        n_repeat: number of equal tokens that `encode` returns.
        normalize: whether features have length 1.
    """

    def __init__(self, version: str = "ViT-L/14", device: str = "cuda", max_length: int = 77, n_repeat: int = 1,
                 normalize: bool = True) -> None:
        super().__init__()
        self.model = load_clip(version)
        self.max_length, self.n_repeat, self.normalize = max_length, n_repeat, normalize

    def freeze(self) -> None:
        """Take all parameters out of training."""
        self.requires_grad_(False).eval()

    def forward(self, text: Sequence[str] | str) -> Tensor:
        features = self.model.encode_text(tokenize_texts(text, self.model.context_length).to(self.device))
        return nn.functional.normalize(features, dim=1) if self.normalize else features

    def encode(self, text: Sequence[str] | str) -> Tensor:
        return self(text)[:, None].repeat(1, self.n_repeat, 1)


class FrozenClipImageEmbedder(OnDeviceOfWeights, nn.Module):
    """Encode images (B, 3, H, W) in [-1, 1] by CLIP to (B, d).

    Args:
        model: the CLIP, see `load_clip`, or one that is loaded already.
        jit: ignored, kept for the public configs.
        device: where the CLIP is loaded to.
        antialias: whether to blur images before they become smaller.
    """

    def __init__(self, model: str | nn.Module, jit: bool = False, device: str | torch.device = "cpu",
                 antialias: bool = False) -> None:
        super().__init__()
        self.model = (model if isinstance(model, nn.Module) else load_clip(model)).to(device)
        self.antialias = antialias
        for name, values in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD)):
            self.register_buffer(name, torch.tensor(values, device=device), persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize images to 224 pixels and normalize them as CLIP expects."""
        x = kornia.geometry.resize(x, IMAGE_SIZE, interpolation="bicubic", align_corners=True,
                                   antialias=self.antialias)
        return kornia.enhance.normalize((x + 1) / 2, self.mean, self.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(x))


def tokenize_texts(texts: Sequence[str] | str, length: int) -> Tensor:
    """Return the tokens (B, length) of texts, and log a warning with the number of those that are cut off."""
    given = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    long = [text for text in given if len(text.encode()) > length - 2 and len(tokenizer.encode(text)) > length - 2]
    if long:
        log.warning("warning: %d of %d texts are longer than the %d tokens that this CLIP reads, such as %r; their "
                    "ends are cut off", len(long), len(given), length - 2, long[0][:60])
    return open_clip.tokenize(given, length)


def load_clip(name: str) -> open_clip.CLIP:
    """Load a CLIP in evaluation mode.

    Args:
        name: one of OpenAI's, such as "ViT-L/14"; or ARCHITECTURE/WEIGHTS as `open_clip.list_pretrained` lists them; or
            a folder in the layout of `open_clip`. Named weights are downloaded once.

    Raises:
        UserError: if there is no such model, or it cannot be downloaded.
    """
    folder, openai = resolve_path(name), f"{name.replace('/', '-')}-quickgelu"
    architecture, _, weights = name.partition("/")
    if folder.is_dir():
        architecture, weights = f"local-dir:{folder}", None
    elif openai in open_clip.list_models():
        architecture, weights = openai, "openai"
    try:
        return create_pretrained(architecture, weights or None, require_pretrained=True).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = brief_reason(error)
        raise UserError(f"CLIP {name}: cannot be loaded ({reason}); give a folder that holds one, or the name of one "
                        "of OpenAI's, such as ViT-L/14") from None
