"""Several concepts at once: each is learned as it would be alone, and each prompt of a batch has its own."""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import tiny_models
from helpers.tiny_concepts import attach_trainer, write_base
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.data.concept_photos import split_concept_configs
from ldm.data.images import to_tensor
from ldm.data.module import DataModuleFromConfig
from ldm.inference.encoding import build_prompt_encoder, encode_prompts
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.personalization.base import PersonalizationMethod
from ldm.personalization.concept_names import file_names_for
from ldm.training.concept_callbacks import ConceptSaver
from ldm.util import instantiate_from_config

SUBJECTS = {"<toy>": "cat", "<mug>": "mug", "<hat>": "red hat"}  # the word of each concept -> its super-category
WORDS = list(SUBJECTS)
METHODS = {"perfusion": "perfusion.Perfusion", "textual-inversion": "textual_inversion.TextualInversion"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its text encoder's covariance, and photos: two, three and four of noise."""
    path = tmp_path_factory.mktemp("many")
    write_base(path)
    for number, name in enumerate(WORDS):
        (path / name).mkdir()
        noise = np.random.default_rng(number).integers(0, 256, (2 + number, 16, 16, 3), dtype=np.uint8)
        for photo, pixels in enumerate(noise):
            Image.fromarray(pixels).save(path / name / f"{photo}.png")
    return path


def data_of(folder: Path, words: list[str], **settings: Any) -> DataModuleFromConfig:
    """Photos as the config of a run describes them."""
    params = {"data_root": [str(folder / word) for word in words], "placeholder_token": words, "size": 16,
              "repeats": 8, "templates": list(tiny_models.TEMPLATES)}
    train = {"target": "ldm.data.personalized.PersonalizedBase", "params": params}
    torch.manual_seed(7)  # of the order
    module = DataModuleFromConfig(2, train=train, **settings)
    module.setup("fit")
    return module


def learner(folder: Path, words: list[str], method: str = "perfusion", **params: Any) -> PersonalizationMethod:
    own = {"covariance": str(folder / "covariance.safetensors")} if method == "perfusion" else {}
    given = {"super_category": [SUBJECTS[word] for word in words], "placeholder": words, "seed": 3,
             "ckpt_path": str(folder / "base.ckpt"), "first_stage_key": "image", **own, **params}
    return instantiate_from_config(tiny_models.latent_diffusion_config(folder, METHODS.get(method, method), **given))


def train_several(folder: Path, words: list[str], steps: int = 3, micro_batches: int = 1, method: str = "perfusion",
           **settings: Any) -> PersonalizationMethod:
    """A model after so many steps, without a trainer around it; gradients of a step are the mean of its batches'."""
    data = data_of(folder, words, **settings)
    model = attach_trainer(learner(folder, words, method), None, micro_batches)
    model.trainer.datamodule = data
    model.setup("fit")
    optimizer = model.configure_optimizers()["optimizer"]
    batches = model.trainer.accumulate_grad_batches
    for index, batch in zip(range(steps * batches), data.train_dataloader(), strict=False):
        (model.training_step(batch, index) / batches).backward()
        if (index + 1) % batches == 0:
            optimizer.step()
            optimizer.zero_grad()
            model.trainer.global_step += 1
    assert model.trainer.global_step == steps
    return model


@functools.cache
def train_alone(folder: Path, word: str, micro_batches: int) -> PersonalizationMethod:
    return train_several(folder, [word], micro_batches=micro_batches)


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max())), name


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "settings"), [(1, {}), (2, {}), (1, {"concepts_per_batch": 2}),
                                                 (2, {"concepts_per_batch": 1})])
