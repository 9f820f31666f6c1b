"""Load a concept encoder with its CLIP image tower, and encode the photos of a concept."""
from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import to_tensor
from ldm.models.clip_encoder import ClipEncoder, OpenClipEncoder
from ldm.modules.concept_encoder import ConceptEncoder, load_encoder
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.subject_features import SubjectFeatures

log = logging.getLogger(__name__)


def load_concept_encoder(folder: str | Path, device: torch.device | str = "cpu", base: str = "") -> ConceptEncoder:
    """Load the encoder of a folder, and the CLIP tower that its config names.

    Args:
        folder: such as models/mini/encoder.
        device: where to load it.
        base: `base_fingerprint` of the base model; "" checks nothing.

    Raises:
        UserError: the folder holds no encoder, its tower cannot be had, or it was trained for another base model.
    """
    head, settings = load_encoder(resolve_path(folder))
    if base and settings.base != base:
        raise UserError(f"encoder {folder}: was trained for another base model than the loaded one; train one for it, "
                        "or leave the encoder out")
    return ConceptEncoder(load_features(settings.tower, device), head, settings).to(device)


def load_features(tower: str, device: torch.device | str = "cpu") -> SubjectFeatures:
    """Load the CLIP tower that features come from.

    Args:
        tower: folder of a CLIP in open_clip's layout, or ARCHITECTURE/WEIGHTS such as ViT-L-14/openai.

    Raises:
        UserError: there is no such CLIP, or it is one of transformers.
    """
    clip = ClipEncoder.from_path(tower, device)
    if not isinstance(clip, OpenClipEncoder):
        raise UserError(f"encoder tower {tower}: must be a CLIP of open_clip, such as ViT-L-14/openai")
    visual = clip.model.visual
    return SubjectFeatures(visual, visual.image_mean, visual.image_std, clip.image_size).to(device)


def encode_photos(encoder: ConceptEncoder, photos: ConceptPhotos, text_encoder: PromptEncoder, super_category: str,
                  super_input: Tensor) -> Tensor:
    """Return Delta (d,) of the subject in photos with masks, and log in words what it looks like.

    Photos without a mask, in which the subject was not found, do not count.

    Raises:
        UserError: no photo has a mask.
    """
    shown = [index for index, photo in enumerate(photos.photos) if photo.mask is not None]
    move = encoder.predict([to_tensor(photos.images[index]) for index in shown],
                           [photos.mask(index)[0] for index in shown], super_input)
    look = encoder.nearest_look(text_encoder, super_category, move)
    if look is not None:
        log.info("%s: looks like: %s", photos.placeholder_token, look or f"a usual {super_category}")
    return move
