"""Perfusion's training: where parameters start, what a step computes, and what the concept file keeps."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import (
    WORD,
    RepeatedBatch,
    attach_trainer,
    load_photos,
    train_method,
    write_base,
    write_photos,
)
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.model_spec import current_date
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import read_concepts
from ldm.concepts.thumbnail import read_thumbnail
from ldm.inference.encoding import build_prompt_encoder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.context import PromptContext
from ldm.modules.covariance_files import load_covariance
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import gate, invert_covariance, similarity
from ldm.personalization.concept_names import as_list
from ldm.personalization.layer_names import find_layers
from ldm.personalization.perfusion import Perfusion
from ldm.util import instantiate_from_config

LAYERS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base model, its text encoder's covariance, and two photos."""
    path = tmp_path_factory.mktemp("perfusion")
    write_base(path)
    write_photos(path)
    return path


def unprepared(folder: Path, **params: Any) -> Perfusion:
    given = {"super_category": "cat", "placeholder": WORD, "covariance": str(folder / "covariance.safetensors"),
             "ckpt_path": str(folder / "base.ckpt"), "first_stage_key": "image", **params}
    return instantiate_from_config(tiny_models.latent_diffusion_config(folder, "perfusion.Perfusion", **given))


def prepared(folder: Path, micro_batches: int = 1, masks: list[Tensor] | None = None, **params: Any) -> Perfusion:
    data = load_photos(folder)
    if masks is not None:
        data.set_subject_masks([mask[0] for mask in masks])
    model = attach_trainer(unprepared(folder, **params), data, micro_batches)
    model.setup("fit")
    model.configure_optimizers()
    return model.train()


def batch() -> dict[str, Any]:
    return {"caption": [template.replace("{}", WORD) for template in tiny_models.TEMPLATES],
            "index": torch.tensor([0, 1]), "flipped": torch.tensor([False, True])}


def left_half(right: float) -> Tensor:
    """A mask of ones on the left, and what is given on the right."""
    mask = torch.ones(1, 16, 16)
    mask[:, :, 8:] = right
    return mask


def encodings_of(model: Perfusion, word: str) -> Tensor:
    """(2, d): what the text encoder makes of a word of one piece in each of the templates, by plain prompts."""
    encoder = model.cond_stage_model
    (piece,) = encoder.word_pieces(word)
    prompts = [template.replace("{}", word) for template in tiny_models.TEMPLATES]
    return torch.stack([encoder([prompt])[0][encoder.tokenize([prompt])[0] == piece][0] for prompt in prompts])