def test_concepts_of_one_run_equal_those_of_separate_runs(folder: Path, micro_batches: int,
                                                          settings: dict[str, Any]) -> None:
    together = train_several(folder, WORDS, micro_batches=micro_batches, **settings)
    for index, word in enumerate(WORDS):
        learned, alone = together.concepts[index], train_alone(folder, word, micro_batches)
        assert_same_state(learned, alone.concepts[0])
        ours, theirs = together.export_concept(index), alone.export_concept()
        assert (ours.placeholder, ours.super_category, ours.base) == (word, SUBJECTS[word], theirs.base)
        assert (ours.embedding - learned.start).abs().max() > 100 * (ours.embedding - theirs.embedding).abs().max()


@pytest.mark.slow
def test_textual_inversion_learns_several_words(folder: Path) -> None:
    together = train_several(folder, WORDS[:2], method="textual-inversion")
    for index, word in enumerate(WORDS[:2]):
        alone = train_several(folder, [word], method="textual-inversion")
        assert_same_state(together.concepts[index], alone.concepts[0])
        assert together.export_concept(index).parameter_count == alone.export_concept().parameter_count


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"concepts_per_batch": 1}])
def test_devices_share_the_concepts(folder: Path, tmp_path: Path, settings: dict[str, int],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes on the CPU, one learns the second concept, the other the first and perhaps a third."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of an earlier run: new processes would be seeded by it
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # forks of a process with several threads would hang
    words = WORDS[:2] if settings else WORDS
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", devices=2, strategy="ddp_fork", default_root_dir=tmp_path,
                         logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[ConceptSaver()])
    torch.manual_seed(7)
    trainer.fit(learner(folder, words), datamodule=data_of(folder, words, **settings))
    for word in words:
        (ours,) = load_perfusion_concepts(tmp_path / f"{word[1:-1]}.safetensors")
        theirs = train_alone(folder, word, 1).export_concept()
        assert ours.steps == 3
        for (name, value), (_, other) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.allclose(value, other, rtol=2e-3, atol=1e-3 * float(other.abs().max())), name


@pytest.mark.slow
def test_one_pass_of_the_model_serves_all_concepts(folder: Path) -> None:
    data = data_of(folder, WORDS)
    model = attach_trainer(learner(folder, WORDS), None)
    model.trainer.datamodule = data
    model.setup("fit")
    seen, logged = [], {}
    own, model.log_dict = model.apply_model, lambda numbers, **_: logged.update(numbers)
    model.apply_model = lambda x, *rest: seen.append(len(x)) or own(x, *rest)
    model.training_step(next(iter(data.train_dataloader())), 0)
    assert seen == [6]
    losses = [float(logged[f"train/loss/{name}"]) for name in ("toy", "mug", "hat")]
    assert float(logged["train/loss"]) == pytest.approx(np.mean(losses)) and len(set(losses)) == 3
    assert "train/embedding_distance/hat" in logged


def test_weights_of_the_base_model_are_trained_for_one_concept_only(folder: Path) -> None:
    model = attach_trainer(learner(folder, WORDS, "custom_diffusion.CustomDiffusion"), None)
    model.trainer.datamodule = data_of(folder, WORDS)
    with pytest.raises(UserError, match="CustomDiffusion trains weights of the base model"):
        model.setup("fit")


@pytest.mark.parametrize(("params", "message"), [
    ({"placeholder": ["<toy>", "<TOY>"]}, "<toy> is given twice"),
    ({"placeholder": ["<toy>", "two words"]}, "'two words': must be a word"),
    ({"super_category": ["cat", "mug"]}, r"2 super-categories \(cat, mug\) for 3 concepts"),
    ({"placeholder": ["<toy>", "<hat>"], "super_category": "cat"}, "placeholder <toy>, <hat> .*, but <toy>, <mug>"),
])
def test_invalid_words_raise_a_user_error_of_one_line(folder: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        model = attach_trainer(learner(folder, WORDS, **params), None)
        model.trainer.datamodule = data_of(folder, WORDS)
        model.setup("fit")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["validation", "test"])
