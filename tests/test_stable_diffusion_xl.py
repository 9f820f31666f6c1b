"""Stable Diffusion XL: its layout, its parts and whole sampling runs, against diffusers and transformers."""
from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sdxl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from helpers.stand_ins import model_section
from test_stable_diffusion_v1 import VAE_CONFIG, shapes, shapes_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.inference import GenerationRequest, GenerationSettings, PerfusionPipeline
from ldm.modules.context import PromptContext
from ldm.util import count_params, instantiate_from_config

PROMPTS = ["a photo of a teddy bear", "",
           "two owls, oil painting on a very long and very wide old canvas of a master and many more of his masters"]
SHORT = ["a photo of a teddy bear", "two owls, oil painting"]
SIZES = torch.tensor([[16.0, 24, 0, 3, 16, 16], [640, 480, 1, 2, 8, 8], [16, 16, 0, 0, 16, 16]])
# The public pipeline's configs: stabilityai/stable-diffusion-xl-base-1.0.
UNET_CONFIG = {
    **sdxl.UNET_CONFIG, "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
TEXT_L = {**TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}
TEXT_G = {**TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280}


@cache
def public_model() -> Any:
    """Return the model of the public config, with weights on the meta device."""
    with torch.device("meta"):
        return instantiate_from_config(model_section("configs/stable-diffusion/sd_xl_base.yaml"))


@pytest.fixture(scope="module")
def model() -> Any:
    return sdxl.small_model()


@pytest.fixture(scope="module")
def theirs(model: Any) -> StableDiffusionXLPipeline:
    """Return diffusers' pipeline with the weights of `model` and the schedule of our DDIM."""
    pipe = sdxl.as_diffusers(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                   clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return pipe


@pytest.fixture(scope="module")
def pipeline(model: Any) -> PerfusionPipeline:
    return PerfusionPipeline(model, sdxl.small_config())


# The layout of public files


@pytest.mark.slow
def test_every_key_and_shape_of_the_public_file() -> None:
    """Diffusers' converters, given ours, name exactly the weights of its own models; counts are of the public file."""
    state = public_model().state_dict()
    parts = {"model.diffusion_model.": 1680, "conditioner.embedders.0.transformer.text_model.": 196,
             "conditioner.embedders.1.model.": 390, "first_stage_model.": 248}
    for prefix, count in parts.items():  # public files of the first tower also hold `embeddings.position_ids`
        assert sum(key.startswith(prefix) for key in state) == count, prefix
    assert {key.partition(".")[0] for key in state if "." in key} == {"model", "conditioner", "first_stage_model"}
    assert count_params(public_model().model.diffusion_model) == 2_567_463_684

    assert shapes(convert_ldm_unet_checkpoint(state, UNET_CONFIG)) == shapes_of(UNet2DConditionModel, **UNET_CONFIG)
    assert shapes(convert_ldm_vae_checkpoint(state, VAE_CONFIG)) == shapes_of(AutoencoderKL, **VAE_CONFIG)
    assert bare(shapes(convert_ldm_clip_checkpoint(state))) == bare(shapes_of(CLIPTextModel, CLIPTextConfig(**TEXT_L)))
    second = CLIPTextConfig(**TEXT_G)
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=second), state, prefix=sdxl.SECOND)
    assert bare(shapes(converted)) == bare(shapes_of(CLIPTextModelWithProjection, second))


