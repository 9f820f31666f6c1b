"""`init_embedding`: words that start from embedding files, in Perfusion and in other methods."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, attach_trainer, load_photos, write_base, write_photos
from safetensors.torch import save_file

from ldm.common.errors import UserError
from ldm.util import instantiate_from_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, photos, and embeddings: of a plain word, of two, of other widths, and two words in a file."""
    path = tmp_path_factory.mktemp("words")
    write_base(path)
    write_photos(path)
    encoder = model_of(path, "perfusion.Perfusion").cond_stage_model
    dog, two = (encoder.embed_pieces(encoder.word_pieces(text)).detach() for text in ("dog", "red dog"))
    torch.save({"string_to_param": {"*": dog}, "string_to_token": {"*": 265}, "name": "dog"}, path / "dog.pt")
    save_file({"<two>": two}, path / "two.safetensors")
    save_file({"<a>": dog, "<b>": dog.clone()}, path / "several.safetensors")
    save_file({"clip_l": torch.zeros(1, 768)}, path / "wide.safetensors")
    return path


def model_of(folder: Path, target: str, **params: Any) -> Any:
    given = {"super_category": "cat", "placeholder": WORD, "ckpt_path": str(folder / "base.ckpt"),
             "first_stage_key": "image", **params}
    if "init_embedding" in given:
        given["init_embedding"] = str(folder / given["init_embedding"])
    return instantiate_from_config(tiny_models.latent_diffusion_config(folder, target, **given))


def prepared(folder: Path, target: str, **params: Any) -> Any:
    model = attach_trainer(model_of(folder, target, **params), load_photos(folder))
    model.setup("fit")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dog.pt", "two.safetensors"])
def test_perfusion_starts_at_the_given_word(folder: Path, name: str) -> None:
    covariance = {"covariance": str(folder / "covariance.safetensors")}
    model = prepared(folder, "perfusion.Perfusion", init_embedding=name, **covariance)
    encoder, (concept,) = model.cond_stage_model, model.concepts
    start = encoder.embed_pieces(encoder.word_pieces("dog" if name == "dog.pt" else "red dog")).mean(0, keepdim=True)
    assert torch.equal(concept.embedding, start) and concept.distance() == 0
    # i* is that word's encoding, and everything else is the super-category's
    tokens = encoder.tokenize([template.replace("{}", WORD) for template in tiny_models.TEMPLATES], [WORD])
    at_word = encoder.encode_tokens(tokens, start)[tokens == encoder.vocabulary_size].mean(0)
    assert torch.allclose(concept.target_input, at_word, atol=1e-5)
    plain = prepared(folder, "perfusion.Perfusion", **covariance).concepts[0]
    assert torch.equal(concept.super_input, plain.super_input)
    for output, other in zip(concept.target_outputs_v, plain.target_outputs_v, strict=True):
        assert torch.equal(output, other)


@pytest.mark.slow
def test_other_methods_take_all_vectors(folder: Path) -> None:
    model = prepared(folder, "textual_inversion.TextualInversion", init_embedding="two.safetensors")
    encoder = model.cond_stage_model
    assert torch.equal(model.concepts[0](), encoder.embed_pieces(encoder.word_pieces("red dog")))


@pytest.mark.parametrize(("params", "named"), [
    ({"init_embedding": "several.safetensors"}, r"holds 2 words \(<a>, <b>\); give a file with one"),
    ({"init_embedding": "wide.safetensors"}, "its embedding has 768 numbers, as for Stable Diffusion 1.x"),
    ({"init_embedding": "base.ckpt"}, "not a concept"),
    ({"init_embedding": "none.pt"}, "no such file"),
    ({"init_embedding": "dog.pt", "embedding_lr": 0}, "leave one of them out"),
])
def test_what_cannot_be_a_start(folder: Path, params: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        model_of(folder, "perfusion.Perfusion", **params)