def test_validation_and_test_data_raise_a_user_error(folder: Path, name: str, method: str) -> None:
    params = {"data_root": str(folder / "<toy>"), "placeholder_token": "<toy>", "size": 16}
    model = attach_trainer(learner(folder, WORDS[:1], method), None)
    model.trainer.datamodule = data_of(
        folder, WORDS[:1], **{name: {"target": "ldm.data.personalized.PersonalizedBase", "params": params}})
    with pytest.raises(UserError, match=rf"data\.params\.{name}: .*leave it out.*evaluation/clip_eval\.py"):
        model.setup("fit")


def test_one_super_category_serves_all_concepts(folder: Path) -> None:
    assert learner(folder, WORDS, super_category="cat").super_categories == ["cat"] * 3


def test_names_for_files() -> None:
    assert file_names_for(["<my-teddy>", "mug", "<чашка>"]) == ["my-teddy", "mug", "чашка"]
    assert file_names_for(["<a>", "a"]) == ["0-a", "1-a"] and file_names_for(["<☃>", "<x/y>"]) == ["0", "1-xy"]


# Photos


def test_a_config_for_each_folder() -> None:
    shared = {"target": "some.Dataset", "params": {"size": 8, "templates": ["a {}", "the {}"]}}
    assert split_concept_configs(shared) == [shared]
    several = {"target": "some.Dataset", "params": {**shared["params"], "data_root": ["a", "b"], "mask_root": None,
                                                    "placeholder_token": ["<a>", "<b>"]}}
    assert [one["params"] for one in split_concept_configs(several)] == [
        {**shared["params"], "data_root": name, "placeholder_token": f"<{name}>", "mask_root": None} for name in "ab"]
    for name, values in (("placeholder_token", "<a>"), ("mask_root", ["x", "y", "z"]), ("data_root", ["a"])):
        with pytest.raises(UserError, match="folders of photos"):
            split_concept_configs({**several, "params": {**several["params"], name: values}})