def bare(weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return shapes by names as every version of transformers has them."""
    return {key.removeprefix("text_model."): shape for key, shape in weights.items() if "position_ids" not in key}


# The parts


def test_both_towers_equal_transformers(model: Any, theirs: StableDiffusionXLPipeline) -> None:
    """The prompts are short, empty and too long; diffusers pads and truncates for each tower by its own tokenizer."""
    with torch.no_grad():
        ours = model.get_learned_conditioning(PROMPTS)
        encoding, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert encoding.shape == (3, sdxl.LENGTH, sdxl.WIDTH_L + sdxl.WIDTH_G) and encoding.std() > 0.5 < pooled.std()
    assert torch.allclose(ours["c_crossattn"][0], encoding, atol=1e-4)
    assert torch.allclose(ours["c_adm"][:, :sdxl.POOLED], pooled, atol=1e-4)


def test_the_vector_and_the_unet_equal_diffusers(model: Any, theirs: StableDiffusionXLPipeline) -> None:
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    batch = {"txt": PROMPTS, "original_size_as_tuple": SIZES[:, :2], "crop_coords_top_left": SIZES[:, 2:4],
             "target_size_as_tuple": SIZES[:, 4:]}
    with torch.no_grad():
        ours = model.get_learned_conditioning(batch)
        encoding, pooled = ours["c_crossattn"][0], ours["c_adm"][:, :sdxl.POOLED]
        added = {"text_embeds": pooled, "time_ids": SIZES}
        expected = theirs.unet(x, t, encoding, added_cond_kwargs=added).sample
        assert expected.std() > 0.1 and torch.allclose(model.apply_model(x, t, ours), expected, atol=1e-4)
        others = theirs.unet(x, t, encoding, added_cond_kwargs={**added, "time_ids": SIZES.flip(0)}).sample
        assert (others - expected).abs().max() > 0.01  # the sizes matter

        # The same as a context with a vector
        context = model.cond_stage_model.add_sizes(PromptContext.plain(encoding, pooled=pooled), SIZES)
        assert torch.equal(context.vector, ours["c_adm"])
        assert torch.allclose(model.apply_model(x, t, context), expected, atol=1e-4)


def test_the_first_stage_equals_diffusers(model: Any, theirs: StableDiffusionXLPipeline) -> None:
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        mode = theirs.vae.encode(images).latent_dist.mode() * theirs.vae.config.scaling_factor
        decoded = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    assert torch.allclose(model.encode_images(images, sample=False), mode, atol=1e-4)
    assert torch.allclose(model.decode_first_stage(latents), decoded, atol=1e-4)


# Whole runs


@pytest.mark.parametrize(("scale", "negative", "height", "sizes"), [
    (5.0, "", None, {}),
    pytest.param(5.0, "blurry", 24, {}, marks=pytest.mark.slow),
    pytest.param(1.0, "", None, {}, marks=pytest.mark.slow),
    pytest.param(3.0, "", None, {"original_size": (64, 48), "crop": (2, 3), "target_size": (16, 32)},
                 marks=pytest.mark.slow),
])
def test_a_run_equals_diffusers(pipeline: PerfusionPipeline, theirs: StableDiffusionXLPipeline, scale: float,
                                negative: str, height: int | None, sizes: dict[str, tuple[int, int]]) -> None:
    settings = pipeline.complete(GenerationSettings(4, scale, "ddim", height=height, **sizes))
    requests = [GenerationRequest(prompt, seed, negative) for seed, prompt in enumerate(SHORT)]
    prompts = [text for request in requests for text in (request.prompt, negative)]
    ours = pipeline.latents(pipeline.encode(prompts, []), requests, settings)

    height = height or sdxl.SIDE
    noise = torch.stack([torch.randn(4, height // 2, 8, generator=torch.Generator().manual_seed(request.seed))
                         for request in requests])
    options = {name.replace("crop", "crops_coords_top_left"): value for name, value in sizes.items()}
    expected = theirs([request.prompt for request in requests], negative_prompt=[negative] * 2 if negative else None,
                      num_inference_steps=4, guidance_scale=scale, latents=noise, height=height, width=sdxl.SIDE,
                      output_type="latent", **options).images
    assert expected.std() > 0.1 and torch.allclose(ours, expected, atol=1e-3)
    images = np.stack([np.asarray(image) for image in pipeline.generate(requests, settings)])
    decoded = theirs.image_processor.postprocess(theirs.vae.decode(expected / 0.13025).sample.detach(), "np")
    assert np.abs(images / 255.0 - decoded).max() < 1e-2  # 8 bits