def perturb(model: Perfusion) -> None:
    """Move the parameters, as some training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.concepts[0].target_input.add_(torch.randn_like(model.concepts[0].target_input) * 0.05)


# Initialization


@pytest.mark.slow
def test_everything_starts_at_the_super_category(folder: Path) -> None:
    model = prepared(folder)
    concept, at_word = model.concepts[0], encodings_of(model, "cat").mean(0)
    assert torch.equal(concept.embedding, model.cond_stage_model.token_table[model.cond_stage_model.word_pieces("cat")])
    assert torch.allclose(concept.super_input, at_word, atol=1e-5)
    assert torch.equal(concept.target_input, concept.super_input)
    for output, layer in zip(concept.target_outputs_v, model.text_layers.values(), strict=True):
        assert torch.allclose(output[0], layer.to_v.weight @ at_word, atol=1e-4)
    assert len(concept.target_outputs_v) == len(model.text_layers) == LAYERS and concept.distance() == 0


@pytest.mark.slow
def test_the_first_step_moves_encodings_along_the_concept_only(folder: Path) -> None:
    """With o* = W i*, Eq. 3 is h = W (e + (g - s) i*): the plain model, on encodings moved along i* by gate minus s."""
    model = prepared(folder)
    target, inverse = model.concepts[0].target_input, model.inverse_covariance()
    with torch.no_grad():
        context = model.prompt_context(batch()["caption"])
        plain = model.get_learned_conditioning([t.replace("{}", "cat") for t in tiny_models.TEMPLATES])
        assert torch.allclose(context.encoding, plain, atol=1e-5)
        dual = inverse.double() @ target.double()
        exact = plain.double() @ dual / (target.double() @ dual)
        assert torch.allclose(similarity(plain, target[None], dual[None].float())[..., 0].double(), exact, atol=1e-4)
        moved = plain + (gate(exact, 0.75, 0.1) - exact)[..., None].float() * target
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
        expected, got = model.apply_model(x, t, moved), model.apply_model(x, t, context)
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(got, model.apply_model(x, t, plain), atol=1e-3)


def test_a_super_category_of_several_pieces_is_their_mean(folder: Path) -> None:
    model = prepared(folder, super_category="teddy bear birdbath")
    encoder = model.cond_stage_model
    pieces = encoder.word_pieces("teddy bear birdbath")
    assert len(pieces) > 3
    assert torch.allclose(model.concepts[0].embedding, encoder.token_table[pieces].mean(0, keepdim=True), atol=1e-6)
    context = model.prompt_context(batch()["caption"])
    positions = encoder.tokenize(batch()["caption"], [WORD]) == len(encoder.token_table)
    assert positions.sum(1).tolist() == [1, 1]
    assert torch.allclose(context.encoding[positions].mean(0), model.concepts[0].super_input, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("params", "message"), [
    ({"super_category": None}, "--init_word"), ({"super_category": "  "}, "teddy bear"),
    ({"ckpt_path": None}, "--actual_resume"), ({"placeholder": "two words"}, "white space"),
    ({"locking": "global"}, "local, trained"), ({"projection": "half"}, "full, gated"),
    ({"used_layers": ["outer"]}, "layer that reads text is called outer"), ({"temperature": 0.0}, "above 0"),
    ({"other_layers_share": 0.5}, "needs used_layers"),
    ({"other_layers_share": 1.5, "used_layers": "output_blocks"}, "other_layers_share 1.5: .*at most 1"),
    ({"covariance": "missing.safetensors"}, "missing.safetensors"), ({"ckpt_path": "missing.ckpt"}, "missing.ckpt"),
])
def test_invalid_params_raise_a_user_error_of_one_line(folder: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepared(folder, **params)
    assert "\n" not in str(error.value)


def test_a_word_of_no_pieces_is_no_super_category(folder: Path) -> None:
    encoder = SimpleNamespace(word_pieces=lambda word: [7, 7], word_tokenizer=SimpleNamespace(unk_token_id=7),
                              token_table=torch.zeros(8, 2))
    with pytest.raises(UserError, match="'☃' cannot be expressed"):
        word_vector(encoder, "☃")


def test_training_data_must_be_photos(folder: Path) -> None:
    with pytest.raises(UserError, match="PersonalizedBase"):
        attach_trainer(unprepared(folder), [1, 2]).setup("fit")


# A step


def gradients(model: Perfusion) -> dict[str, Tensor]:
    model.training_step(batch(), 0).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("locking", ["local", "trained"])
def test_only_the_concept_gets_gradients_with_and_without_recomputation(folder: Path, locking: str) -> None:
    stored, recomputed = (gradients(prepared(
        folder, locking=locking, unet_config=tiny_models.unet_config(use_checkpoint=flag)))
                        for flag in (False, True))
    tables = ["target_outputs_v"] + ["target_outputs_k"] * (locking == "trained")
    assert set(stored) == {"concepts.0.embedding"} | {f"concepts.0.{t}.{n}" for t in tables for n in range(LAYERS)}
    assert set(recomputed) == set(stored)
    for name, gradient in stored.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_the_optimizer_has_two_learning_rates_for_the_concept_alone(folder: Path) -> None:
    model = prepared(folder, locking="trained", embedding_lr=0.5, value_lr=0.25)
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.25]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]
    optimized = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(optimized) == 1 + 2 * LAYERS
    assert not any(m.training for part in (model.first_stage_model, model.cond_stage_model) for m in part.modules())


@pytest.mark.slow
def test_the_target_input_is_a_moving_average(folder: Path) -> None:
    model = prepared(folder)
    start, first = model.concepts[0].target_input.clone(), encodings_of(model, "cat")
    prompts = [batch()["caption"][n] for n in (0, 0, 1)]  # the mean is over the batch, not over different prompts
    model.prompt_context(prompts, update_target_inputs=True)
    expected = 0.99 * start + 0.01 * (2 * first[0] + first[1]) / 3
    assert torch.allclose(model.concepts[0].target_input, expected, atol=1e-6)
    with torch.no_grad():  # as if v had become another word
        model.concepts[0].embedding.copy_(word_vector(model.cond_stage_model, "dog"))
    model.prompt_context(prompts[1:], update_target_inputs=True)
    expected = 0.99 * expected + 0.01 * encodings_of(model, "dog").mean(0)
    assert torch.allclose(model.concepts[0].target_input, expected, atol=1e-6)
    model.prompt_context(prompts)
    assert torch.allclose(model.concepts[0].target_input, expected, atol=1e-6)
    assert not model.concepts[0].target_input.requires_grad and torch.equal(model.concepts[0].super_input, start)


@pytest.mark.slow
def test_micro_batches_move_the_average_as_far_as_one_batch(folder: Path) -> None:
    one = prepared(folder, target_input_decay=0.5)
    four = prepared(folder, micro_batches=4, target_input_decay=0.5)
    for model, times in ((one, 1), (four, 4)):
        with torch.no_grad():
            model.concepts[0].embedding.copy_(word_vector(model.cond_stage_model, "dog"))
        for _ in range(times):
            model.prompt_context(batch()["caption"], update_target_inputs=True)
    assert torch.allclose(one.concepts[0].target_input, four.concepts[0].target_input, atol=1e-5)


def inputs_of_the_loss(model: Perfusion, step: int = 0, micro_batch: int = 0) -> tuple[Any, ...]:
    """Return latents, context, timesteps, noise and weights of one training step."""
    seen: list[tuple[Any, ...]] = []
    model.per_sample_losses = lambda *args: seen.append(args) or (torch.zeros(2), {"loss": torch.zeros(2)})
    model.trainer.global_step = step
    model.training_step(batch(), micro_batch)
    return seen[0]


@pytest.mark.slow
def test_inputs_of_the_loss(folder: Path) -> None:
    model = prepared(folder, masks=[left_half(0.5), left_half(0.25)])
    z, context, t, noise, weight = inputs_of_the_loss(model)
    assert isinstance(context, PromptContext) and context.batch_size == 2 and not context.cache
    assert z.shape == noise.shape == (2, 4, 8, 8) and t.shape == (2,) and 0 <= int(t.min()) <= int(t.max()) < 1000
    images = torch.stack([load_photos(folder)[n]["image"] for n in range(2)])
    flipped = [load_photos(folder)[n]["flipped"] for n in range(2)]
    upright = torch.stack([image.flip(-1) if f else image for image, f in zip(images, flipped, strict=True)])
    upright[1] = upright[1].flip(-1)  # as the batch says
    posterior = model.first_stage_model.encode(upright)
    noise_of_latents = (z / 0.18215 - posterior.mean) / posterior.std
    assert 0.8 < float(noise_of_latents.std()) < 1.2
    model.cached_latents.moments[:, :, 4:] = -30.0  # without the posterior's variance, latents are its mean
    assert torch.allclose(inputs_of_the_loss(model)[0], 0.18215 * posterior.mean, atol=1e-4)
    assert not torch.allclose(posterior.mean[0], posterior.mean[0].flip(-1), atol=1e-2)
    assert weight.shape == (2, 1, 8, 8) and weight[0, 0, 0].tolist() == [1.0] * 4 + [0.5] * 4
    assert weight[1, 0, 7].tolist() == [0.25] * 4 + [1.0] * 4  # mirrored along


@pytest.mark.slow
def test_noise_depends_on_seed_step_and_micro_batch_alone(folder: Path) -> None:
    model = prepared(folder, micro_batches=2, seed=0)

    def random_inputs(step: int, micro_batch: int, of: Perfusion = model) -> Tensor:
        z, _, t, noise, _ = inputs_of_the_loss(of, step, micro_batch)
        return torch.cat([z.flatten(), t, noise.flatten()])

    reference = random_inputs(5, 0)
    torch.manual_seed(99)
    assert torch.equal(random_inputs(5, 0), reference) and torch.equal(random_inputs(5, 2), reference)
    other = prepared(folder, micro_batches=2, seed=1)
    for changed in (random_inputs(6, 0), random_inputs(5, 1), random_inputs(5, 0, other)):
        assert not torch.equal(changed, reference)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_shifted_as_the_config_says(folder: Path, shift: float) -> None:
    model, generator = prepared(folder, timestep_shift=shift), torch.Generator().manual_seed(2)
    _, t = model.sample_noise_and_timesteps(torch.zeros(20_000, 1, 1, 1), generator)
    assert t.float().median().item() == pytest.approx(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5), abs=12)
    torch.manual_seed(5)  # sampled by the step's own generator, so that a resumed run repeats them
    assert torch.equal(model.sample_noise_and_timesteps(torch.zeros(20_000, 1, 1, 1), generator.manual_seed(2))[1], t)


def test_masks_decide_where_errors_count(folder: Path) -> None:
    model = prepared(folder, masks=[left_half(0.0)] * 2)
    outputs = torch.randn(2, 4, 8, 8)
    losses = []
    for spoiled in (0.0, 9.0):
        outputs[0, ..., 4:] += spoiled
        outputs[1, ..., :4] += spoiled  # mirrored
        model.apply_model = lambda x, t, cond: outputs
        losses.append(float(model.training_step(batch(), 0)))
    assert losses[0] == losses[1] > 0


@pytest.mark.slow
def test_weights_fall_off_outside_a_mask(folder: Path) -> None:
    weight = inputs_of_the_loss(prepared(folder, masks=[left_half(0.0)] * 2, mask_border=0.25))[-1]
    expected = torch.tensor([1.0] * 4 + [0.7, 0.3, 0.0, 0.0])  # 0.8, 0.6, 0.4, 0.2 on four pixels, two in each cell
    assert torch.allclose(weight[0, 0], expected.expand(8, 8)) and torch.allclose(weight[1, 0], expected.flip(0))
    everywhere = inputs_of_the_loss(prepared(folder, mask_border=0.25))[-1]  # without masks
    assert torch.equal(everywhere, torch.ones(2, 1, 8, 8))


@pytest.mark.parametrize("border", [-0.1, 1.5])
def test_a_mask_border_must_be_a_share(folder: Path, border: float) -> None:
    with pytest.raises(UserError, match=rf"mask_border {border} is a share of the image's side"):
        unprepared(folder, mask_border=border)


def test_half_precision_does_not_reach_the_similarity(folder: Path) -> None:
    model = prepared(folder)
    with torch.no_grad():
        plain = model.prompt_context(batch()["caption"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = model.prompt_context(batch()["caption"])
    assert under.encoding.dtype == torch.float32
    assert torch.equal(under.encoding, plain.encoding) and torch.equal(under.gates, plain.gates)


# What the file keeps


@pytest.mark.slow
@pytest.mark.parametrize(("locking", "projection"), [("local", "full"), ("trained", "gated")])
def test_a_saved_concept_gives_the_keys_and_values_of_training(folder: Path, tmp_path: Path, locking: str,
                                                               projection: str) -> None:
    model = prepared(folder, locking=locking, super_category="teddy bear", projection=projection)
    perturb(model)
    learned = model.export_concept()
    assert learned.projection == projection
    assert (learned.placeholder, learned.super_category, learned.steps) == (WORD, "teddy bear", 0)
    assert set(learned.target_outputs_v) == set(model.text_layers)
    assert set(learned.target_outputs_k) == (set(model.text_layers) if locking == "trained" else set())
    for precision, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
        path = save_perfusion_concepts(tmp_path / "concept.safetensors", [learned], precision)
        other = unprepared(folder).eval()
        got = build_prompt_encoder(other, load_perfusion_concepts(path)).encode(batch()["caption"])
        with torch.no_grad():
            expected = model.prompt_context(batch()["caption"])
            assert torch.allclose(got.gates, expected.gates, atol=tolerance)
            for name, layer in model.text_layers.items():
                for ours, theirs in zip(got.keys_values(name, layer.to_k, layer.to_v),
                                        expected.keys_values(name, layer.to_k, layer.to_v), strict=True):
                    assert torch.allclose(ours, theirs, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.slow
def test_unused_layers_are_trained_but_not_sampled_with(folder: Path, tmp_path: Path) -> None:
    """The file has them, too: `all_layers` samples with all of them."""
    model = prepared(folder, used_layers="output_blocks")
    perturb(model)
    saved = save_perfusion_concepts(tmp_path / "concept.safetensors", [model.export_concept()], torch.float32)
    other, captions = unprepared(folder).eval(), batch()["caption"]
    used, every = (
        build_prompt_encoder(other, override_settings(read_concepts([saved]), all_layers=all_layers)).encode(captions)
        for all_layers in (False, True))
    with torch.no_grad():
        learning, concept = model.prompt_context(captions), model.concepts[0]
        for name, layer in model.text_layers.items():
            sampled, with_all, trained = (context.keys_values(name, layer.to_k, layer.to_v)[1]
                                          for context in (used, every, learning))
            torch.testing.assert_close(with_all, trained, rtol=1e-4, atol=1e-4)
            moved = layer.to_v.weight @ concept.super_input - model.export_concept().target_outputs_v[name]
            assert moved.norm() > 0.1
            expected = trained if name.startswith("output_blocks") else trained + learning.gates * moved
            torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


def test_other_layers_keep_a_share_of_what_they_learned(folder: Path) -> None:
    model = prepared(folder, used_layers="output_blocks", other_layers_share=0.25)
    perturb(model)
    (concept,), exported = model.concepts, model.export_concept()
    assert exported.used_layers == [] and exported.target_outputs_v.keys() == {*concept.layer_names}
    learned = dict(zip(concept.layer_names, concept.target_outputs_v, strict=True))
    for name, output in exported.target_outputs_v.items():
        plain = model.text_layers[name].to_v.weight @ concept.super_input
        share = 1.0 if name.startswith("output_blocks") else 0.25
        torch.testing.assert_close(output, plain + share * (learned[name][0] - plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("prefixes", "used"), [
    ("output_blocks.1", ["output_blocks.1.1.attn2"]), (["output_blocks.1."], ["output_blocks.1.1.attn2"]),
    ("output_blocks", ["output_blocks.1.1.attn2", "output_blocks.10.1.attn2", "output_blocks.11.1.attn2"]),
    (["output_blocks.11.1.attn2", "input_blocks"], ["input_blocks.1.1.attn2", "output_blocks.11.1.attn2"])])
def test_used_layers_match_whole_parts_of_names(prefixes: str | list[str], used: list[str]) -> None:
    names = [f"{block}.1.attn2" for block in ("input_blocks.1", "output_blocks.1", "output_blocks.10",
                                              "output_blocks.11")]
    assert find_layers("used_layers", as_list(prefixes), names) == used
    without = [name for name in names if name not in used]
    with pytest.raises(UserError, match="no layer that reads text is called"):
        find_layers("used_layers", as_list(prefixes), without)


@pytest.mark.slow
def test_a_concept_keeps_its_energy_under_the_covariance_of_training(
        folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(folder)
    perturb(model)
    inverse = invert_covariance(load_covariance(folder / "covariance.safetensors")).double()
    target = model.concepts[0].target_input.double()
    assert model.export_concept().target_energy == pytest.approx(float(target @ inverse @ target), rel=1e-4)
    saved = save_perfusion_concepts(tmp_path / "concept.safetensors", [model.export_concept()])
    (loaded,) = load_perfusion_concepts(saved)
    torch.testing.assert_close(loaded.dual.double(), inverse @ target, rtol=1e-5, atol=1e-4)
    # Another covariance changes only concepts of older files, which do not have their dual.
    elsewhere = unprepared(folder).eval()
    elsewhere._inverse_covariance = 2 * inverse.float()
    here = build_prompt_encoder(unprepared(folder).eval(), [loaded]).encode(batch()["caption"])
    there = build_prompt_encoder(elsewhere, [loaded]).encode(batch()["caption"])
    assert torch.equal(here.projected, there.projected) and torch.equal(here.gates, there.gates)
    assert not caplog.messages
    build_prompt_encoder(elsewhere, [replace(loaded, dual=None)]).encode(batch()["caption"])
    (line,) = caplog.messages
    assert f"concept {WORD} ({loaded.source}) was trained with another covariance" in line
    model.concepts[0].target_input.fill_(torch.nan)
    with pytest.raises(UserError, match="training diverged"):
        save_perfusion_concepts(tmp_path / "concept.safetensors", [model.export_concept()])


@pytest.mark.slow
def test_inference_bias_is_saved_and_does_not_change_training(folder: Path) -> None:
    usual, shut = prepared(folder, bias=0.6), prepared(folder, bias=0.6, inference_bias=0.95)
    assert (usual.export_concept().bias, shut.export_concept().bias) == (0.6, 0.95)
    gates = [model.prompt_context(batch()["caption"]).gates for model in (usual, shut)]
    assert torch.equal(*gates)


@pytest.mark.slow
def test_trained_keys_are_used(folder: Path) -> None:
    model = prepared(folder, locking="trained")
    name, layer = next(iter(model.text_layers.items()))

    def keys() -> Tensor:
        return model.prompt_context(batch()["caption"]).keys_values(name, layer.to_k, layer.to_v)[0].detach()

    before = keys()
    locked = prepared(folder).prompt_context(batch()["caption"]).keys_values(name, layer.to_k, layer.to_v)[0]
    assert torch.allclose(before, locked, atol=1e-4)
    with torch.no_grad():
        model.concepts[0].target_outputs_k[0].add_(1.0)
    gates = model.prompt_context(batch()["caption"]).gates
    assert torch.allclose(keys() - before, gates.detach().expand_as(before), atol=1e-4)


def generate(model: Perfusion, prompts: list[str], concepts: list[Concept]) -> list[np.ndarray]:
    requests = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
    settings = GenerationSettings(num_inference_steps=2, guidance_scale=6.0, sampler="ddim")
    images = PerfusionPipeline(model).generate(requests, settings, concepts, batch_size=len(prompts))
    return [np.asarray(image, dtype=float) for image in images]


@pytest.mark.slow
def test_generating_with_a_concept(folder: Path) -> None:
    model = prepared(folder)
    perturb(model)
    model.eval()
    prompts = [f"a {WORD} in the snow", "a dog"]
    with_concept = generate(model, prompts, [model.export_concept()])
    assert with_concept[0].shape == (16, 16, 3)
    assert np.abs(generate(model, prompts[:1], [model.export_concept()])[0] - with_concept[0]).max() <= 2
    assert np.abs(generate(model, ["a cat in the snow", "a dog"], [])[0] - with_concept[0]).max() > 2


def fit(folder: Path, root: Path, steps: int, resumed: Path | None = None, **settings: Any) -> Perfusion:
    return train_method(unprepared(folder), RepeatedBatch(folder, batch()), root, steps, resumed, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_resuming_equals_not_stopping(folder: Path, tmp_path: Path, micro_batches: int) -> None:
    settings = {"accumulate_grad_batches": micro_batches}
    straight = fit(folder, tmp_path / "a", 4, **settings)
    half = fit(folder, tmp_path / "b", 2, **settings)
    saved = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"concepts.0.{name}" for name in ("embedding", "super_input", "target_input", *(
        f"target_outputs_v.{n}" for n in range(LAYERS)))}
    resumed = fit(folder, tmp_path / "c", 4, tmp_path / "b" / "last.ckpt", **settings)
    for name, value in straight.concepts[0].state_dict().items():
        assert torch.equal(resumed.concepts[0].state_dict()[name], value), name
        if name != "super_input":
            assert not torch.equal(half.concepts[0].state_dict()[name], value), name


@pytest.mark.slow
def test_a_run_saves_its_concept(folder: Path, tmp_path: Path) -> None:
    model = fit(folder, tmp_path, 2)
    (concept,) = load_perfusion_concepts(tmp_path / "concept.safetensors")
    assert concept.steps == 2 and concept.placeholder == WORD and concept.base
    assert (concept.resolution, concept.prediction_type) == ("16x16", "epsilon") and concept.date == current_date()
    assert concept.word_parts == model.cond_stage_model.word_parts and concept.dual is not None
    assert read_thumbnail(prepared(folder, thumbnail=True).export_concept().thumbnail).size == (16, 16)
    assert not concept.thumbnail
    assert torch.equal(concept.embedding, model.export_concept().embedding.half().float())


@pytest.mark.slow
def test_training_does_not_change_the_base_model(folder: Path, tmp_path: Path) -> None:
    model = fit(folder, tmp_path, 2)
    before = torch.load(folder / "base.ckpt", weights_only=True)["state_dict"]
    after = {key: value for key, value in model.state_dict().items() if not key.startswith("concepts.")}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
