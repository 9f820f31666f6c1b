"""Add LoRAs to a loaded model."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.early_checks import check_lora
from ldm.checkpoints.lora_file import load_lora
from ldm.checkpoints.lora_merging import merge_lora, unmatched_names
from ldm.checkpoints.lora_names import UNET, name_layers
from ldm.checkpoints.pickled import printable
from ldm.inference.encoding import base_model_of
from ldm.inference.settings import LoraFile

log = logging.getLogger(__name__)

MOST_LISTED = 3  # names of layers in a warning


@torch.no_grad()
def add_loras(model: Any, loras: Sequence[str | Path | LoraFile]) -> None:
    """Add LoRAs to the weights of a model, in place, and log how many layers each changes.

    The model stays the base model of its concepts: what identifies it is taken before. Keys that concepts lock are
    computed from the weights with the LoRAs.

    Args:
        model: a text-to-image `LatentDiffusion`. It is to be discarded if this raises.
        loras: files, or "FILE:SCALE".

    Raises:
        UserError: a file is missing, damaged, or no LoRA for this kind of model.
    """
    if not loras:
        return
    model.base_model = base_model_of(model)
    unet, encoder = model.model.diffusion_model, model.cond_stage_model
    layers = name_layers(unet, getattr(encoder, "towers", None) or [encoder])
    changed = set()
    for one in map(LoraFile.parse, loras):
        check_lora(one.path)
        lora = load_lora(one.path)
        counts = merge_lora(lora, layers, one.scale)
        log.info("LoRA %s at %g: %d layers of the U-Net, %d of the text encoder", one.path, one.scale,
                 counts[UNET], counts.total() - counts[UNET])
        changed |= {layers[place].weight.data_ptr() for place in lora.layers.keys() & layers.keys()}
        others = unmatched_names(lora, layers)
        if others:
            log.warning("warning: LoRA %s: %d names fit no layer of this model and are left out (%s%s)", one.path,
                        len(others), ", ".join(map(printable, others[:MOST_LISTED])),
                        ", ..." if len(others) > MOST_LISTED else "")
    unet.lora_weights = frozenset(name for name, weight in unet.named_parameters() if weight.data_ptr() in changed)
