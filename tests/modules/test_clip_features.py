"""Conditions made of CLIP's features, against open_clip and torch."""
from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from ldm.common.errors import UserError
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder

SETTINGS = {"embed_dim": 8, "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 56},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
TEXTS = ["a photo of a cat", "word " * 100]


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**SETTINGS).eval()


@pytest.fixture(scope="module")
def folder(clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SETTINGS}))
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return str(folder)


@torch.no_grad()
def test_texts_become_repeated_features(folder: str, clip: open_clip.CLIP) -> None:
    expected = clip.encode_text(open_clip.tokenize(TEXTS, context_length=12))
    plain = FrozenCLIPTextEmbedder(folder, normalize=False, n_repeat=3)
    assert torch.allclose(plain(TEXTS), expected, atol=1e-6)
    assert torch.allclose(plain.encode(TEXTS), expected[:, None].expand(2, 3, 8), atol=1e-6)
    assert torch.allclose(FrozenCLIPTextEmbedder(folder)(TEXTS), F.normalize(expected, dim=1), atol=1e-6)
    plain.freeze()
    assert not any(parameter.requires_grad for parameter in plain.parameters())


@torch.no_grad()
def test_images_become_features(folder: str, clip: open_clip.CLIP) -> None:
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    resized = (F.interpolate(images, (224, 224), mode="bicubic", align_corners=True) + 1) / 2
    mean, std = (torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN,
                                                                    open_clip.OPENAI_DATASET_STD))
    embedder = FrozenClipImageEmbedder(folder)
    assert torch.allclose(embedder(images), clip.encode_image((resized - mean) / std), atol=1e-5)
    assert list(embedder.state_dict()) == [f"model.{key}" for key in clip.state_dict()]


@pytest.mark.parametrize("name", ["ViT-B-32/unknown", "no-such-model"])
def test_unknown_models_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"CLIP {name}: cannot be loaded"):
        FrozenCLIPTextEmbedder(name)
