"""Predict a concept from photos in one pass: the tuning-encoder, for Perfusion's rank-one edit.

Source: Arar, Gal, Atzmon et al., "Domain-Agnostic Tuning-Encoder for Fast Personalization of Text-To-Image Models"
(SIGGRAPH Asia 2023, arXiv 2307.06925). Our form of it differs in four points:

* Values instead of LoRA. The paper's network predicts low-rank offsets of attention weights. Here it predicts Delta, a
  move of the encoding that all layers share: o*_V = W_V (i_super + strength Delta).
* Static. The result depends on the photos alone, not on the noised image, so it is an ordinary concept.
* Keys stay locked to the super-category, which the user names: o*_K = W_K i_super.
* The paper's dual path blends an attention with and without the concept. With the same keys in both paths, the blend is
  exactly a scale of the value offset, the `strength`.

Symbols as in `ldm.modules.rank_one`: d is the width of the text encodings. Delta is (d,).
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError, brief_reason
from ldm.common.files import load_tensors, save_tensors
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.noun_encodings import told_moves
from ldm.modules.subject_features import SubjectFeatures, cut_out
from ldm.util import check_param_names, check_param_types

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "concept-encoder"
LARGEST_INPUT = 5.0  # standard deviations from the mean, beyond which features are clipped


class ConceptHead(nn.Module):
    """The network H: features (B, F) and i_super (B, d) -> Delta (B, d). It starts at zero.

    Args:
        features: F.
        context_width: d.
        width: of its two hidden layers.
        dropout: share of hidden units that are left out in training.
    """

    def __init__(self, features: int, context_width: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = {"features": features, "context_width": context_width, "width": width}
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.layers = nn.Sequential(
            nn.Linear(features + context_width, width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(width, context_width))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def set_scale(self, features: Tensor) -> None:
        """Set the mean and deviation by which features are normalized, from those of the training set (M, F)."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0) + 1e-3)

    def forward(self, features: Tensor, super_inputs: Tensor) -> Tensor:
        normalized = ((features - self.mean) / self.std).clamp(-LARGEST_INPUT, LARGEST_INPUT)
        return self.layers(torch.cat([normalized, super_inputs], 1))


@dataclass(frozen=True)
class EncoderSettings:
    """The settings of an encoder, as its config.json has them.

    Attributes:
        tower: the CLIP whose image tower gives the features: a folder, or a name of open_clip.
        base: fingerprint of the base model whose encodings the head predicts moves of.
        templates: sentences with one `{}` each, that i_super is averaged over.
        looks: words of looks, of which the log names the nearest; "" stands for the usual look of a kind.
        strength: default factor of Delta.
        bias, temperature, projection, used_layers: settings of the concepts that are made without training.
    """

    tower: str
    base: str = ""
    templates: Sequence[str] = ("a photo of a {}",)
    looks: Sequence[str] = ()
    strength: float = 1.0
    bias: float = 0.75
    temperature: float = 0.1
    projection: str = "full"
    used_layers: Sequence[str] = ()


class ConceptEncoder(nn.Module):
    """Photos of a subject with masks, and i_super -> Delta.

    Args:
        features: computes the features of cut-outs.
        head: predicts Delta from them.
        settings: see there.
    """

    def __init__(self, features: SubjectFeatures, head: ConceptHead, settings: EncoderSettings) -> None:
        super().__init__()
        self.features, self.head, self.settings = features, head.eval().requires_grad_(False), settings

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], masks: Sequence[Tensor], super_input: Tensor) -> Tensor:
        """Return Delta, (d,): the mean of what each photo says. Photos without the subject do not count.

        Args:
            images: of each photo, (3, H, W) in [-1, 1].
            masks: of each photo, (H, W) in [0, 1].
            super_input: i_super, (d,).

        Raises:
            UserError: the subject is in no photo.
        """
        pairs = [cut_out(image, mask, self.features.size) for image, mask in zip(images, masks, strict=True)]
        found = [pair for pair in pairs if pair is not None]
        if not found:
            raise UserError("the encoder needs masks of the subject, and no photo has one: paint them (--masks FOLDER) "
                            "or give other words (--init_word)")
        device = self.features.mean.device
        features = self.features(torch.stack([image for image, _ in found]).to(device),
                                 torch.stack([mask for _, mask in found]).to(device))
        inputs = super_input.to(device).float().expand(len(features), -1)
        return self.head(features, inputs).mean(0).to(super_input.device)

    def nearest_look(self, text_encoder: PromptEncoder, noun: str, move: Tensor) -> str | None:
        """Return the words of the look whose move in the encoding of a noun is nearest to one (d,); None: no looks."""
        looks = self.settings.looks
        if not looks:
            return None
        told = told_moves(text_encoder, [noun] * len(looks), looks).to(move)
        return looks[int((told - move).norm(dim=1).argmin())]


def save_encoder(folder: str | Path, head: ConceptHead, settings: EncoderSettings,
                 metadata: Mapping[str, str] | None = None) -> None:
    """Write a head (float16) and the settings of its encoder. The tower is named in them, not stored.

    Args:
        folder: created if it is missing.
        head: the head.
        settings: the settings.
        metadata: texts in the header of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half() for name, value in head.state_dict().items()}
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt", **(metadata or {})})
    config = {"model_type": MODEL_TYPE, "head": head.config, **asdict(settings)}
    write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))


def load_encoder(folder: str | Path) -> tuple[ConceptHead, EncoderSettings]:
    """Load the head of an encoder's folder, and the settings.

    Raises:
        UserError: the folder holds no encoder, or its weights are missing, cut off or of another shape.
    """
    shape, settings = read_encoder_config(folder)
    try:
        head = ConceptHead(**shape)
        tensors, _ = load_tensors(Path(folder) / WEIGHTS)
        head.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (TypeError, RuntimeError, OverflowError) as error:
        reason = brief_reason(error)
        raise UserError(f"encoder {folder}: its weights do not fit its {CONFIG} ({reason}); copy it again") from None
    return head, settings


def read_encoder_config(folder: str | Path) -> tuple[dict[str, int], EncoderSettings]:
    """Return the shape of an encoder's head, and its settings.

    Raises:
        UserError: the folder holds no encoder, or a setting is unknown or of a wrong type.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
        raise UserError(f"encoder {folder}: holds no concept encoder; give a folder such as models/mini/encoder, or "
                        "leave it out")
    shape = config.pop("head", None)
    check_param_names(f"encoder {path}", EncoderSettings, config)
    check_param_types(f"encoder {path}", EncoderSettings, config)
    if not isinstance(shape, dict) or "tower" not in config:
        raise UserError(f"encoder {path}: names no {'tower' if isinstance(shape, dict) else 'head'}; copy it again")
    return shape, EncoderSettings(**config)
