"""A concept on a model with two text encoders, a pooled vector and sizes, as Stable Diffusion XL has them."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sdxl
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, RepeatedBatch, attach_trainer, load_photos, train_method, write_photos
from omegaconf import OmegaConf
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.attention import name_text_layers
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.covariance_files import save_covariance
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.fast.sixteen_bits import to_sixteen_bits
from ldm.personalization import base, placement
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.layer_names import find_layers
from ldm.util import instantiate_from_config
from scripts.benchmarks.random_models import random_concept

PROMPTS = [template.replace("{}", WORD) for template in tiny_models.TEMPLATES]
CATEGORY_PROMPTS = [template.replace("{}", "cat") for template in tiny_models.TEMPLATES]
BATCH = {"caption": PROMPTS, "index": torch.tensor([0, 1]), "flipped": torch.tensor([False, True])}
SMALL_PROFILE = ["output_blocks.0.1", "output_blocks.1.1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base model, the covariance of its text encoders, and two photos, one of them not square."""
    path = tmp_path_factory.mktemp("sdxl")
    sdxl.write_small_model(path)
    encoder = sdxl.small_model().cond_stage_model
    with torch.no_grad():
        words = encoder.encode_tokens(encoder.tokenize(["a cat in a red box", "the dog and a cup", "a bear on a bike",
                                                        "some houses near rivers", "one old man drinks"])).flatten(0, 1)
    save_covariance(path / "covariance.safetensors", words.mT @ words / len(words), source="test", captions=5,
                    tokens="all", encoder=encoder_fingerprint(encoder))
    write_photos(path)
    return path


def unprepared(folder: Path, target: str = "ldm.personalization.perfusion.Perfusion", **params: Any
               ) -> PersonalizationMethod:
    config = sdxl.small_config(super_category="cat", placeholder=WORD, ckpt_path=str(folder / "model.safetensors"),
                               first_stage_key="image", cond_stage_key="caption")
    if target.endswith("Perfusion"):
        config.model.params.covariance = str(folder / "covariance.safetensors")
    config.model.target = target
    config.model.params.update(params)
    return instantiate_from_config(config.model)


def prepared(folder: Path, data: ConceptPhotos | None = None, **params: Any) -> PersonalizationMethod:
    model = attach_trainer(unprepared(folder, **params), data or load_photos(folder))
    model.setup("fit")
    model.configure_optimizers()
    return model.train()


def step(model: PersonalizationMethod, learning_rate: float = 0.01) -> Tensor:
    """Take one step of plain gradient descent; return the loss."""
    loss = model.training_step(BATCH, 0)
    loss.backward()
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.sub_(learning_rate * parameter.grad)
    return loss.detach()


def recorded_vectors(model: PersonalizationMethod) -> list[Tensor]:
    """Return a list that receives the vector of each call of the U-Net."""
    vectors: list[Tensor] = []
    model.model.diffusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: vectors.append(kwargs["y"]), with_kwargs=True)
    return vectors


# The word, and the vector


def test_both_halves_of_the_word_get_a_gradient(folder: Path) -> None:
    model = prepared(folder)
    (concept,) = model.concepts
    encoder = model.cond_stage_model
    assert list(encoder.word_parts.values()) == [sdxl.WIDTH_L, sdxl.WIDTH_G]
    assert torch.equal(concept.embedding, word_vector(encoder, "cat"))
    assert concept.target_input.shape == (sdxl.WIDTH_L + sdxl.WIDTH_G,)
    model.training_step(BATCH, 0).backward()
    for half in concept.embedding.grad.split([sdxl.WIDTH_L, sdxl.WIDTH_G], -1):
        assert half.norm() > 1e-3
    assert all(output.grad.norm() > 0 for output in concept.target_outputs_v)
    # Each half reaches its own columns of the encodings only.
    tokens = encoder.tokenize(PROMPTS, [WORD])
    for columns, other in ((slice(0, sdxl.WIDTH_L), slice(sdxl.WIDTH_L, None)),
                           (slice(sdxl.WIDTH_L, None), slice(0, sdxl.WIDTH_L))):
        word = concept.embedding.detach().clone().requires_grad_()
        encoder.encode_tokens(tokens, word)[..., columns].sum().backward()
        assert word.grad[:, columns].norm() > 0 and not word.grad[:, other].any()


@pytest.mark.parametrize("pooled", ["super_category", "concept"])
def test_the_pooled_vector_is_locked_unless_asked_for(folder: Path, pooled: str) -> None:
    model = prepared(folder, pooled=pooled)
    (concept,), encoder = model.concepts, model.cond_stage_model
    with torch.no_grad():
        concept.embedding.add_(torch.randn_like(concept.embedding))
    context = model.prompt_context([*PROMPTS, PROMPTS[0]])
    category = encoder.encode_with_pooled(encoder.tokenize(CATEGORY_PROMPTS))[1]
    own = encoder.encode_with_pooled(encoder.tokenize(PROMPTS, [WORD]), concept.embedding)[1]
    expected = category if pooled == "super_category" else own
    torch.testing.assert_close(context.pooled, expected[[0, 1, 0]], rtol=1e-4, atol=1e-5)
    assert (own - category).norm() > 0.1 * category.norm()
    assert context.pooled.requires_grad == (pooled == "concept")
    assert model.export_concept().pooled == pooled


