"""The files of a tiny model and two concepts, and the scripts run on them, in this process or in another."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import CLIPTextConfig

from helpers.oracles import randomize
from ldm.common.files import save_tensors
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.concepts.fingerprint import base_fingerprint
from ldm.modules import covariance_files
from ldm.modules.attention import name_text_layers
from ldm.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
WIDTH, LENGTH, START, END = 16, 16, 49406, 49407
PROMPT = "a photo of a <teddy> outside"
QUICK = ("--ddim_steps", "3", "--scale", "2", "--device", "cpu")
ROUNDING = 2  # of 255 levels: rounding depends on the batch size
Generate = Callable[..., np.ndarray]
Main = Callable[[list[str]], None]


@dataclass(frozen=True)
class ModelFiles:
    """Files of a tiny base model and two concepts.

    Attributes:
        folder: holds all of them, and the cache of the covariance.
        config, checkpoint: of the base model.
        teddy, mug: concept files.
    """

    folder: Path
    config: Path
    checkpoint: Path
    teddy: Path
    mug: Path


def model_config(text_encoder: Path) -> dict[str, object]:
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "attn_type": "none"}
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 1],
            "attention_resolutions": [1], "num_res_blocks": 1, "num_heads": 4, "use_spatial_transformer": True,
            "context_dim": WIDTH, "legacy": False}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "image_size": 8, "channels": 4, "conditioning_key": "crossattn", "parameterization": "v", "timesteps": 100,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {
            "version": str(text_encoder), "max_length": LENGTH}}}}}


def write_model_files(folder: Path) -> ModelFiles:
    """Write the files of a tiny model and of three concepts, one of which belongs to another model.

    With PERFUSION_CACHE set to the folder's cache, nothing slow is computed.
    """
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                   vocab_size=END + 1, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=END,
                   pad_token_id=END).save_pretrained(folder / "text")
    config = model_config(folder / "text")
    checkpoint = folder / "base.safetensors"
    model = randomize(instantiate_from_config(config["model"]), scale=0.15).requires_grad_(False)
    save_tensors(checkpoint, {k: v for k, v in model.state_dict().items() if not k.startswith("model_ema.")}, {})
    config["model"]["params"]["ckpt_path"] = str(checkpoint)
    OmegaConf.save(OmegaConf.create(config), folder / "base.yaml")
    with pytest.MonkeyPatch.context() as patch:  # the full corpus takes long even for this model
        patch.setattr(covariance_files, "default_captions",
                      lambda *_: [f"a photo of a {w}" for w in ("dog", "mug", "hat")])
        covariance_files.cached_covariance(model.cond_stage_model, folder / "cache", progress=False)
    teddy = random_concept(model, "<teddy>", "teddy bear", seed=1)
    mug = random_concept(model, "<mug>", "mug", seed=2)
    foreign = replace(teddy, base="0" * 64, base_samples="AAA8AA==")
    for name, concept in {"teddy": teddy, "mug": mug, "foreign": foreign}.items():
        save_perfusion_concepts(folder / f"{name}.safetensors", [concept], precision=None)
    return ModelFiles(folder, folder / "base.yaml", checkpoint, folder / "teddy.safetensors",
                      folder / "mug.safetensors")


def random_concept(model: torch.nn.Module, placeholder: str, super_category: str, seed: int) -> Concept:
    """Return a concept whose gate is wide open for its word in PROMPT, with large target outputs."""
    generator = torch.Generator().manual_seed(seed)
    encoder, layers = model.cond_stage_model, name_text_layers(model.model.diffusion_model)
    embedding = torch.randn(1, WIDTH, generator=generator)
    tokens = encoder.tokenize([PROMPT.replace("<teddy>", placeholder)], [placeholder])
    target = encoder.encode_tokens(tokens, embedding)[tokens > END].squeeze(0)
    values = {name: 3 * torch.randn(len(layer.to_v.weight), generator=generator) for name, layer in layers.items()}
    return Concept(placeholder, super_category, embedding, target, torch.randn(WIDTH, generator=generator), values,
                   base=base_fingerprint(layers))


def load_main(name: str) -> Main:
    """Return the main function of a script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def script_generator(main: Main, config: Path, folder: Path) -> Generate:
    """Return a function that runs a script in this process and returns its images as (n, H, W, 3) integers."""

    def run(*arguments: object, outdir: str = "out") -> np.ndarray:
        before = image_paths(folder / outdir)
        main([str(argument) for argument in ("--config", config, "--outdir", folder / outdir, *QUICK, *arguments)])
        return np.stack([read_pixels(path) for path in image_paths(folder / outdir) if path not in before])

    return run


def error_line(main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a script rejects its arguments."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def run_script(name: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, from the project's folder."""
    return subprocess.run([sys.executable, ROOT / "scripts" / f"{name}.py", *map(str, arguments)], capture_output=True,
                          text=True, check=False, cwd=ROOT, env={**os.environ, "PERFUSION_CACHE": str(cache)})


def image_paths(outdir: Path) -> list[Path]:
    """Return the images that a script wrote, in order."""
    return sorted((outdir / "samples").glob("*.png"))


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels of an image, (H, W, 3) integers from 0 to 255."""
    return np.asarray(Image.open(path), dtype=int)


def max_difference(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest difference of two arrays, in levels."""
    return int(np.abs(one - other).max())
