"""A training step of a concept as `main.py` makes it, without the rest of a run: photos, loggers, progress bars."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.data.personalized import PersonalizedBase
from ldm.modules.fast.cuda_graphs import GraphedEncoder, GraphedUNet
from ldm.training.callbacks import AccelerateFrozenUNet
from scripts.benchmarks.common import Settings
from scripts.benchmarks.device import mixed_precision, precision
from scripts.benchmarks.random_models import covariance_file, random_model, random_photos, read_config

NOT_LOADED = ("random weights", (), False)
PRECISIONS = {torch.bfloat16: "bf16-mixed", torch.float32: "32-true"}  # as Lightning calls them


class PerfusionStep:
    """A concept of random photos, and the optimiser that teaches it; `settings` say shape, device and size."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        config = read_config(settings.shape.teach)
        data = config.data.params.train.params
        folder = random_photos(settings.folder / f"photos_{settings.side}", settings.side)
        self.data = PersonalizedBase(folder, settings.side, flip_p=data.get("flip_p", 0.5),
                                     placeholder_token=config.model.params.placeholder,
                                     templates=data.templates if isinstance(data.templates, str) else
                                     list(data.templates))
        self.model = random_model(config.model, ckpt_path=None, segmenter=None, covariance=None, seed=0)
        self._prepare()
        self.optimizer = self.model.configure_optimizers()["optimizer"]

    def _prepare(self) -> None:
        """What Lightning's trainer does before the first step."""
        model = self.model
        width = next(iter(model.text_layers.values())).to_v.weight.shape[1]
        model.covariance = str(covariance_file(model.cond_stage_model, width, self.settings.folder))
        model._initial_weights = NOT_LOADED  # random ones are what it is to be taught with
        self.trainer = SimpleNamespace(
            datamodule=SimpleNamespace(datasets={"train": self.data}), default_root_dir=str(self.settings.folder),
            global_step=0, world_size=1, accumulate_grad_batches=1,
            gradient_clip_val=None, precision=PRECISIONS[precision(self.settings.device)],
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
    def holds(self) -> list[Any]:
        """What a run keeps in memory."""
        return [self.model, self.model.cached_latents.moments, self.optimizer]

    def way(self, recompute: bool = False, graphed: bool = True) -> Callable[[Mapping[str, Any]], None]:
        """`step` in one of several ways: activations computed again in the backward pass or kept, by graphs or not.

        Graphs, which only CUDA has, are captured in the first step and are the way's own.
        """
        encoder = self.model.cond_stage_model
        graphs = GraphedUNet(self.unet) if graphed else None
        of_encoder = GraphedEncoder(encoder.encode_embedded) if graphed else None

        def step(batch: Mapping[str, Any]) -> None:
            self.model.model.graphs, encoder.graphs = graphs, of_encoder
            if recompute:
                set_recomputation(self.unet, True)
            self.step(batch)
            if recompute:
                set_recomputation(self.unet, False)

        return step

    def batch(self, size: int) -> dict[str, Any]:
        """The first items of the photos, on the device."""
        items = default_collate([self.data[number] for number in range(size)])
        return {name: value.to(self.settings.device) if isinstance(value, Tensor) else value
                for name, value in items.items()}

    def step(self, batch: Mapping[str, Any]) -> None:
        """Forward, backward, optimiser."""
        with mixed_precision(self.settings.device):
            loss = self.model.training_step(batch, 0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainer.global_step += 1


class FrozenUNet:
    """The floor: a frozen U-Net forward and backward, with a gradient for what it reads alone."""

    def __init__(self, perfusion: PerfusionStep) -> None:
        self.unet, self.device = perfusion.unet, perfusion.settings.device
        model = perfusion.model
        self.latents = (model.channels, *model._moments.shape[-2:])
        width = next(iter(model.text_layers.values())).to_v.weight.shape[1]
        self.context = (model.cond_stage_model.max_length, width)
        self.holds = [self.unet]

    def batch(self, size: int) -> dict[str, Tensor]:
        """Noise, timesteps, encodings, and the gradient of what comes out."""
        x, gradient = (torch.randn(size, *self.latents, device=self.device) for _ in range(2))
        return {"x": x, "timesteps": torch.randint(1000, (size,), device=self.device), "gradient": gradient,
                "context": torch.randn(size, *self.context, device=self.device, requires_grad=True)}

    def way(self, graphed: bool) -> Callable[[Mapping[str, Tensor]], None]:
        """A step by graphs, which only CUDA has, or by the U-Net as it is."""
        unet = GraphedUNet(self.unet) if graphed else self.unet

        def step(batch: Mapping[str, Tensor]) -> None:
            with mixed_precision(self.device):
                predicted = unet(batch["x"], batch["timesteps"], context=batch["context"])
            predicted.backward(batch["gradient"].to(predicted.dtype))
            batch["context"].grad = None

        return step


def set_recomputation(unet: nn.Module, on: bool) -> None:
    """Whether activations are computed again in the backward pass (checkpointing) instead of being kept."""
    for module in unet.modules():
        for name in ("checkpoint", "use_checkpoint"):
            if isinstance(getattr(module, name, None), bool):
                setattr(module, name, on)
