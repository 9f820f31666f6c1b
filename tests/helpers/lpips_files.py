"""The two weight files of the perceptual network, with random weights and few channels."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.models.vgg import make_layers

from ldm.modules.losses.perceptual import SOURCES

WIDTHS = (4, 4, "M", 6, 6, "M", 8, 8, 8, "M", 8, 8, 8, "M", 8, 8, 8, "M")  # VGG16's shape
ENDS = (4, 6, 8, 8, 8)  # output channels of each block


def write_lpips(folder: Path, widths: Sequence[int | str] = WIDTHS) -> nn.Sequential:
    """Write both files; return the VGG whose weights the first one holds, as torchvision builds it."""
    torch.manual_seed(5)
    layers = make_layers(list(widths))
    vgg, linear = SOURCES
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, folder / vgg)
    torch.save({f"lin{block}.model.1.weight": torch.rand(1, width, 1, 1) for block, width in enumerate(ENDS)},
               folder / linear)
    return layers
