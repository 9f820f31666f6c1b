"""The head of the concept encoder: files, refusals, and what it predicts."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.oracles import randomize
from helpers.tiny_clips import tiny_openclip
from helpers.tiny_models import build_model

from ldm.common.errors import UserError
from ldm.modules.concept_encoder import ConceptEncoder, ConceptHead, EncoderSettings, load_encoder, save_encoder
from ldm.modules.noun_encodings import told_moves
from ldm.modules.subject_features import SubjectFeatures, cut_out

WIDTH = 16
LOOKS = ("", "red", "blue striped")


@pytest.fixture(scope="module")
def features() -> SubjectFeatures:
    return SubjectFeatures(randomize(tiny_openclip().clip.visual, 3, scale=0.1), (0.5,) * 3, (0.3,) * 3, 32)


@pytest.fixture
def encoder(features: SubjectFeatures) -> ConceptEncoder:
    head = randomize(ConceptHead(features.width, WIDTH, width=8), 1, scale=0.1)
    return ConceptEncoder(features, head, EncoderSettings("clip", looks=LOOKS))


def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Three photos, of which the last has an empty mask."""
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    masks = torch.zeros(3, 24, 24)
    masks[0, 2:14, 4:16] = masks[1, 8:20, 8:20] = 1
    return images, masks


def test_a_new_head_predicts_nothing() -> None:
    head = ConceptHead(5, WIDTH)
    head.set_scale(torch.randn(9, 5))
    assert not head(torch.randn(3, 5), torch.randn(3, WIDTH)).any()


def test_a_prediction_is_the_mean_over_photos_that_show_the_subject(encoder: ConceptEncoder) -> None:
    images, masks = photos()
    super_input = torch.randn(WIDTH)
    each = []
    for image, mask in zip(images[:2], masks[:2], strict=True):
        cut, cut_mask = cut_out(image, mask, 32)
        each.append(encoder.head(encoder.features(cut[None], cut_mask[None]), super_input[None])[0])
    torch.testing.assert_close(encoder.predict(images, masks, super_input), (each[0] + each[1]) / 2)
    with pytest.raises(UserError, match="no photo has one: paint them"):
        encoder.predict(images[2:], masks[2:], super_input)


def test_the_nearest_look_is_named(encoder: ConceptEncoder, tmp_path: Path) -> None:
    text_encoder = build_model(tmp_path).cond_stage_model
    moves = told_moves(text_encoder, ["cat"] * 3, LOOKS)
    assert [encoder.nearest_look(text_encoder, "cat", 0.8 * move) for move in moves] == list(LOOKS)
    unnamed = ConceptEncoder(encoder.features, encoder.head, EncoderSettings("clip"))
    assert unnamed.nearest_look(text_encoder, "cat", moves[1]) is None


def test_a_saved_head_is_the_same_in_half_precision(encoder: ConceptEncoder, tmp_path: Path) -> None:
    settings = EncoderSettings("clip", "abc", ["a {}"], list(LOOKS), 1.2, 0.7, 0.15, "gated", ["a.b"])
    save_encoder(tmp_path / "encoder", encoder.head, settings, {"run": "today"})
    head, loaded = load_encoder(tmp_path / "encoder")
    assert loaded == settings
    inputs = torch.randn(4, encoder.features.width), torch.randn(4, WIDTH)
    torch.testing.assert_close(head.eval()(*inputs), encoder.head(*inputs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "clip"}, "holds no concept encoder"), ({"strength": "much"}, "strength must be"),
    ({"speed": 1}, "does not know speed"), ({"head": {"width": 8}}, "do not fit its config.json"),
    ({"head": {"features": 7, "context_width": WIDTH, "width": 8}}, "do not fit its config.json"),
    ({"head": None}, "names no head"), ({"tower": None}, "tower must be")])
def test_damaged_encoders_are_refused(encoder: ConceptEncoder, tmp_path: Path, change: dict[str, object], message: str
                                      ) -> None:
    save_encoder(tmp_path, encoder.head, encoder.settings)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path)


def test_missing_and_cut_off_files_are_refused(encoder: ConceptEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no concept encoder"):
        load_encoder(tmp_path)
    save_encoder(tmp_path, encoder.head, encoder.settings)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(UserError):
        load_encoder(tmp_path)
    weights.unlink()
    with pytest.raises(UserError):
        load_encoder(tmp_path)
