"""LatentDiffusion with a GeneralConditioner: one encoder under two names, the family's samplers, and training."""
from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import sdxl
import torch

from ldm.common.errors import UserError
from ldm.inference import GenerationRequest, GenerationSettings, PerfusionPipeline
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.wrapper import as_context
from ldm.modules.context import PromptContext

PROMPT = "a photo of a teddy bear"


@pytest.fixture(scope="module")
def model() -> Any:
    return sdxl.small_model()


def noise(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.slow
def test_the_encoder_has_two_names_and_is_one_module(model: Any) -> None:
    copied = copy.deepcopy(model)
    for one in (model, copied):
        assert one.cond_stage_model is one.conditioner and "cond_stage_model" not in dict(one.named_modules())
    assert copied.conditioner is not model.conditioner
    state = model.state_dict()
    assert not any(key.startswith("cond_stage_model") for key in state)
    other = sdxl.small_model(seed=5)
    assert not torch.equal(*(one.get_learned_conditioning([PROMPT])["c_adm"] for one in (model, other)))
    other.load_state_dict(state)
    assert torch.equal(*(one.get_learned_conditioning([PROMPT])["c_adm"] for one in (model, other)))
    assert model.conditioner.train().embedders[0].training is False and model.trained_parameters()


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_the_familys_samplers_take_the_models_conditions(model: Any, kind: type) -> None:
    """With DDIM the result is that of the pipeline, whose contexts hold the vector."""
    condition = model.get_learned_conditioning([PROMPT, "a cat"])
    unconditional = model.get_unconditional_conditioning(2)
    assert not unconditional["c_crossattn"][0].any()
    latents, _ = kind(model).sample(
        S=3, batch_size=2, shape=(4, 8, 8), conditioning=condition, x_T=noise(3, 4), verbose=False,
        unconditional_guidance_scale=4.0, unconditional_conditioning=unconditional)
    assert latents.shape == (2, 4, 8, 8) and latents.isfinite().all()
    if kind is DDIMSampler:
        pipeline = PerfusionPipeline(model, sdxl.small_config())
        requests = [GenerationRequest(PROMPT, 3), GenerationRequest("a cat", 4)]
        settings = pipeline.complete(GenerationSettings(3, 4.0, "ddim"))
        encoded = pipeline.encode([PROMPT, "a cat"], [])
        assert torch.allclose(latents, pipeline.latents(encoded, requests, settings), atol=1e-4)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        own = model.sample_latents(condition, 2, 3, 4.0, unconditional, generators=generators)
        assert torch.allclose(latents, own, atol=1e-4)


def test_negative_prompts_that_are_not_empty_are_encoded(model: Any) -> None:
    negative = model.get_unconditional_conditioning(2, ["blurry"])
    expected = model.get_learned_conditioning(["blurry"] * 2)
    assert torch.allclose(negative["c_crossattn"][0], expected["c_crossattn"][0], atol=1e-4)
    assert torch.allclose(negative["c_adm"], expected["c_adm"], atol=1e-4)
    empty = model.get_unconditional_conditioning(2)["c_adm"]  # zeros, and the same sizes
    assert not empty[:, :sdxl.POOLED].any() and torch.equal(empty[:, sdxl.POOLED:], expected["c_adm"][:, sdxl.POOLED:])


def test_sizes_come_from_the_batch_or_from_the_model(model: Any) -> None:
    own = {"original_size_as_tuple": (16, 16), "crop_coords_top_left": (0, 0), "target_size_as_tuple": (16, 16)}
    assert model.pixel_size == (16, 16)
    default = model.get_learned_conditioning([PROMPT])["c_adm"]
    assert torch.equal(model.get_learned_conditioning({"txt": [PROMPT], **own})["c_adm"], default)
    cropped = model.get_learned_conditioning({"txt": [PROMPT], "crop_coords_top_left": [(4, 0)]})["c_adm"]
    changed = (cropped != default)[0].nonzero().flatten().tolist()
    assert min(changed) >= sdxl.POOLED + 2 * sdxl.FEATURES and max(changed) < sdxl.POOLED + 3 * sdxl.FEATURES
    with pytest.raises(UserError, match="target_size_as_tuple: give a pair of numbers, or one for each"):
        model.get_learned_conditioning({"txt": [PROMPT], "target_size_as_tuple": torch.zeros(3, 2)})


@pytest.mark.slow
def test_a_training_step_and_logged_images_read_sizes(model: Any) -> None:
    model = copy.deepcopy(model)
    seen = []
    model.model.register_forward_pre_hook(lambda *given: seen.append(given[2]["c_adm"]), with_kwargs=True)
    batch = {"jpg": torch.rand(2, 3, 16, 16), "txt": [PROMPT, "a cat"],
             "original_size_as_tuple": torch.tensor([[64, 48], [32, 32]])}
    loss, _ = model.shared_step(batch)
    loss.backward()
    assert model.model.diffusion_model.label_emb[0][0].weight.grad.abs().max() > 0
    expected = model.get_learned_conditioning({key: batch[key] for key in ("txt", "original_size_as_tuple")})["c_adm"]
    assert torch.equal(seen[0], expected)
    images = model.log_images(batch, N=1, ddim_steps=2, unconditional_guidance_scale=3.0, plot_progressive_rows=False,
                              unconditional_guidance_label=[""], inpaint=False, plot_diffusion_rows=False)
    assert images["samples_cfg_scale_3.00"].shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_averages_hold_no_second_encoder() -> None:
    model = sdxl.small_model(use_ema=True)
    assert not any("conditioner" in key for key in model.model_ema.state_dict())
    with model.ema_scope():
        assert model.get_learned_conditioning([PROMPT])["c_adm"].isfinite().all()


def test_a_vector_is_required(model: Any) -> None:
    condition = model.get_learned_conditioning([PROMPT])
    with pytest.raises(UserError, match="crossattn-adm: needs a condition c_adm"):
        model.apply_model(noise(1), torch.tensor([5]), condition["c_crossattn"][0])
    context = as_context(condition)
    assert isinstance(context, PromptContext) and torch.equal(context.vector, condition["c_adm"])
    assert as_context(condition["c_adm"]) is condition["c_adm"]


# The first stage, which overflows in float16


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_first_stage_that_overflows_runs_in_float32(model: Any, autocast: bool, caplog: pytest.LogCaptureFixture
                                                      ) -> None:
    """Weights in float16, or autocast to it; told once."""
    model = copy.deepcopy(model)
    model.disable_first_stage_autocast = not autocast
    stage, latents, images = model.first_stage_model, noise(1), torch.rand(1, 3, 16, 16)
    for convolution in (stage.decoder.conv_in, stage.encoder.conv_in):
        convolution.weight.data *= 1e7  # finite in float16 as a weight, not as a result
    expected = model.decode_first_stage(latents), model.encode_first_stage(images).mean
    if not autocast:
        for convolution in (stage.decoder.conv_in, stage.encoder.conv_in):
            convolution.weight.data.clamp_(-6e4, 6e4)
        expected = model.decode_first_stage(latents), model.encode_first_stage(images).mean
        stage.half()
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.float16, enabled=autocast):
        actual = [(model.decode_first_stage(latents), model.encode_first_stage(images).mean) for _ in range(2)]
    for decoded, encoded in actual:
        assert torch.allclose(decoded, expected[0], atol=0.05) and torch.allclose(encoded, expected[1], atol=0.05)
    assert [record.message for record in caplog.records if "overflows in float16" in record.message] == [
        caplog.records[0].message] and "\n" not in caplog.records[0].message
    assert next(stage.parameters()).dtype == torch.float32


def test_the_first_stage_stays_out_of_autocast(model: Any) -> None:
    latents, images = noise(1), torch.rand(1, 3, 16, 16)
    expected = model.decode_first_stage(latents), model.encode_first_stage(images).mean
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode_first_stage(latents.bfloat16()).dtype == torch.float32
        assert torch.equal(model.decode_first_stage(latents), expected[0])
        assert torch.equal(model.encode_first_stage(images).mean, expected[1])


@pytest.mark.slow
def test_a_first_stage_made_for_float16_stays_there(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(model)
    expected = model.decode_first_stage(noise(1))
    model.first_stage_model.half()
    decoded = model.decode_first_stage(noise(1))
    assert decoded.dtype == torch.float16 and torch.allclose(decoded.float(), expected, atol=0.05)
    assert model.decode_first_stage(torch.full((1, 4, 8, 8), torch.nan)).isnan().all()  # not the first stage's fault
    assert not caplog.records
