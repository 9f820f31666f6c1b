"""Stable Diffusion 1.x: public checkpoints fit, with diffusers' converters as the oracle of their layout."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from helpers import tiny_models
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.load import load_model
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.data.concept_photos import ConceptPhotos
from ldm.modules.attention import name_text_layers
from ldm.sampling.schedule import diffusion_buffers
from ldm.util import check_param_names, count_params, instantiate_from_config

PROJECT = Path(__file__).resolve().parents[1]
UNET_CONFIG = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE_CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEXT_CONFIG = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}


def config(name: str) -> Any:
    return OmegaConf.load(PROJECT / "configs" / name)


@cache
def public_model() -> Any:
    """Return the model of the public config, with weights on the meta device."""
    with torch.device("meta"):
        section = config("stable-diffusion/v1-inference.yaml").model
        return instantiate_from_config({"target": section.target, "params": section.params})


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def shapes_of(module: type[nn.Module], *args: Any, **params: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes(module(*args, **params).state_dict())


def config_of_unet(**shape: Any) -> dict[str, Any]:
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**shape).config)


@pytest.mark.slow
def test_the_unet_is_what_converters_expect() -> None:
    ours = convert_ldm_unet_checkpoint(public_model().state_dict(), config_of_unet(**UNET_CONFIG))
    assert shapes(ours) == shapes_of(UNet2DConditionModel, **UNET_CONFIG)


def test_the_first_stage_is_what_converters_expect() -> None:
    ours = convert_ldm_vae_checkpoint(public_model().state_dict(), VAE_CONFIG)
    assert shapes(ours) == shapes_of(AutoencoderKL, **VAE_CONFIG)


def test_the_text_encoder_is_what_converters_expect() -> None:
    ours = shapes(convert_ldm_clip_checkpoint(public_model().state_dict()))
    assert all(key.startswith("text_model.") for key in ours)  # the public spelling, whichever transformers has
    theirs = shapes_of(CLIPTextModel, CLIPTextConfig(**TEXT_CONFIG))
    theirs.pop("text_model.embeddings.position_ids", None)

    def short(key: str) -> str:
        return key.removeprefix("text_model.")

    assert {short(key): shape for key, shape in ours.items()} == {short(key): shape for key, shape in theirs.items()}


def test_every_key_of_the_file() -> None:
    state = public_model().state_dict()
    assert len(state) == 686 + 248 + 196 + 12  # U-Net, first stage, text encoder (less position_ids), schedule
    assert {key for key in state if "." not in key} == set(diffusion_buffers("linear", 1000))
    assert not any(key.startswith(("model_ema.", "first_stage_model.loss.")) for key in state)
    known = {
        "betas": (1000,), "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias": (768,),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight": (1280, 768),
    }
    assert {key: tuple(state[key].shape) for key in known} == known


def test_parameter_counts() -> None:
    model = public_model()
    parts = (model.model.diffusion_model, model.first_stage_model, model.cond_stage_model)
    assert list(map(count_params, parts)) == [859_520_964, 83_653_863, 123_060_480]


def test_the_diffusion_process_of_the_config() -> None:
    model = public_model()
    assert model.num_timesteps == 1000 and model.parameterization == "eps" and model.scale_factor == 0.18215
    assert model.latent_shape == (4, 64, 64)
    assert float(model.betas[0]) == pytest.approx(0.00085) and float(model.betas[-1]) == pytest.approx(0.012)
    assert float(model.alphas_cumprod[-1]) == pytest.approx(0.0047, abs=5e-5)  # the published value
    assert model.betas.device.type == "cpu"  # the schedule is computed even if weights are on the meta device


@pytest.mark.slow
def test_averages_have_the_public_names() -> None:
    section = config("stable-diffusion/v1-inference.yaml").model
    with torch.device("meta"):
        keys = instantiate_from_config({"target": section.target, "params": section.params}, use_ema=True).state_dict()
    averages = {key for key in keys if key.startswith("model_ema.")}
    assert len(averages) == 686 + 2
    assert {"model_ema.decay", "model_ema.num_updates", "model_ema.diffusion_modelinput_blocks00weight",
            "model_ema.diffusion_modelmiddle_block1transformer_blocks0attn2to_kweight",
            "model_ema.diffusion_modelout2bias"} <= averages


def test_only_the_schedule_takes_memory() -> None:
    in_memory = {key for key, value in public_model().state_dict().items() if not value.is_meta}
    assert in_memory == set(diffusion_buffers("linear", 1000))


def test_a_concept_fits_in_35_kilobytes(tmp_path: Path) -> None:
    layers = name_text_layers(public_model().model.diffusion_model)
    widths = {name: layer.to_v.out_features for name, layer in layers.items()}
    assert len(widths) == 16 and sum(widths.values()) == 12_480
    generator = torch.Generator().manual_seed(0)
    concept = Concept(
        placeholder="<my-teddy>", super_category="teddy bear", base="0" * 64, steps=400,
        embedding=torch.randn(1, 768, generator=generator), target_input=torch.randn(768, generator=generator),
        super_input=torch.randn(768, generator=generator),
        target_outputs_v={name: torch.randn(width, generator=generator) for name, width in widths.items()})
    path = save_perfusion_concepts(tmp_path / "concept.safetensors", [concept])
    assert 2 * (12_480 + 3 * 768) < path.stat().st_size < 35_000
    assert sum(tensor.numel() for _, tensor in load_perfusion_concepts(path)[0].tensors()) == 12_480 + 3 * 768


@pytest.mark.slow
def test_the_concept_config_describes_the_same_base_model() -> None:
    names = ("stable-diffusion/v1-inference.yaml", "perfusion-sd-v1.yaml")
    public, trained = (config(name).model.params for name in names)
    for part in ("unet_config", "linear_start", "linear_end", "timesteps", "scale_factor", "image_size", "channels",
                 "conditioning_key"):
        assert public[part] == trained[part], part
    assert public.first_stage_config.params.ddconfig == trained.first_stage_config.params.ddconfig
    with torch.device("meta"):
        model = instantiate_from_config({"target": config("perfusion-sd-v1.yaml").model.target, "params": trained})
    assert shapes(model.state_dict()) == shapes(public_model().state_dict())
    assert count_params(model, trainable_only=True) == 0 and len(model.text_layers) == 16


def test_the_concept_config_has_the_papers_values() -> None:
    whole = config("perfusion-sd-v1.yaml")
    params, data, trainer = whole.model.params, whole.data.params, whole.lightning.trainer
    assert (params.bias, params.temperature, params.embedding_lr, params.value_lr) == (0.75, 0.1, 0.006, 0.03)
    assert data.batch_size * trainer.accumulate_grad_batches == 16 and trainer.max_steps == 400
    check_param_names("data", ConceptPhotos, data.train.params)
    for callback in whole.lightning.callbacks.values():
        instantiate_from_config(callback)


def tiny_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the content of a small public file: half precision, averages, and a buffer of older transformers."""
    model = tiny_models.build_model(folder, use_ema=False)
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    averages = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": 0.9 * value
                for key, value in state.items() if key.startswith("model.")}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return {**state, **averages, "model_ema.decay": torch.tensor(0.9999), positions: torch.arange(16)[None]}


@pytest.mark.slow
def test_both_checkpoint_formats_load_and_generate_the_same_images(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                                   ) -> None:
    state = tiny_checkpoint(tmp_path)
    torch.save({"state_dict": state, "global_step": 840000}, tmp_path / "tiny.ckpt")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "tiny.safetensors")
    config_of_model = {"model": tiny_models.latent_diffusion_config(tmp_path, use_ema=False)}
    generated = []
    for name in ("tiny.ckpt", "tiny.safetensors"):
        model = load_model(config_of_model, tmp_path / name)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        cond, empty = model.get_learned_conditioning(["a cat on the beach"]), model.get_learned_conditioning([""])
        generated.append(model.sample_images(cond, 1, 3, 4.0, empty, generators=[torch.Generator().manual_seed(1)]))
    assert torch.equal(*generated) and generated[0].std() > 0.05
    weight = model.state_dict()["model.diffusion_model.out.2.weight"]
    assert torch.equal(weight, state["model_ema.diffusion_modelout2weight"].float())
    assert float(model.alphas_cumprod[0]) == pytest.approx(1 - 0.00085, abs=1e-7)  # not the file's rounded schedule
    assert not caplog.records
