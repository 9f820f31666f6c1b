"""Models, photos and concepts of the real shapes with random numbers in them: speed and size depend on shapes alone."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from ldm.common.files import save_tensors
from ldm.concepts.concept import Concept
from ldm.modules.attention import name_text_layers
from ldm.modules.context import TextLayer
from ldm.modules.covariance import encoder_fingerprint, save_covariance
from ldm.util import instantiate_from_config
from scripts.benchmarks.common import ROOT

PHOTOS = 5


def read_config(path: str | Path) -> DictConfig:
    """A config of the project, by its path in it, or of any other place."""
    return OmegaConf.load(ROOT / path)


def random_model(section: Mapping[str, Any], **params: Any) -> Any:
    """What a config's section `model` describes, frozen.

    Parts that training starts at zero get small numbers: devices are faster with zeros.
    """
    plain = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
    model = instantiate_from_config({"target": plain["target"], "params": {**plain["params"], **params}})
    return filled(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """The module, its parameters that are all zero drawn from N(0, 0.02^2)."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return module


def unet_layers(config: str) -> dict[str, TextLayer]:
    """The layers of a config's U-Net that read text, with shapes but no numbers."""
    with torch.device("meta"):
        return name_text_layers(instantiate_from_config(read_config(config).model.params.unet_config))


def random_photos(folder: Path, side: int, count: int = PHOTOS, seed: int = 0) -> Path:
    """A folder of PNG files of `side` pixels; made once."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        generator = np.random.default_rng(seed)
        for number in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


def random_covariance(width: int) -> Tensor:
    """A covariance (width, width) of random encodings, well conditioned."""
    encodings = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0))
    return encodings.mT @ encodings / len(encodings)


def covariance_file(encoder: Any, width: int, folder: Path) -> Path:
    """Such a covariance as the file of a text encoder whose encodings have so many numbers."""
    return save_covariance(folder / "covariance.safetensors", random_covariance(width), source="random numbers",
                           captions=4 * width, tokens="words", encoder=encoder_fingerprint(encoder))


def checkpoint_file(model: nn.Module, folder: Path) -> Path:
    """The model's weights in 16 bits, as public files have them."""
    halves = {name: weight.half() if weight.is_floating_point() else weight
              for name, weight in model.state_dict().items()}
    return save_tensors(folder / "base.safetensors", halves, {})


def random_concept(layers: Mapping[str, TextLayer], word_width: int, base: str, number: int) -> Concept:
    """A concept `<number>` for these layers, as training would leave it."""
    generator = torch.Generator().manual_seed(number)
    width = next(iter(layers.values())).to_v.weight.shape[1]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().float()  # as a file of 16 bits has it

    values = {name: drawn(len(layer.to_v.weight)) for name, layer in layers.items()}
    return Concept(placeholder=f"<thing-{number}>", super_category="teddy bear", embedding=drawn(1, word_width),
                   target_input=drawn(width), super_input=drawn(width), target_output_v=values, steps=400, base=base)
