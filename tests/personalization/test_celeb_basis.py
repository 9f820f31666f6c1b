"""Celeb Basis: principal directions of known words, and words of unit length in them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, RepeatedBatch, attach_trainer, load_photos, train_method, write_photos

from ldm.common.errors import UserError
from ldm.common.files import load_metadata, load_tensors
from ldm.concepts.storage import load_concepts, read_concepts, save_concepts
from ldm.inference.encoding import build_prompt_encoder, encode_prompts
from ldm.personalization.celeb_basis import BasisWord, CelebBasis, WordBasis, read_names
from ldm.util import instantiate_from_config

NAMES = ("red cat", "blue dog", "green bird", "old house", "cat", "red dog", "big blue moon")
BATCH = {"caption": [template.replace("{}", WORD) for template in tiny_models.TEMPLATES],
         "index": torch.tensor([0, 1]), "flipped": torch.tensor([False, True])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base model, two photos, and a file of names."""
    path = tmp_path_factory.mktemp("celeb_basis")
    tiny_models.write_weights(path)
    write_photos(path)
    (path / "names.txt").write_text("\n".join(["# people", *NAMES, "", "red  cat"]))
    return path


def unprepared(folder: Path, **params: Any) -> CelebBasis:
    given = {"super_category": "teddy bear", "placeholder": WORD, "ckpt_path": str(folder / "base.ckpt"),
             "word_basis": str(folder / "names.txt"), "embedding_lr": 0.1, **params}
    config = tiny_models.latent_diffusion_config(folder, **given)
    return instantiate_from_config({**config, "target": "ldm.personalization.celeb_basis.CelebBasis"})


@pytest.fixture(scope="module")
def model(folder: Path) -> CelebBasis:
    """A model with two vectors per word, ready for its first step."""
    model = attach_trainer(unprepared(folder), load_photos(folder), root=str(folder / "run"))
    model.setup("fit")
    model.configure_optimizers()
    return model.train()


