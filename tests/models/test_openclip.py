"""The trainer of `open_clip` towers, and folders in its layout, against `open_clip` itself."""
from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from helpers.tiny_clips import overfit, tiny_openclip
from safetensors.torch import save_file

from ldm.common.errors import UserError
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import with_article
from ldm.data.mini.world import KIND_NAMES
from ldm.models.clip_images import normalize_for_clip
from ldm.models.mini.openclip import OpenCLIPTrainer
from ldm.models.open_clip_folder import SETTINGS, load_openclip

CAPTIONS = ["a cat", "a dog", "a red car left of a tree", "an owl in the snow"]


@pytest.fixture()
def trainer() -> OpenCLIPTrainer:
    return tiny_openclip()


def scenes() -> dict[str, object]:
    image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": image, "caption": CAPTIONS, "kind": torch.tensor([0, 1, 2, 3]),
            "second_kind": torch.tensor([-1, -1, 5, -1]), "background": torch.tensor([0, 4, 4, 7])}


def written(folder: Path, trainer: OpenCLIPTrainer) -> Path:
    """Write a folder in the layout of `open_clip`, without packed tables."""
    preprocessing = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (folder / SETTINGS).write_text(json.dumps({"model_cfg": trainer.settings, "preprocess_cfg": preprocessing}))
    save_file({key: value.contiguous() for key, value in trainer.clip.state_dict().items()},
              folder / "model.safetensors")
    return folder


def test_the_image_tower_is_a_residual_network(trainer: OpenCLIPTrainer) -> None:
    assert type(trainer.clip.visual).__name__ == "ModifiedResNet"


def test_text_features_equal_open_clips(trainer: OpenCLIPTrainer) -> None:
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    with torch.no_grad():
        expected = trainer.clip.encode_text(tokens, normalize=True)
        assert torch.allclose(trainer.embed_texts(CAPTIONS), expected, atol=1e-5)


def test_the_loss_equals_open_clips(trainer: OpenCLIPTrainer) -> None:
    batch, loss = scenes(), open_clip.ClipLoss()
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    images, texts, scale = trainer.clip(normalize_for_clip(batch["image"]), tokens)
    assert torch.allclose(trainer.step(batch, "train"), loss(images, texts, scale), atol=1e-4)


def test_the_kind_loss_compares_with_kind_captions() -> None:
    batch = scenes()
    plain, weighted = (tiny_openclip(kinds_weight=weight) for weight in (0.0, 0.5))
    texts = [f"a photo of {with_article(name)}" for name in KIND_NAMES]
    found = plain.image_features(normalize_for_clip(batch["image"])), plain.embed_texts(texts)
    logits = plain.clip.logit_scale.exp() * torch.nn.functional.normalize(found[0], dim=-1) @ found[1].T
    surprise = -logits.log_softmax(1)
    expected = torch.stack([surprise[0, 0], surprise[1, 1], (surprise[2, 2] + surprise[2, 5]) / 2, surprise[3, 3]])
    gained = weighted.step(batch, "train") - plain.step(batch, "train")
    assert torch.allclose(gained, 0.5 * expected.mean(), atol=1e-4)


def test_the_background_loss_accepts_any_kind() -> None:
    batch = scenes()
    plain, weighted = (tiny_openclip(backgrounds_weight=weight) for weight in (0.0, 0.5))
    torch.manual_seed(3)
    kinds = torch.randint(len(KIND_NAMES), (len(BACKGROUNDS),)).tolist()
    texts = [f"a photo of {with_article(KIND_NAMES[kind])} {wheres[0]}"
             for kind, (_, wheres) in zip(kinds, BACKGROUNDS.values(), strict=True)]
    assert len(set(kinds)) > 5
    images = torch.nn.functional.normalize(plain.image_features(normalize_for_clip(batch["image"])), dim=-1)
    logits = plain.clip.logit_scale.exp() * images @ plain.embed_texts(texts).T
    torch.manual_seed(3)
    gained = weighted.step(batch, "train") - plain.step(batch, "train")
    expected = torch.nn.functional.cross_entropy(logits, batch["background"])
    assert torch.allclose(gained, 0.5 * expected, atol=1e-4)


@pytest.mark.slow
def test_a_single_batch_is_overfitted(trainer: OpenCLIPTrainer) -> None:
    losses = overfit(trainer, scenes(), 20)
    assert losses[-1] < 0.5 * losses[0]


def test_a_folder_of_open_clip_loads_as_in_open_clip(trainer: OpenCLIPTrainer, tmp_path: Path) -> None:
    folder = written(tmp_path, trainer)
    expected = open_clip.create_model(f"local-dir:{folder}").state_dict()
    found = load_openclip(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weights_of_another_model_are_refused(trainer: OpenCLIPTrainer, tmp_path: Path) -> None:
    folder = written(tmp_path, trainer)
    settings = json.loads((folder / SETTINGS).read_text())
    settings["model_cfg"]["embed_dim"] = 16
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="do not fit"):
        load_openclip(folder)
