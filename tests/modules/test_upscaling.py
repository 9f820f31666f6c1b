"""Small images and image embeddings with noise, against DDPM's closed form and open_clip."""
from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.upscaling import (
    AbstractLowScaleModel,
    ImageConcatWithNoiseAugmentation,
    SimpleImageConcat,
)
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.modules import CLIPEmbeddingNoiseAugmentation, FrozenOpenCLIPImageEmbedder

SETTINGS = {"embed_dim": 8, "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 56},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
SCHEDULE = {"linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}


def noised(x: torch.Tensor, levels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return DDPM's q(x_t | x_0); the family's linear schedule is linear in the roots of beta."""
    betas = torch.linspace(1e-4**0.5, 2e-2**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[levels].view(-1, *[1] * (x.ndim - 1))
    return (alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise).float()


def test_random_levels_come_before_the_noise() -> None:
    model, x = ImageConcatWithNoiseAugmentation(SCHEDULE, max_noise_level=350), torch.randn(6, 3, 4, 4)
    torch.manual_seed(1)
    found, levels = model(x)
    torch.manual_seed(1)
    expected = torch.randint(0, 350, (6,))
    assert torch.equal(levels, expected)
    torch.testing.assert_close(found, noised(x, expected, torch.randn(6, 3, 4, 4)), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.decode(found), found)


def test_levels_can_be_given() -> None:
    model, x, levels = ImageConcatWithNoiseAugmentation(SCHEDULE), torch.randn(2, 3, 4, 4), torch.tensor([0, 999])
    torch.manual_seed(2)
    found, returned = model(x, levels)
    torch.manual_seed(2)
    torch.testing.assert_close(found, noised(x, levels, torch.randn(2, 3, 4, 4)), rtol=1e-5, atol=1e-6)
    assert returned is levels


def test_small_images_without_noise() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert AbstractLowScaleModel()(x) == (x, None)
    found, levels = SimpleImageConcat()(x)
    assert found is x and levels.tolist() == [0, 0]


def test_keys_of_public_checkpoints() -> None:
    assert set(ImageConcatWithNoiseAugmentation(SCHEDULE).state_dict()) == {
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}


def test_noise_on_embeddings(tmp_path: Path) -> None:
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    torch.save((mean, std), tmp_path / "stats.th")
    model = CLIPEmbeddingNoiseAugmentation(SCHEDULE, clip_stats_path=tmp_path / "stats.th", timestep_dim=16)
    x, levels = torch.randn(3, 16), torch.tensor([3, 400, 900])
    torch.manual_seed(4)
    found, embedded = model(x, levels)
    torch.manual_seed(4)
    expected = noised((x - mean) / std, levels, torch.randn(3, 16)) * std + mean
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedded, timestep_embedding(levels, 16))


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a small architecture that open_clip knows."""
    path: Path = tmp_path_factory.mktemp("clip") / "tiny-image-embedder.json"
    path.write_text(json.dumps(SETTINGS))
    open_clip.add_model_config(path)
    return path.stem


def test_image_embeddings(arch: str) -> None:
    embedder = FrozenOpenCLIPImageEmbedder(arch, ucg_rate=0.5)
    images = torch.rand(8, 3, 224, 224) * 2 - 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN,
                                                                    open_clip.OPENAI_DATASET_STD))
    expected = embedder.model.visual(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(embedder.encode_with_vision_transformer(images), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(5)
    found = embedder.encode(images)
    torch.manual_seed(5)
    kept = torch.bernoulli(torch.full((8,), 0.5)).bool()
    assert 0 < kept.sum() < 8
    torch.testing.assert_close(found, expected * kept[:, None], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in embedder.parameters())
    assert not any(key.startswith("model.transformer") for key in embedder.state_dict())


def test_unknown_image_encoders_are_refused(arch: str) -> None:
    with pytest.raises(UserError, match="layer 'penultimate' is not supported"):
        FrozenOpenCLIPImageEmbedder(arch, layer="penultimate")
    with pytest.raises(UserError, match="no such architecture"):
        FrozenOpenCLIPImageEmbedder("no-such-model")
