"""A step of the U-Net of diffusers with concepts in the prompt, compared with the same step without.

Prompts are random, as packed rows (`ldm.integrations.diffusers.rows`); with guidance, a step has two of them.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ldm.integrations.diffusers.processors import LayerEdit, install, text_layers
from ldm.integrations.diffusers.rows import packed_width
from scripts.benchmarks.baselines import unet_settings
from scripts.benchmarks.common import (
    BenchmarkRow,
    BenchmarkSettings,
    Goal,
    median_row,
    ratio_row,
    time_alternating,
)
from scripts.benchmarks.device import synchronize
from scripts.benchmarks.random_models import fill_zero_parameters, read_config

COUNTS = (1, 2)
GOAL = Goal(1.03)
TOKENS, PROMPTS = 77, 2


def build_unet(settings: BenchmarkSettings) -> nn.Module:
    """Return the U-Net of the shape's config, with random weights."""
    from diffusers import UNet2DConditionModel

    config = read_config(settings.shape.inference_config).model.params.unet_config.params
    unet = fill_zero_parameters(UNet2DConditionModel(**unet_settings(config))).eval().requires_grad_(False)
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    return unet.to(settings.device, dtype)


def step_with(unet: nn.Module, count: int, side: int) -> Callable[[], None]:
    """Return a function that runs one step with `count` concepts; 0: with plain embeddings."""
    weight, width = unet.conv_in.weight, unet.config.cross_attention_dim
    layers, owner = text_layers(unet), object()
    sample = torch.randn(PROMPTS, unet.config.in_channels, side, side).to(weight)
    rows = torch.randn(PROMPTS, TOKENS, packed_width(width, count) if count else width).to(weight)
    edits = {path: LayerEdit(_outputs(count, layer.to_v.weight)) for path, layer in layers.items()} if count else {}

    @torch.no_grad()
    def step() -> None:
        for layer in layers.values():
            layer.set_processor(plain[layer])
        if count:
            install(layers, width, edits, owner)
        unet(sample, 500, encoder_hidden_states=rows)
        synchronize(weight.device)

    plain = {layer: layer.processor for layer in layers.values()}
    return step


def _outputs(count: int, weight: Tensor) -> Tensor:
    return torch.randn(count, len(weight)).to(weight)


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    unet = build_unet(settings)
    latent_side = read_config(settings.shape.inference_config).model.params.image_size
    side = latent_side * settings.side // settings.shape.side
    steps = {str(count): step_with(unet, count, side) for count in (0, *COUNTS)}
    times = time_alternating(steps, settings.rounds)
    details = f"diffusers, {side}x{side} latents"
    yield median_row(f"a step without a concept, {details}", times["0"], "s")
    for count in COUNTS:
        name = f"a step with {count} concept{'s' * (count != 1)} / without, {details}"
        yield ratio_row(name, times[str(count)], times["0"], GOAL if settings.shape.has_goals else None)
