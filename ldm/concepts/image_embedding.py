"""Read embeddings that AUTOMATIC1111's web UI stores in PNG images.

The image has a text `sd-ti-embedding`: base64 of JSON, in which `{"TORCHTENSOR": lists of numbers}` is a tensor. Web
sites that compress images again remove it.
"""
from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from ldm.checkpoints.early_checks import IMAGE_EMBEDDING
from ldm.common.errors import UserError

TENSOR = "TORCHTENSOR"


def read_image_embedding(path: Path) -> Any:
    """Return what the web UI would have written to a .pt file.

    Raises:
        UserError: the image is damaged, or holds no embedding.
    """
    try:
        with Image.open(path) as image:
            text = image.text[IMAGE_EMBEDDING]
        return json.loads(base64.b64decode(text, validate=True), object_hook=_as_tensor)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError,
            RecursionError):
        raise UserError(f"{path}: an image whose embedding cannot be read; copy or download it again") from None


def _as_tensor(value: dict[str, Any]) -> Any:
    return torch.tensor(value[TENSOR], dtype=torch.float32) if value.keys() == {TENSOR} else value
