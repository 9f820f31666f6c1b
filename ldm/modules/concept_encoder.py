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
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.modules.subject_features import SubjectFeatures, cut_out

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


class ConceptEncoder(nn.Module):
    """Photos of a subject with masks, and i_super -> Delta.

    Args:
        features: computes the features of cut-outs.
        head: predicts Delta from them.
        base: fingerprint of the base model whose encodings the head was trained on.
        strength: default factor of Delta in concepts.
    """

    def __init__(self, features: SubjectFeatures, head: ConceptHead, base: str = "", strength: float = 1.0) -> None:
        super().__init__()
        self.features, self.head = features, head.eval().requires_grad_(False)
        self.base, self.strength = base, strength

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], masks: Sequence[Tensor], super_input: Tensor) -> Tensor:
        """Return Delta, (d,): the mean of what each photo says.

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
            raise UserError("the encoder finds the subject in no photo; paint masks (--masks), or train without it "
                            "(model.params.encoder=null)")
        device = super_input.device
        features = self.features(torch.stack([image for image, _ in found]).to(device),
                                 torch.stack([mask for _, mask in found]).to(device))
        return self.head(features, super_input.expand(len(features), -1)).mean(0)

    def save(self, folder: str | Path, settings: Mapping[str, object]) -> None:
        """Write the head (float16) and the settings of the encoder; the tower is named in them, not stored.

        Args:
            folder: created if it is missing.
            settings: further keys of config.json, `tower` among them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half() for name, value in self.head.state_dict().items()}
        save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        config = {"model_type": MODEL_TYPE, "base": self.base, "strength": self.strength, "head": self.head.config,
                  **settings}
        write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))


def read_encoder_config(folder: str | Path) -> dict[str, object]:
    """Return the settings of an encoder's folder.

    Raises:
        UserError: it is none.
    """
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise UserError(f"encoder {folder}: holds no concept encoder; give a folder such as models/mini/encoder, or "
                        "null")
    return config


def load_head(folder: str | Path, config: Mapping[str, object]) -> ConceptHead:
    """Load the head of an encoder's folder.

    Raises:
        UserError: its weights are missing, cut off or of another shape.
    """
    try:
        head = ConceptHead(**config["head"])
        tensors, _ = load_tensors(Path(folder) / WEIGHTS)
        head.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"encoder {folder}: its weights do not fit its {CONFIG} ({reason}); copy it again") from None
    return head
