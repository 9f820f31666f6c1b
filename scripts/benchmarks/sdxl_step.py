"""A training step of a concept on Stable Diffusion XL at several sizes: time and memory, compared in one run.

Perfusion takes its step as `main.py` does: both text encoders, the gates, and the U-Net with checkpointing. Beside it
are Perfusion with a word that stays (`embedding_lr: 0`, prompts encoded once), the frozen U-Net alone, and peft's LoRA
on `diffusers`' U-Net of the same shape. The LoRA is given encodings, latents and a vector: its step has no text encoder
and no first stage, in time or memory.
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.common.errors import UserError
from scripts.benchmarks import baselines
from scripts.benchmarks.common import BenchmarkRow, BenchmarkSettings, median_row, time_alternating
from scripts.benchmarks.device import PeakMemory, compute_dtype, memory_of, mixed_precision, synchronize
from scripts.benchmarks.perfusion_step import FrozenUNet, PerfusionStep
from scripts.benchmarks.random_models import fill_zero_parameters, read_config

SIDES, QUICK_SIDES = (512, 768, 1024), (256,)
BATCH_SIZE = 1


class LoraStep:
    """Trains a LoRA of rank 4 on the attention of `diffusers`' U-Net, from encodings and latents that are given.

    Args:
        settings: shape, device and size.
        frozen: a frozen U-Net of this project in the same shape, for the shapes of its inputs.

    Raises:
        UserError: diffusers or peft are not installed.
    """

    def __init__(self, settings: BenchmarkSettings, frozen: FrozenUNet) -> None:
        baselines.require_packages("diffusers", "peft")
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        self.device = settings.device
        params = OmegaConf.to_container(read_config(settings.shape.train_config).model.params.unet_config.params)
        shape = baselines.unet_settings(params)
        pooled = (params["adm_in_channels"] - baselines.SIZE_COUNT * shape["addition_time_embed_dim"],)
        self.unet = fill_zero_parameters(UNet2DConditionModel(**shape)).requires_grad_(False)
        self.unet.to(self.device, compute_dtype(self.device)).enable_gradient_checkpointing()
        self.unet.add_adapter(LoraConfig(r=baselines.LORA_RANK, lora_alpha=baselines.LORA_RANK,
                                         init_lora_weights="gaussian", target_modules=list(baselines.LORA_LAYERS)))
        trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.memory_holders = [self.unet, self.optimizer]
        self.inputs = {
            "sample": torch.randn(BATCH_SIZE, *frozen.latent_shape, device=self.device),
            "timestep": torch.randint(1000, (BATCH_SIZE,), device=self.device),
            "encoder_hidden_states": torch.randn(BATCH_SIZE, *frozen.context_shape, device=self.device),
            "added_cond_kwargs": {"text_embeds": torch.randn(BATCH_SIZE, *pooled, device=self.device),
                                  "time_ids": torch.full((BATCH_SIZE, baselines.SIZE_COUNT), float(settings.side),
                                                         device=self.device)}}

    def step(self) -> None:
        self.unet.train()
        with mixed_precision(self.device):
            predicted = self.unet(**self.inputs, return_dict=False)[0]
        nn.functional.mse_loss(predicted.float(), torch.randn_like(predicted, dtype=torch.float32)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    """Measure the sizes of Stable Diffusion XL, or the own size of a smaller model of its kind."""
    sides = QUICK_SIDES if settings.quick else SIDES
    for side in sides if settings.shape.name == "sdxl" else (settings.side,):
        shape = replace(settings.shape, side=side, quick_side=side)
        yield from _measure_side(replace(settings, shape=shape))
        gc.collect()


def _measure_side(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    details = f"batch {BATCH_SIZE}, {settings.side} px"
    steps: dict[str, tuple[Callable[[], object], list[Any]]] = {}
    perfusion = PerfusionStep(settings)
    frozen = FrozenUNet(perfusion)
    steps["Perfusion"] = _step_of(settings, perfusion), perfusion.memory_holders
    steps["Perfusion, a word that stays"] = _step_with_a_word_that_stays(settings, perfusion)
    steps["the frozen U-Net alone"] = _step_of(settings, frozen), frozen.memory_holders
    try:
        lora = LoraStep(settings, frozen)
        steps["peft's LoRA, rank 4, no encoders"] = lora.step, lora.memory_holders
    except UserError as error:
        yield BenchmarkRow(f"step of peft's LoRA, {details}", None, "s", note=str(error))

    yield from _rows(settings, steps, details)


def _step_of(settings: BenchmarkSettings, method: PerfusionStep | FrozenUNet) -> Callable[[], object]:
    """Return a step on one batch, by CUDA graphs if the device has them."""
    step, batch = method.make_step(graphed=settings.device.type == "cuda"), method.batch(BATCH_SIZE)
    return lambda: step(batch)


def _step_with_a_word_that_stays(settings: BenchmarkSettings, perfusion: PerfusionStep
                                 ) -> tuple[Callable[[], object], list[Any]]:
    """Return the step with `embedding_lr: 0` on the same model, and what such a run keeps on the device."""
    model, step = perfusion.model, _step_of(settings, perfusion)

    def step_with_fixed_prompts() -> None:
        learning_rate, model.embedding_lr = model.embedding_lr, 0.0
        step()
        model.embedding_lr = learning_rate

    kept = [model.model, model.first_stage_model, model.concepts, model.cached_latents.moments, perfusion.optimizer]
    return step_with_fixed_prompts, kept


def _rows(settings: BenchmarkSettings, steps: dict[str, tuple[Callable[[], object], list[Any]]], details: str
          ) -> Iterator[BenchmarkRow]:
    for step, _ in steps.values():  # the first step of each captures graphs and chooses algorithms
        step()
    peak = PeakMemory(settings.device)
    for name, (step, holders) in steps.items():
        used = peak.measure(step)
        if used is not None:
            yield BenchmarkRow(f"memory of {name}, {details}", (memory_of(holders) + used) / 1e9, "GB")

    def synchronized(step: Callable[[], object]) -> None:
        step()
        synchronize(settings.device)

    functions = {name: lambda step=step: synchronized(step) for name, (step, _) in steps.items()}
    for name, seconds in time_alternating(functions, settings.rounds, warm_up=False).items():
        yield median_row(f"step of {name}, {details}", seconds, "s")