@pytest.mark.slow
@pytest.mark.parametrize(("at_a_time", "groups"), [(None, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("before", [0, 4, 11])
def test_photos_come_in_the_order_of_separate_runs_also_after_resuming(
        folder: Path, at_a_time: int | None, groups: int, before: int) -> None:
    module = data_of(folder, WORDS, concepts_per_batch=at_a_time)
    assert module.num_groups == groups
    loader = module.train_dataloader()
    assert len(loader) == 8 * groups  # the shortest epoch: 2 photos 8 times, 2 at a time
    loader.load_state_dict({"drawn": before})
    indices = {concept: [] for concept in range(3)}
    batches = [batch for _ in range(3) for batch in loader]
    assert len(batches) == 24 * groups - before % (8 * groups) and loader.state_dict()["drawn"] == before + len(batches)
    for batch in batches:
        for concept, own in batch.items():
            indices[concept].append(own["index"].tolist())
    for concept, word in enumerate(WORDS):
        alone = data_of(folder, [word]).train_dataloader()
        expected = [batch["index"].tolist() for _ in range(12) for batch in alone]
        group = concept // (at_a_time or 3)
        done = len([index for index in range(before) if index % groups == group])
        assert indices[concept] == expected[done:done + len(indices[concept])]
        assert abs(len(indices[concept]) * groups - len(batches)) <= groups


def test_photos_are_not_decoded_again_once_they_are_encoded(folder: Path) -> None:
    data = data_of(folder, WORDS[:1])
    photos = data.datasets["train"]
    full = default_collate([photos[0], photos[1]])
    model = attach_trainer(learner(folder, WORDS[:1]), photos)
    model.on_fit_start()
    lean = default_collate([photos[0], photos[1]])
    assert set(full) - set(lean) == {"image", "mask"}
    assert lean["caption"] == full["caption"] and torch.equal(lean["flipped"], full["flipped"])


# Generating


@pytest.fixture(scope="module")
def model(folder: Path) -> PersonalizationMethod:
    """A model with three concepts, moved as some training would."""
    model = attach_trainer(learner(folder, WORDS), None)
    model.trainer.datamodule = data_of(folder, WORDS)
    model.setup("fit")
    torch.manual_seed(3)
    with torch.no_grad():
        for concept in model.concepts:
            for number in (*concept.parameters(), concept.target_input):
                number.add_(torch.randn_like(number) * 0.3)
    return model.eval()


@pytest.mark.slow
def test_logged_images_show_each_concept_in_turn(folder: Path, model: PersonalizationMethod) -> None:
    batch = next(iter(model.trainer.datamodule.train_dataloader()))
    prompts = [batch[concept]["caption"][number] for number in range(2) for concept in range(3)]
    logged = {count: model.log_images(batch, N=count, ddim_steps=2)["samples"] for count in (2, 4)}
    assert logged[4].shape == (4, 3, 16, 16) and logged[4].abs().max() <= 1
    assert torch.allclose(logged[4][:2], logged[2], atol=0.02)
    concepts = [model.export_concept(index) for index in range(3)]
    requests = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts[:4])]
    settings = GenerationSettings(num_inference_steps=2, guidance_scale=3.0, sampler="ddim")
    images = PerfusionPipeline(model).generate(requests, settings, concepts)
    assert torch.allclose(torch.stack([to_tensor(image) for image in images]), logged[4], atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_logged_images_of_a_single_concept(folder: Path, method: str) -> None:
    model = train_several(folder, WORDS[:1], steps=1, method=method)
    batch = next(iter(model.trainer.datamodule.train_dataloader()))
    assert model.eval().log_images(batch, N=8, ddim_steps=2)["samples"].shape == (2, 3, 16, 16)


def keys_values_of(model: PersonalizationMethod, concepts: list[Concept], requests: list[GenerationRequest],
                   **settings: Any) -> list[Tensor]:
    """Return keys and values of every layer for the requests' prompts, and for their negative prompts."""
    texts = [text for request in requests for text in (request.prompt, request.negative_prompt)]
    contexts = encode_prompts(build_prompt_encoder(model, concepts), texts, **settings).for_requests(requests)
    return [tensor for context in contexts for name, layer in model.text_layers.items()
            for tensor in context.keys_values(name, layer.to_k, layer.to_v)]


REQUESTS = [GenerationRequest("a photo of a <toy>", 1), GenerationRequest("a <mug> in a box", 2, "a <hat>"),
            GenerationRequest("a dog", 3), GenerationRequest("a <hat>", 4), GenerationRequest("a <toy> by a <mug>", 5)]
NAMED = ["<toy>", "<mug> <hat>", "", "<hat>", "<toy> <mug>"]


@torch.no_grad()
def test_many_prompts_are_encoded_in_batches(model: PersonalizationMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = [model.export_concept(index) for index in range(3)]
    at_once = keys_values_of(model, concepts, REQUESTS)
    monkeypatch.setattr("ldm.inference.encoding.PROMPTS_AT_A_TIME", 2)
    for ours, theirs in zip(keys_values_of(model, concepts, REQUESTS), at_once, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("locking", [{}, {"global_locking": True}])
@torch.no_grad()
def test_prompts_of_one_batch_use_different_concepts(model: PersonalizationMethod, locking: dict[str, bool]) -> None:
    concepts = [model.export_concept(index) for index in range(3)]
    together = keys_values_of(model, concepts, REQUESTS, **locking)
    for row, (request, named) in enumerate(zip(REQUESTS, NAMED, strict=True)):
        own = [concept for concept in concepts if concept.placeholder in named]
        alone = keys_values_of(model, own, [request], **(locking if own else {}))
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.allclose(ours[row], theirs[0], atol=1e-4 * float(theirs.abs().max())), request
    without = keys_values_of(model, concepts[:2], REQUESTS[:1])
    base = keys_values_of(model, [], [GenerationRequest("a photo of a cat", 1)])
    assert not torch.allclose(base[1], without[1], atol=1e-2)
