"""Training of the concept encoder: targets, the loss in closed form, and that a batch is learned."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.oracles import randomize
from helpers.tiny_clips import overfit
from helpers.tiny_encoders import write_tower
from helpers.tiny_models import TEMPLATES, latent_diffusion_config, write_weights
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.models.concept_encoder_training import ConceptEncoderTrainer
from ldm.modules.losses.nearest_token import nearest_token_loss
from ldm.modules.noun_encodings import mean_encoding, told_moves
from ldm.modules.subject_features import cut_out

KINDS, LOOKS = ("cat", "dog", "cat", "cat"), ("red", "", "blue striped", "red")


class Subjects(list):
    """Four subjects, of which the third is not found."""

    with_pixels = True


def subjects() -> Subjects:
    pixels = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(4, 1, 24, 24)
    mask[:, :, 4:20, 6:18] = 1
    mask[2] = 0
    return Subjects({"image": pixels[index], "mask": mask[index], "kind": KINDS[index], "look": LOOKS[index],
                     "index": index} for index in range(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    write_weights(path)
    write_tower(path / "clip")
    OmegaConf.save(OmegaConf.create({"model": latent_diffusion_config(path, use_ema=False)}), path / "base.yaml")
    return path


def prepared(folder: Path, **params: Any) -> ConceptEncoderTrainer:
    torch.manual_seed(0)
    model = ConceptEncoderTrainer(str(folder / "base.yaml"), str(folder / "clip"), str(folder / "base.ckpt"), TEMPLATES,
                                  width=16, **params)
    data = SimpleNamespace(datasets={"train": subjects()}, num_workers=0)
    model.trainer = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(root_device=torch.device("cpu")),
                                    gradient_clip_val=None)
    model.logged = {}
    model.log_dict = lambda values, **_: model.logged.update(values)
    model.setup("fit")
    assert not data.datasets["train"].with_pixels
    return model


@pytest.fixture(scope="module")
def trainer(folder: Path) -> ConceptEncoderTrainer:
    return prepared(folder)


BATCH = {"index": torch.arange(4)}


def test_targets_are_what_words_say(trainer: ConceptEncoderTrainer) -> None:
    text_encoder, features = trainer._frozen
    known = trainer.encoded["train"]
    torch.testing.assert_close(known.targets, told_moves(text_encoder, KINDS, LOOKS))
    torch.testing.assert_close(known.super_inputs[1], mean_encoding(text_encoder, "dog", TEMPLATES)[1])
    assert known.is_found.tolist() == [True, True, False, True]
    assert known.looks.tolist() == [0, 1, 2, 0] and not known.look_moves[1].any()
    item = subjects()[3]
    image, mask = cut_out(item["image"], item["mask"][0], 32)
    torch.testing.assert_close(known.features[3], features(image[None], mask[None])[0])


def test_only_the_head_is_in_checkpoints(trainer: ConceptEncoderTrainer) -> None:
    assert {name.partition(".")[0] for name in trainer.state_dict()} == {"head"}


def test_the_loss_is_the_formula(folder: Path) -> None:
    model = prepared(folder, contrastive=0.3, l2=0.2)
    randomize(model.head.layers, 4, scale=0.2)
    model.eval()
    known, rows = model.encoded["train"], torch.tensor([0, 1, 3])
    moves = model.head(known.features[rows], known.super_inputs[rows])
    scale = known.targets.square().sum(1).mean()
    error = (moves - known.targets[rows]).square().sum(1).mean() / scale
    expected = error + 0.2 * moves.square().sum(1).mean() / scale
    expected += 0.3 * nearest_token_loss(moves, known.look_moves, torch.tensor([0, 1, 0]))
    model.encoded["val"] = known
    torch.testing.assert_close(model.step(BATCH, "val"), expected)
    assert float(model.logged["val/error"]) == pytest.approx(error.item())


@pytest.mark.slow
def test_a_batch_is_learned(folder: Path) -> None:
    model = prepared(folder, feature_noise=0.0, dropout=0.0)
    model.learning_rate = 0.01
    losses = overfit(model, BATCH, 60)
    assert losses[-1] < 0.02 * losses[0]
    assert float(model.logged["train/cosine"]) > 0.98


@pytest.mark.parametrize("param", ["feature_noise", "contrastive", "l2"])
def test_negative_weights_are_refused(param: str) -> None:
    with pytest.raises(UserError, match=f"{param} -1.0.*must not be below 0"):
        ConceptEncoderTrainer("base.yaml", "tower", **{param: -1.0})
