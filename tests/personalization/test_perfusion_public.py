"""Concepts on small stand-ins of the public models that have other text encoders than Stable Diffusion 1.x."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers.oracles import randomize
from helpers.stand_ins import image_side, model_section, stand_in
from PIL import Image

from ldm.checkpoints.load import load_model
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.data.concept_photos import ConceptPhotos
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.covariance_files import save_covariance
from ldm.personalization.perfusion import Perfusion
from ldm.training.concept_callbacks import ConceptSaver
from ldm.util import instantiate_from_config

WORD, TEMPLATES = "<toy>", ("a photo of a {}", "the {} in a picture")
MODELS = {"configs/perfusion-sd-v1.yaml": "configs/stable-diffusion/v1-inference.yaml",
          "configs/perfusion-sd-v2.yaml": "configs/stable-diffusion/v2-inference-v.yaml",
          "configs/perfusion-ldm.yaml": "configs/latent-diffusion/txt2img-1p4B-eval.yaml"}


class Photos(pl.LightningDataModule):
    """What a data module gives Perfusion: a `ConceptPhotos` and batches of it."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
        folder.mkdir()
        for number, photo in enumerate(pixels):
            Image.fromarray(photo).save(folder / f"{number}.png")
        self.datasets = {"train": ConceptPhotos(folder, size, placeholder_token=WORD, templates=TEMPLATES)}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.datasets["train"], batch_size=2)


def base_weights(public: str, folder: Path) -> Path:
    """A checkpoint of the public model's stand-in, every parameter random, and its text encoder's covariance."""
    base = instantiate_from_config(stand_in(public, folder))
    randomize(base.model, 0, scale=0.1)
    randomize(base.first_stage_model, 1)
    randomize(base.cond_stage_model, 2, scale=0.3)
    torch.save({"state_dict": base.state_dict()}, folder / "base.ckpt")
    words = base.eval().get_learned_conditioning(["a cat in a red box", "the dog and a cup"]).flatten(0, 1).detach()
    save_covariance(folder / "covariance.safetensors", words.mT @ words / len(words), source="test", captions=2,
                    tokens="all", encoder=encoder_fingerprint(base.cond_stage_model))
    return folder / "base.ckpt"


def train(config: str, folder: Path, **changes: Any) -> Perfusion:
    section = stand_in(config, folder, ckpt_path=str(folder / "base.ckpt"), placeholder=WORD,
                       super_category="teddy bear", segmenter=None,
                       covariance=str(folder / "covariance.safetensors"), **changes)
    model = instantiate_from_config(section)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
                         callbacks=[ConceptSaver()])
    trainer.fit(model, datamodule=Photos(folder / "photos", image_side(section)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("config", MODELS)
def test_two_steps_learn_a_concept_to_generate_with(config: str, tmp_path: Path) -> None:
    checkpoint = base_weights(MODELS[config], tmp_path)
    model = train(config, tmp_path)
    (concept,) = load_perfusion_concepts(tmp_path / "concept.safetensors")
    assert concept.steps == 2 and concept.super_category == "teddy bear"
    width = model.cond_stage_model.token_table.shape[1]
    assert concept.embedding.shape == (1, width) and concept.target_input.shape == (width,)
    assert len(concept.target_outputs_v) == len(model.text_layers) > 7
    assert float(model.concepts[0].distance()) > 0
    assert model_section(config)["params"].get("parameterization", "eps") == model.parameterization

    base = load_model({"model": stand_in(MODELS[config], tmp_path)}, checkpoint, "cpu")
    base.inverse_covariance = model.inverse_covariance  # instead of that of 8,192 captions
    pipeline = PerfusionPipeline(base)
    encoder = pipeline.prompt_encoder(pipeline.load_concepts(tmp_path / "concept.safetensors"))
    prompt = f"a {WORD} in the snow"
    with torch.no_grad():
        ours, theirs = encoder.encode([prompt]), model.eval().prompt_context([prompt])
    assert torch.allclose(ours.gates, theirs.gates, atol=2e-2) and ours.gates.std() > 0.01
    settings = GenerationSettings(num_inference_steps=2, guidance_scale=6.0, sampler="ddim")
    (image,) = pipeline.generate([GenerationRequest(prompt, 1)], settings)
    assert image.size == (64, 64)