@pytest.mark.slow
def test_the_unet_reads_the_sizes_of_each_photo(folder: Path) -> None:
    model, data = unprepared(folder), load_photos(folder)
    data.photos[1].original_size, data._squares[1] = (48, 20), type(data._squares[1])(12, 2, 8)
    data.photos[1].image = data.photos[1].image.resize((48, 20))
    attach_trainer(model, data).setup("fit")
    vectors = recorded_vectors(model)
    model.train().training_step(BATCH, 0)
    # Photo 1 is mirrored: its square of 8 pixels, resized to 16, is 48 - 12 - 8 pixels from the left.
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16], [20, 48, 4, 56, 16, 16]]).double()
    half = sdxl.FEATURES // 2
    angles = sizes[..., None] * 10000.0 ** (-torch.arange(half) / half)
    features = torch.cat([angles.cos(), angles.sin()], -1).flatten(1)
    torch.testing.assert_close(vectors[0][:, sdxl.POOLED:].double(), features, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_unknown_choice_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="pooled 'both' is unknown; choose one of super_category, concept"):
        unprepared(folder, pooled="both")
    with pytest.raises(UserError, match=r"embedding_lr -0.1 must not be below 0"):
        unprepared(folder, embedding_lr=-0.1)
    with pytest.raises(UserError, match=r"trained_layers: no layer that reads text is called output_blocks.9"):
        unprepared(folder, trained_layers=["output_blocks.9"])
    with pytest.raises(UserError, match=r"used_layers: no layer that reads text is called output_blocks.2"):
        unprepared(folder, trained_layers=SMALL_PROFILE, used_layers="output_blocks.2")


@pytest.mark.slow
def test_the_fingerprint_of_two_encoders() -> None:
    one, other = (sdxl.small_model().cond_stage_model for _ in range(2))
    before = encoder_fingerprint(one)
    with torch.no_grad():
        one.embedders[1].model.logit_scale.fill_(3.0)  # which some files lack, and no encoding reads
    assert encoder_fingerprint(one) == before
    other.embedders[0].layer_idx = 1
    assert encoder_fingerprint(other) != before


# The word stays


@pytest.mark.slow
def test_without_a_learning_rate_of_the_word_prompts_are_encoded_once(folder: Path) -> None:
    model = prepared(folder, embedding_lr=0.0)
    (concept,), encoder = model.concepts, model.cond_stage_model
    start = concept.embedding.detach().clone()
    with torch.no_grad():
        expected = encoder.encode_with_pooled(encoder.tokenize(PROMPTS, [WORD]), start)
    calls: list[int] = []
    encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for tower in encoder.towers:
        tower.encode_embedded = lambda *_: pytest.fail("the text encoder was called")
    losses = [float(step(model)) for _ in range(2)]
    assert losses[1] < losses[0] and torch.equal(concept.embedding, start) and concept.embedding.grad is None
    assert not calls and concept.distance() == 0
    context = model.prompt_context(PROMPTS)
    torch.testing.assert_close((context.encoding, context.pooled), expected, rtol=1e-4, atol=1e-5)
    # The encoder does not follow the model to another device or precision.
    model.double()
    assert next(model.model.parameters()).dtype == torch.float64
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert any(key.startswith("conditioner.") for key in model.state_dict())


# Some layers


def test_only_some_layers_are_learned_and_stored(folder: Path, tmp_path: Path) -> None:
    model = prepared(folder, trained_layers=SMALL_PROFILE)
    (concept,) = model.concepts
    learned = [name for name in model.text_layers if name.startswith(("output_blocks.0.1.", "output_blocks.1.1."))]
    assert len(learned) == 4 and len(concept.target_outputs_v) == 4
    step(model, 1.0)
    exported = model.export_concept()
    assert list(exported.target_outputs_v) == learned and not exported.target_outputs_k
    save_perfusion_concepts(tmp_path / "concept.safetensors", [exported], None)
    (loaded,) = load_perfusion_concepts(tmp_path / "concept.safetensors")
    context = model.sampling_encoder([loaded]).encode(PROMPTS)
    # Every other layer gives what the super-category gives.
    for name, layer in model.text_layers.items():
        at_start = layer.to_v.weight @ concept.super_input
        is_learned = name in learned
        assert torch.allclose(context.target_outputs_v[name][0], at_start, atol=1e-4) != is_learned
        torch.testing.assert_close(context.target_outputs_k[name][0], layer.to_k.weight @ concept.super_input)


