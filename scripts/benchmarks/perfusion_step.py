"""A training step of a concept as `main.py` makes it, without the rest of a run: no loggers, no progress bar."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.context import PromptContext
from ldm.modules.fast.cuda_graphs import GraphedEncoder, GraphedUNet, vector_kwargs
from ldm.training.callbacks import AccelerateFrozenUNet
from scripts.benchmarks.common import BenchmarkSettings
from scripts.benchmarks.device import compute_dtype, mixed_precision
from scripts.benchmarks.random_models import (
    random_model,
    random_photos,
    read_config,
    text_width,
    write_covariance,
)

PRECISIONS = {torch.bfloat16: "bf16-mixed", torch.float32: "32-true"}  # Lightning's names


class PerfusionStep:
    """A concept of random photos, its model and its optimizer.

    Args:
        settings: shape, device and size.

    Attributes:
        data: the photos.
        model: the model with the concept, prepared as Lightning's trainer does before the first step.
        optimizer: optimizer of the concept.
    """

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        config = read_config(settings.shape.train_config)
        data = config.data.params.train.params
        folder = random_photos(settings.folder / f"photos_{settings.side}", settings.side)
        templates = data.templates if isinstance(data.templates, str) else list(data.templates)
        self.data = ConceptPhotos(folder, settings.side, flip_p=data.get("flip_p", 0.5),
                                     placeholder_token=config.model.params.placeholder, templates=templates)
        self.model = random_model(config.model, ckpt_path=None, segmenter=None, covariance=None, seed=0)
        self._prepare()
        self.optimizer = self.model.configure_optimizers()["optimizer"]

    def _prepare(self) -> None:
        """Do what Lightning's trainer does before the first step."""
        model = self.model
        width = text_width(model.text_layers)
        model.covariance = str(write_covariance(model.cond_stage_model, width, self.settings.folder))
        model.has_initial_weights = True  # otherwise training would refuse random weights
        self.trainer = SimpleNamespace(
            datamodule=SimpleNamespace(datasets={"train": self.data}), default_root_dir=str(self.settings.folder),
            global_step=0, world_size=1, accumulate_grad_batches=1,
            gradient_clip_val=None, precision=PRECISIONS[compute_dtype(self.settings.device)],
            strategy=SimpleNamespace(root_device=self.settings.device))
        model.trainer = self.trainer
        model.log = model.log_dict = lambda *_, **__: None
        model.setup("fit")
        model.on_fit_start()
        model.train()
        AccelerateFrozenUNet().on_train_start(self.trainer, model)

    @property
    def unet(self) -> nn.Module:
        return self.model.model.diffusion_model

    @property
    def memory_holders(self) -> list[Any]:
        """What a run keeps in memory from step to step."""
        return [self.model, self.model.cached_latents.moments, self.optimizer]

    def make_step(self, recompute: bool = False, graphed: bool = True) -> Callable[[Mapping[str, Any]], None]:
        """Return a variant of `step`.

        Args:
            recompute: whether to recompute activations in the backward pass (checkpointing).
            graphed: whether to run by CUDA graphs. They are captured in the first step and belong to this variant.
        """
        encoder = self.model.cond_stage_model
        towers = getattr(encoder, "towers", [encoder])
        unet_graphs = GraphedUNet(self.unet) if graphed else None
        encoder_graphs = [GraphedEncoder(tower.encode_embedded) if graphed else None for tower in towers]

        def step(batch: Mapping[str, Any]) -> None:
            self.model.model.graphs = unet_graphs
            for tower, graphs in zip(towers, encoder_graphs, strict=True):
                tower.graphs = graphs
            if recompute:
                set_recomputation(self.unet, True)
            self.step(batch)
            if recompute:
                set_recomputation(self.unet, False)

        return step

    def batch(self, size: int) -> dict[str, Any]:
        """Return the first `size` photos, on the device."""
        items = default_collate([self.data[index] for index in range(size)])
        return {name: value.to(self.settings.device) if isinstance(value, Tensor) else value
                for name, value in items.items()}

    def step(self, batch: Mapping[str, Any]) -> None:
        """Run the forward pass, the backward pass and the optimizer."""
        with mixed_precision(self.settings.device):
            loss = self.model.training_step(batch, 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainer.global_step += 1


class FrozenUNet:
    """The lower bound of a step: a frozen U-Net forward and backward, with a gradient of its context only."""

    def __init__(self, perfusion: PerfusionStep) -> None:
        self.unet, self.device = perfusion.unet, perfusion.settings.device
        model = perfusion.model
        self.latent_shape = (model.channels, *model.cached_latents.moments.shape[-2:])
        self.context_shape = (model.cond_stage_model.max_length, text_width(model.text_layers))
        self.vector_width = getattr(self.unet, "adm_in_channels", None)
        self.memory_holders = [self.unet]

    def batch(self, size: int) -> dict[str, Any]:
        """Return random latents, timesteps, encodings, and a gradient of the output."""
        x, gradient = (torch.randn(size, *self.latent_shape, device=self.device) for _ in range(2))
        encoding = torch.randn(size, *self.context_shape, device=self.device, requires_grad=True)
        context = encoding
        if self.vector_width:
            vector = torch.randn(size, self.vector_width, device=self.device)
            context = replace(PromptContext.plain(encoding), vector=vector)
        return {"x": x, "timesteps": torch.randint(1000, (size,), device=self.device), "gradient": gradient,
                "context": context, "encoding": encoding}

    def make_step(self, graphed: bool) -> Callable[[Mapping[str, Any]], None]:
        """Return a step that runs by CUDA graphs, or by the U-Net itself."""
        unet = GraphedUNet(self.unet) if graphed else self.unet

        def step(batch: Mapping[str, Any]) -> None:
            context = batch["context"]
            vector = {} if graphed else vector_kwargs(context)
            with mixed_precision(self.device):
                predicted = unet(batch["x"], batch["timesteps"], context=context, **vector)
            predicted.backward(batch["gradient"].to(predicted.dtype))
            batch["encoding"].grad = None

        return step


def set_recomputation(unet: nn.Module, on: bool) -> None:
    """Set whether activations are recomputed in the backward pass (checkpointing) or kept."""
    for module in unet.modules():
        for name in ("checkpoint", "use_checkpoint"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, on)
