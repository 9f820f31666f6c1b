"""The classes of Textual Inversion's clip_eval.py, against open_clip's own preprocessing and features."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation.clip_eval import CLIPEvaluator, ImageDirEvaluator, LDMCLIPEvaluator
from ldm.common.files import save_tensors
from ldm.data.images import from_tensor, to_tensor

SETTINGS = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**SETTINGS).eval()


@pytest.fixture(scope="module")
def folder(clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SETTINGS}))
    save_tensors(folder / "model.safetensors", clip.state_dict(), {})
    return str(folder)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(3, 3, 64, 64, generator=generator) * 2 - 1
    return torch.stack([to_tensor(from_tensor(image)) for image in pixels])


def expected_features(clip: open_clip.CLIP, images: Tensor) -> Tensor:
    transform = open_clip.image_transform(32, is_train=False)
    pictures: list[Image.Image] = [from_tensor(image) for image in images]
    return torch.nn.functional.normalize(clip.encode_image(torch.stack(list(map(transform, pictures)))), dim=1)


@torch.no_grad()
def test_similarities_are_mean_cosines(folder: str, clip: open_clip.CLIP, images: Tensor) -> None:
    evaluator = ImageDirEvaluator("cpu", folder)
    found = expected_features(clip, images)
    assert torch.allclose(evaluator.get_image_features(images), found, atol=5e-3)  # PIL rounds to 8 bits
    text = torch.nn.functional.normalize(clip.encode_text(open_clip.tokenize("a photo of ", 12)), dim=1)
    to_images, to_text = evaluator.evaluate(images[:2], images, "a photo of *")
    assert to_images == pytest.approx(float((found @ found[:2].T).mean()), abs=5e-3)
    assert to_text == pytest.approx(float((text @ found[:2].T).mean()), abs=5e-3)
    assert torch.allclose(evaluator.get_text_features(["a cat", "word " * 99], norm=False),
                          clip.encode_text(open_clip.tokenize(["a cat", "word " * 99], 12)), atol=1e-6)


class NoiseModel:
    """A latent diffusion model that predicts no noise, and decodes by repeating pixels."""

    num_timesteps, parameterization = 10, "eps"
    betas = torch.full((10,), 0.1)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    alphas_cumprod_prev = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    device = torch.device("cpu")

    def apply_model(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def get_learned_conditioning(self, prompts: list[str]) -> Tensor:
        assert len(prompts) == 8
        return torch.zeros(8, 1, 1)

    def decode_first_stage(self, latents: Tensor) -> Tensor:
        return latents[:, :3]

    @contextlib.contextmanager
    def ema_scope(self) -> Iterator[None]:
        yield


def test_generated_images_are_compared(folder: str, images: Tensor) -> None:
    evaluator = LDMCLIPEvaluator("cpu", folder)
    assert isinstance(evaluator, CLIPEvaluator)
    torch.manual_seed(0)
    to_images, to_text = evaluator.evaluate(NoiseModel(), images, "a *", n_samples=17, n_steps=2)
    assert -1 <= to_images <= 1 and -1 <= to_text <= 1
