"""Embeddings of CLIPs against the logits of `transformers` and `open_clip`, and zero-shot classification."""
from __future__ import annotations

import logging
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_clips import SIDE, tiny_openclip, write_clip

from evaluation.mini.recognize import nearest_class
from ldm.common.errors import UserError
from ldm.models.clip_encoder import ClipEncoder, OpenClipEncoder
from ldm.models.clip_images import normalize_for_clip
from scripts.mini.export import write_openclip

TEXTS = ["a cat", "a dog in the snow", "a red car"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    return ClipEncoder.from_path(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP of `open_clip`'s as the project exports it."""
    folder = tmp_path_factory.mktemp("open_clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.mini.export.world_captions", lambda: tuple(TEXTS))
        write_openclip(folder, tiny_openclip().eval(), {"format": "pt"})
    return folder


def random_images(count: int, side: int = SIDE) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_cosines_equal_those_of_transformers(clip: ClipEncoder) -> None:
    tokens = clip.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**tokens, pixel_values=normalize_for_clip(random_images(4))).logits_per_text
    cosines = clip.embed_texts(TEXTS) @ clip.embed_images(random_images(4)).T
    assert torch.allclose(cosines * clip.model.logit_scale.exp(), expected, atol=1e-4)


def test_an_embedding_does_not_depend_on_longer_texts_in_the_batch(clip: ClipEncoder) -> None:
    assert torch.allclose(clip.embed_texts(TEXTS)[:1], clip.embed_texts(TEXTS[:1]), atol=1e-5)
    assert clip.embed_texts(["cat " * 100]).shape == (1, 8)


def test_images_of_any_size_are_resized(clip: ClipEncoder) -> None:
    smooth = F.interpolate(torch.tensor([[-0.8, 0.1], [0.3, 0.9]]).expand(1, 3, 2, 2), (64, 64), mode="bilinear")
    small = F.interpolate(smooth, (SIDE, SIDE), mode="area")
    assert (clip.embed_images(smooth) * clip.embed_images(small)).sum() > 0.99
    assert torch.allclose(clip.embed_images(smooth).norm(dim=1), torch.ones(1), atol=1e-5)


def test_a_class_is_the_mean_direction_of_its_texts(clip: ClipEncoder) -> None:
    first, second = clip.embed_classes([TEXTS[:2], TEXTS[2:]])
    assert torch.allclose(first, F.normalize(clip.embed_texts(TEXTS[:2]).sum(0), dim=0), atol=1e-5)
    assert torch.allclose(second, clip.embed_texts(TEXTS[2:])[0], atol=1e-5)


def test_the_nearest_class_has_the_smallest_angle() -> None:
    classes = torch.eye(3)
    embeddings = F.normalize(torch.tensor([[0.9, 0.8, 0.0], [0.0, 0.2, 0.3], [-1.0, 0.1, 0.0]]), dim=1)
    assert nearest_class(embeddings, classes).tolist() == [0, 2, 1]


@pytest.mark.slow
def test_the_library_of_a_folder_is_recognized(open_folder: Path) -> None:
    found, model = ClipEncoder.from_path(open_folder), tiny_openclip().clip.eval()
    assert isinstance(found, OpenClipEncoder) and found.image_size == 32
    with torch.no_grad():
        texts = model.encode_text(open_clip.SimpleTokenizer(context_length=16)(TEXTS), normalize=True)
        images = model.encode_image(normalize_for_clip(random_images(4, 32)), normalize=True)
    assert torch.allclose(found.embed_texts(TEXTS), texts, atol=5e-3)
    assert torch.allclose(found.embed_images(random_images(4, 32)), images, atol=5e-3)
    assert found.embed_images(random_images(2)).shape == (2, 8)
    assert found.embed_texts(["cat " * 100]).shape == (1, 8)


def test_names_of_weights_go_to_open_clip(monkeypatch: pytest.MonkeyPatch, open_folder: Path) -> None:
    names_given, model = [], ClipEncoder.from_path(open_folder).model
    monkeypatch.setattr(open_clip, "create_model", lambda *names, device, force_quick_gelu: names_given.append(
        (*names, force_quick_gelu)) or model)
    found = ClipEncoder.from_path("RN50/openai")
    assert names_given == [("RN50", "openai", True)] and isinstance(found, OpenClipEncoder)


def test_a_failed_download_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    def offline(*_: str, **__: object) -> None:
        logging.error("Failed to download weights")
        raise RuntimeError("cannot be reached")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match="check the name and the network"):
        ClipEncoder.from_path("ViT-B-32/openai")
    assert not caplog.records


@pytest.mark.parametrize(("name", "message"), [
    ("ViT-B-32", "name the weights of ViT-B-32 as in ViT-B-32/WEIGHTS; available: openai, "),
    ("ViT-B-32/nothing", "available: openai, "), ("nowhere", "no such folder"), ("/no/where", "no such folder")])
def test_names_are_checked_before_any_download(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClipEncoder.from_path(name)


def test_loading_a_folder_logs_nothing(open_folder: Path, caplog: pytest.LogCaptureFixture,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO):
        ClipEncoder.from_path(open_folder)
        assert not caplog.records and capsys.readouterr() == ("", "")
        logging.info("logged again")
    assert caplog.messages == ["logged again"]


def test_a_folder_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipEncoder.from_path(tmp_path)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_texts_that_are_cut_off_are_told_once(library: str, clip: ClipEncoder, open_folder: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    is_open = library == "open_clip"
    encoder = ClipEncoder.from_path(open_folder) if is_open else ClipEncoder(clip.model, clip.tokenizer)
    room = encoder.max_length - 2
    fits, long = " ".join(["cat"] * room), " ".join(["cat"] * (room + 1))
    encoder.embed_texts([fits, "🦉" if room > 8 else "a"])
    assert not caplog.messages
    encoder.embed_texts([fits, long, long])
    encoder.embed_texts([long])
    (message,) = caplog.messages
    assert f"1 of 2 texts are longer than the {room} tokens" in message
