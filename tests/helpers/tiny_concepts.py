"""Photos of a concept and a minimal training, for tests of personalization methods."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image

from helpers import tiny_models
from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.covariance_files import save_covariance
from ldm.personalization.base import PersonalizationMethod
from ldm.training.concept_callbacks import ConceptSaver

WORD = "<toy>"


def write_base(folder: Path) -> None:
    """Write `folder`/base.ckpt with a base model's weights, and the covariance of its text encoder beside it."""
    base = tiny_models.build_model(folder, use_ema=False)
    torch.save({"state_dict": base.state_dict()}, folder / "base.ckpt")
    words = base.get_learned_conditioning(["a cat in a red box", "the dog and a cup", "a bear on a bike"]).flatten(0, 1)
    save_covariance(folder / "covariance.safetensors", words.mT @ words / len(words), source="test", captions=3,
                    tokens="all", encoder=encoder_fingerprint(base.cond_stage_model))


def write_photos(folder: Path) -> None:
    """Write two photos of noise to `folder`/photos."""
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")


def load_photos(folder: Path) -> ConceptPhotos:
    return ConceptPhotos(folder / "photos", size=16, placeholder_token=WORD, templates=tiny_models.TEMPLATES)


def attach_trainer(model: PersonalizationMethod, data: object, micro_batches: int = 1, root: str = "unused"
                   ) -> PersonalizationMethod:
    """Give the model a stand-in for the trainer; return the model."""
    model.trainer = SimpleNamespace(
        datamodule=SimpleNamespace(datasets={"train": data}), default_root_dir=root, global_step=0,
        world_size=1, accumulate_grad_batches=micro_batches, gradient_clip_val=None, precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")))
    model.log = model.log_dict = lambda *_, **__: None
    return model


class RepeatedBatch(pl.LightningDataModule):
    """Yields the same batch again and again."""

    def __init__(self, folder: Path, batch: dict[str, Any]) -> None:
        super().__init__()
        self.datasets, self.batch = {"train": load_photos(folder)}, batch

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader([self.batch] * 12, batch_size=None)


def train_method(model: PersonalizationMethod, data: RepeatedBatch, root: Path, steps: int, resumed: Path | None = None,
                 **settings: Any) -> PersonalizationMethod:
    """Train the model up to `steps` and write `root`/last.ckpt; return the model."""
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
                         callbacks=[ConceptSaver()], **settings)
    if resumed:
        trainer.ckpt_path = resumed
    trainer.fit(model, datamodule=data, weights_only=True)
    trainer.save_checkpoint(root / "last.ckpt")
    return model