def test_directions_are_numpys_principal_components() -> None:
    words = np.random.default_rng(0).normal(size=(9, 6)) * [5, 4, 3, 2, 1, 0.5] + 1
    basis = WordBasis.of(torch.from_numpy(words).float(), 4)
    centered = words - words.mean(0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    expected = vectors[:, np.argsort(values)[::-1][:4]].T
    assert np.allclose(np.abs((basis.directions.numpy() * expected).sum(1)), 1, atol=1e-5)
    assert np.allclose(basis.mean.numpy(), words.mean(0), atol=1e-6)
    assert float(basis.radius) == pytest.approx(np.sqrt((centered**2).sum(1).mean()), rel=1e-5)


def test_a_basis_has_fewer_directions_than_words() -> None:
    assert WordBasis.of(torch.randn(4, 6), 512).directions.shape == (3, 6)
    assert WordBasis.of(torch.randn(40, 6), 512).directions.shape == (6, 6)


def test_a_word_is_as_far_from_the_mean_as_the_radius() -> None:
    torch.manual_seed(0)
    bases = [WordBasis.of(torch.randn(9, 6), 4), WordBasis.of(torch.randn(5, 6) * 3, 4)]
    start = torch.randn(2, 6)
    word = BasisWord(bases, start)
    for _ in range(2):
        offsets = word().detach() - torch.stack([basis.mean for basis in bases])
        assert torch.allclose(offsets.norm(dim=1), torch.stack([basis.radius for basis in bases]), rtol=1e-5)
        with torch.no_grad():
            word.coefficients.add_(torch.randn(2, 4) * 5)
    # The start is the direction to the given vectors, as far as the basis has it.
    first = BasisWord(bases, start)
    for basis, vector, given in zip(bases, first().detach(), start, strict=True):
        projected = basis.directions.T @ (basis.directions @ (given - basis.mean))
        expected = basis.mean + basis.radius * projected / projected.norm()
        assert torch.allclose(vector, expected, atol=1e-5)
    assert float(first.distance()) == 0 and float(first.relative_norm([6])) == pytest.approx(1)


def test_restored_norms_leave_the_vectors_as_they_are() -> None:
    torch.manual_seed(1)
    word = BasisWord([WordBasis.of(torch.randn(9, 6), 4)], torch.randn(1, 6))
    with torch.no_grad():
        word.coefficients.mul_(7)
    before = word().detach()
    word.restore_norms([6])
    assert torch.allclose(word(), before, atol=1e-6) and float(word.coefficients.detach().norm()) == pytest.approx(1)


def test_the_basis_of_a_position_is_that_of_the_names_words_there(model: CelebBasis) -> None:
    encoder = model.cond_stage_model
    for basis, words in zip(model.bases, (["red", "blue", "green", "old", "cat", "big"],
                                          ["cat", "dog", "bird", "house", "blue"]), strict=True):
        rows = torch.cat([encoder.embed_pieces(encoder.word_pieces(word)) for word in words])
        assert torch.allclose(basis.mean, rows.mean(0), atol=1e-6) and len(basis.directions) == len(words) - 1
    assert model.concepts[0].coefficients.shape == (2, 4)  # as many in each basis


def test_a_name_is_the_mean_of_its_words_with_one_vector(folder: Path) -> None:
    (basis,) = unprepared(folder, vectors_per_word=1, basis_size=3).bases
    encoder = tiny_models.build_model(folder, use_ema=False).cond_stage_model
    rows = torch.stack([encoder.token_table[encoder.word_pieces(name)].mean(0) for name in NAMES]).detach()
    assert torch.allclose(basis.mean, rows.mean(0), atol=1e-6) and basis.directions.shape == (3, tiny_models.WIDTH)


def test_gradients_reach_the_coefficients_alone(model: CelebBasis) -> None:
    model.training_step(BATCH, 0).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["concepts.0.coefficients"]
    # The loss does not depend on the length of w, so its gradient has no component along w.
    coefficients = model.concepts[0].coefficients
    along = (coefficients.grad * coefficients.detach()).sum(1)
    assert float(along.abs().max()) < 1e-4 * float(coefficients.grad.norm())
    assert model.export_concept().parameter_count == coefficients.numel() == 8


@pytest.mark.slow
def test_a_run_is_saved_resumed_and_generated_with(folder: Path, tmp_path: Path) -> None:
    straight = train_method(unprepared(folder), RepeatedBatch(folder, BATCH), tmp_path / "a", 3)
    train_method(unprepared(folder), RepeatedBatch(folder, BATCH), tmp_path / "b", 2)
    train_method(unprepared(folder), RepeatedBatch(folder, BATCH), tmp_path / "c", 3, tmp_path / "b" / "last.ckpt")
    files = [tmp_path / run / "concept.safetensors" for run in "ac"]
    ours, theirs = (load_tensors(path)[0] for path in files)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert load_metadata(files[0])["personalization"]["method"] == "celeb-basis"
    saved = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {"concepts.0.coefficients"}

    exact = save_concepts(tmp_path / "toy.safetensors", [straight.export_concept()], torch.float32)
    assert load_concepts(exact)[0].method_label == "Celeb Basis" and float(straight.concepts[0].distance()) > 0
    base = tiny_models.build_model(folder, use_ema=False).eval()
    prompts = BATCH["caption"]
    with torch.no_grad():
        encoded = encode_prompts(build_prompt_encoder(base, read_concepts([exact])), prompts).select(prompts)
        assert torch.allclose(encoded.encoding, straight.prompt_context(prompts).encoding, atol=1e-5)


@pytest.mark.parametrize(("params", "named"), [
    ({"word_basis": "nobody.txt"}, "nobody.txt: no such file"), ({"basis_size": 0}, "basis_size 0"),
    ({"vectors_per_word": 0}, "vectors_per_word 0"),
    ({"vectors_per_word": 3}, "1 different words at position 3 of names")])
def test_bases_that_no_word_can_have(folder: Path, params: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        unprepared(folder, **params)
    assert "\n" not in str(error.value)


def test_names_are_lines_of_a_file_or_everyday_kinds(folder: Path) -> None:
    assert read_names(str(folder / "names.txt")) == list(NAMES)
    assert {"teddy bear", "person"} <= set(read_names("kinds"))
