"""Models, photos and concepts of real shapes with random values: speed and size depend on shapes alone."""
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
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.covariance_files import save_covariance
from ldm.util import instantiate_from_config
from scripts.benchmarks.common import ROOT

PHOTOS = 5


def read_config(path: str | Path) -> DictConfig:
    """Read a config. A relative path counts from the project's root."""
    return OmegaConf.load(ROOT / path)


def random_model(section: Mapping[str, Any], **params: Any) -> Any:
    """Build the model of a config's section `model` with random weights, frozen.

    Args:
        section: the section.
        params: params that replace those of the section.
    """
    plain = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else dict(section)
    model = instantiate_from_config({"target": plain["target"], "params": {**plain["params"], **params}})
    return fill_zero_parameters(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def random_inference_model(config: DictConfig) -> Any:
    """Build the model of a config for inference, with random weights and without helper models."""
    helpers = {"covariance": None, "segmenter": None} if "covariance" in config.model.params else {}
    return random_model(config.model, ckpt_path=None, **helpers)


@torch.no_grad()
def fill_zero_parameters(module: nn.Module) -> nn.Module:
    """Draw all parameters that are zero from N(0, 0.02^2), because devices are faster with zeros."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return module


def meta_text_layers(config: str) -> dict[str, TextLayer]:
    """Return the layers of a config's U-Net that read text, on the meta device: shapes without values."""
    with torch.device("meta"):
        return name_text_layers(instantiate_from_config(read_config(config).model.params.unet_config))


def text_width(text_layers: Mapping[str, TextLayer]) -> int:
    """Return d, the width of the encodings that the layers read."""
    return next(iter(text_layers.values())).to_v.weight.shape[1]


def random_photos(folder: Path, side: int, count: int = PHOTOS, seed: int = 0) -> Path:
    """Create a folder of random PNG files, unless it exists, and return it."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        generator = np.random.default_rng(seed)
        for index in range(count):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:04d}.png")
    return folder


def random_covariance(width: int) -> Tensor:
    """Return the covariance (width, width) of random encodings, which is well conditioned."""
    encodings = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0))
    return encodings.mT @ encodings / len(encodings)


def write_covariance(encoder: Any, width: int, folder: Path) -> Path:
    """Write a random covariance as that of a text encoder, and return the file."""
    return save_covariance(folder / "covariance.safetensors", random_covariance(width), source="random numbers",
                           captions=4 * width, tokens="words", encoder=encoder_fingerprint(encoder))


def write_checkpoint(model: nn.Module, folder: Path) -> Path:
    """Write the model's weights in 16 bits, as public files have them, and return the file."""
    state = {name: weight.half() if weight.is_floating_point() else weight
             for name, weight in model.state_dict().items()}
    return save_tensors(folder / "base.safetensors", state, {})


def random_concept(text_layers: Mapping[str, TextLayer], word_width: int, base: str, index: int) -> Concept:
    """Return a concept `<subject-INDEX>` with random values, as training would produce it.

    Args:
        text_layers: the layers of the U-Net that read text.
        word_width: width of word embeddings.
        base: fingerprint of the base model.
        index: seed of the values.
    """
    generator = torch.Generator().manual_seed(index)
    width = text_width(text_layers)

    def random_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().float()  # rounded as in a 16-bit file

    values = {name: random_tensor(len(layer.to_v.weight)) for name, layer in text_layers.items()}
    embedding = random_tensor(1, word_width)
    target_input, super_input = random_tensor(width), random_tensor(width)
    return Concept(placeholder=f"<subject-{index}>", super_category="teddy bear", embedding=embedding,
                   target_input=target_input, super_input=super_input, target_outputs_v=values, steps=400, base=base,
                   dual=target_input)  # C is the identity
