"""Perfusion with an encoder: where o*_V starts, whose masks count, and what is refused."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, attach_trainer, write_base, write_photos
from helpers.tiny_encoders import write_cut_outs, write_encoder

from ldm.common.errors import UserError
from ldm.concepts.fingerprint import base_fingerprint
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import to_tensor
from ldm.models.concept_encoder import load_concept_encoder
from ldm.modules.edit import project_inputs
from ldm.personalization.perfusion import Perfusion
from ldm.util import instantiate_from_config

LOOKS = ["red", "blue striped"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base model, an encoder for it, and photos with and without masks."""
    path = tmp_path_factory.mktemp("encoder")
    write_base(path)
    write_photos(path)
    write_cut_outs(path / "cut_outs")
    write_encoder(path / "encoder", base_fingerprint(unprepared(path).text_layers), looks=LOOKS, strength=0.5)
    return path


def unprepared(folder: Path, **params: Any) -> Perfusion:
    given = {"super_category": "cat", "placeholder": WORD, "covariance": str(folder / "covariance.safetensors"),
             "ckpt_path": str(folder / "base.ckpt"), "first_stage_key": "image", **params}
    return instantiate_from_config(tiny_models.latent_diffusion_config(folder, "perfusion.Perfusion", **given))


def prepared(folder: Path, photos: str = "cut_outs", **params: Any) -> Perfusion:
    data = ConceptPhotos(folder / photos, size=16, placeholder_token=WORD, templates=tiny_models.TEMPLATES)
    model = attach_trainer(unprepared(folder, encoder=str(folder / "encoder"), **params), data)
    model.setup("fit")
    return model


@pytest.mark.parametrize(("given", "strength"), [
    (None, 0.5), pytest.param(1.25, 1.25, marks=pytest.mark.slow)])
def test_values_start_where_the_encoder_says(folder: Path, given: float | None, strength: float,
                                             caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = prepared(folder, encoder_strength=given)
    assert any(f"{WORD}: looks like: {look}" in caplog.text for look in LOOKS)
    (photos,), (concept,) = model.photos(), model.concepts
    encoder = load_concept_encoder(folder / "encoder")
    move = encoder.predict([to_tensor(image) for image in photos.images], [photos.mask(i)[0] for i in range(2)],
                           concept.super_input)
    assert float(move.norm()) > 0.1
    expected = project_inputs(model.text_layers, (concept.super_input + strength * move)[None], "to_v")
    exported = model.export_concept()
    for name, output in exported.target_outputs_v.items():
        torch.testing.assert_close(output, expected[name][0])
    assert not any(name.startswith(("encoder", "_encoder")) for name in model.state_dict())


@pytest.mark.slow
def test_setup_again_changes_nothing(folder: Path) -> None:
    model = prepared(folder)
    with torch.no_grad():
        for value in model.concepts[0].values():
            value.add_(1)
    before = [value.clone() for value in model.concepts[0].values()]
    model.setup("fit")
    assert all(map(torch.equal, before, model.concepts[0].values()))


@pytest.mark.slow
def test_photos_without_masks_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="needs masks of the subject, and no photo has one"):
        prepared(folder, photos="photos")


@pytest.mark.parametrize(("params", "message"), [
    ({"encoder_strength": 0.0}, "encoder_strength 0.0 must be above 0"),
    ({"encoder": "nowhere"}, "encoder .*nowhere: holds no concept encoder")])
def test_wrong_params_are_refused_before_weights_are_loaded(folder: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unprepared(folder, **{"ckpt_path": "missing.ckpt", **params})


@pytest.mark.slow
def test_an_encoder_of_another_base_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_encoder(tmp_path / "other", "another")
    with pytest.raises(UserError, match="was trained for another base model"):
        load_concept_encoder(other, base="this")
