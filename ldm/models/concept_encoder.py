"""Load a concept encoder with its CLIP image tower."""
from __future__ import annotations

from pathlib import Path

import torch

from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.models.clip_encoder import ClipEncoder, OpenClipEncoder
from ldm.modules.concept_encoder import ConceptEncoder, load_head, read_encoder_config
from ldm.modules.subject_features import SubjectFeatures


def load_concept_encoder(folder: str | Path, device: torch.device | str = "cpu", base: str = "") -> ConceptEncoder:
    """Load the encoder of a folder, and the CLIP tower that its config names.

    Args:
        folder: such as models/mini/encoder.
        device: where to load it.
        base: `base_fingerprint` of the base model; "" checks nothing.

    Raises:
        UserError: the folder holds no encoder, its tower cannot be had, or it was trained for another base model.
    """
    found = resolve_path(folder)
    config = read_encoder_config(found)
    if base and config["base"] != base:
        raise UserError(f"encoder {folder}: was trained for another base model than the loaded one; train one for it "
                        "(configs/encoder-sd-v1.yaml), or leave the encoder out (model.params.encoder=null)")
    features = load_features(config["tower"], device)
    return ConceptEncoder(features, load_head(found, config), str(config["base"]), float(config["strength"])).to(device)


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