@pytest.mark.parametrize(("layers", "kilobytes"), [(None, (190, 200)), (SMALL_PROFILE, (70, 78))])
def test_sizes_of_files_for_the_real_model(layers: list[str] | None, kilobytes: tuple[int, int], tmp_path: Path
                                           ) -> None:
    config = OmegaConf.load(sdxl.CONFIG).model.params.unet_config
    with torch.device("meta"):
        shapes = name_text_layers(instantiate_from_config(config))
    concept = random_concept(shapes, 768 + 1280, "f" * 64, 0)
    concept = replace(concept, word_parts={"clip_l": 768, "clip_g": 1280}, dual=torch.randn(2048))
    if layers is not None:
        names = find_layers("trained_layers", layers, list(shapes))
        assert len(names) == 20
        concept = replace(concept, target_outputs_v={name: concept.target_outputs_v[name] for name in names})
    assert sum(map(len, concept.target_outputs_v.values())) == (83_200 if layers is None else 25_600)
    save_perfusion_concepts(tmp_path / "concept.safetensors", [concept])
    size = (tmp_path / "concept.safetensors").stat().st_size / 1000
    assert kilobytes[0] < size < kilobytes[1]


# Norms


@pytest.mark.slow
def test_norms_of_the_word_are_logged_and_kept_on_request(folder: Path) -> None:
    model = prepared(folder)
    (concept,), widths = model.concepts, [sdxl.WIDTH_L, sdxl.WIDTH_G]
    assert model.word_widths == widths
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda numbers, **_: logged.update(numbers)
    start = concept.start.split(widths, -1)
    with torch.no_grad():
        concept.embedding[:, widths[0]:] *= 1.5
        concept.embedding[:, :widths[0]] *= 1.2
    model.training_step(BATCH, 0)
    assert float(logged["train/embedding_norm"]) == pytest.approx(1.5, rel=1e-5)
    concept.restore_norms(widths)
    for part, before in zip(concept.embedding.split(widths, -1), start, strict=True):
        torch.testing.assert_close(part, before)


@pytest.mark.slow
def test_a_run_keeps_the_norms(folder: Path, tmp_path: Path) -> None:
    model = unprepared(folder, preserve_embedding_norm=True, seed=1, embedding_lr=0.05)
    train_method(model, RepeatedBatch(folder, BATCH), tmp_path, steps=2)
    assert model.concepts[0].distance() > 0.01
    assert float(model.concepts[0].relative_norm(model.word_widths)) == pytest.approx(1, abs=1e-5)


# Memory


def test_a_large_frozen_unet_is_converted_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "to_sixteen_bits", lambda network, dtype: None)

    def stored(precision: str, device: str) -> torch.dtype | None:
        return placement.store_in_sixteen_bits(torch.nn.Linear(2, 2), precision, torch.device(device))

    assert stored("bf16-mixed", "cuda") is None  # small
    monkeypatch.setattr(placement, "LARGE", 5)
    assert stored("bf16-mixed", "cuda") is torch.bfloat16 and stored("16-mixed", "cuda") is torch.float16
    assert stored("32-true", "cuda") is stored("bf16-mixed", "cpu") is None


@pytest.mark.slow
def test_weights_of_sixteen_bits_from_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with mixed precision: the U-Net is converted before it is moved, its text projections are not."""
    def convert(unet: torch.nn.Module, precision: str, device: torch.device) -> torch.dtype:
        to_sixteen_bits(unet, torch.bfloat16)
        return torch.bfloat16

    exact = prepared(folder, seed=1)
    monkeypatch.setattr(base, "store_in_sixteen_bits", convert)
    model = prepared(folder, seed=1)
    assert model.base_model == exact.base_model
    for one, other in zip(model.concepts[0].values(), exact.concepts[0].values(), strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(BATCH, 0)
    assert float(loss) == pytest.approx(float(exact.training_step(BATCH, 0)), rel=0.03)


# Other methods


@pytest.mark.slow
@pytest.mark.parametrize("method", ["textual_inversion.TextualInversion", "custom_diffusion.CustomDiffusion",
                                    "dreambooth.DreamBooth"])
def test_other_methods_train_and_generate(folder: Path, tmp_path: Path, method: str) -> None:
    extra = {"prior_count": 1, "prior_steps": 1} if "textual" not in method else {"vectors_per_word": 2}
    model = unprepared(folder, f"ldm.personalization.{method}", seed=1, **extra)
    train_method(model, RepeatedBatch(folder, BATCH), tmp_path / "run", steps=1)
    assert (tmp_path / "run" / "concept.safetensors").is_file()
    images = model.eval().log_images(BATCH, N=1, ddim_steps=1)["samples"]
    assert images.shape == (1, 3, sdxl.SIDE, sdxl.SIDE) and images.isfinite().all()
