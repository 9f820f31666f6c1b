"""Every way in which weights of Stable Diffusion XL are stored, from one small model, and files that are not enough."""
from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sdxl
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoints.diffusers_names import clip_tensors, projected_clip_tensors, unet_tensors, vae_tensors
from ldm.checkpoints.early_checks import check_checkpoint
from ldm.checkpoints.load import load_weights
from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.inference.pipeline import PerfusionPipeline
from ldm.util import instantiate_from_config

pytestmark = pytest.mark.slow
Tensors = dict[str, Tensor]
UNET, STAGE = "model.diffusion_model.", "first_stage_model."
FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
LOGIT_SCALE = f"{SECOND}model.logit_scale"  # nothing reads it, and diffusers does not store it


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Return a small model's weights, another model to load them into, and a folder with the weights in parts."""
    folder = tmp_path_factory.mktemp("sdxl")
    model = sdxl.small_model(seed=1)
    state = {key: value.clone() for key, value in sdxl.public_state(model).items()}
    pipeline = sdxl.as_diffusers(model)
    pipeline.save_pretrained(folder / "pipeline")
    save_file(state, folder / "whole.safetensors")
    for name, start in (("unet", UNET), ("vae", STAGE), ("clip_l", f"{FIRST}transformer.")):
        save_file(without_prefix(state, start), folder / f"{name}.safetensors")
    save_file(load_file(folder / "pipeline" / "text_encoder_2" / "model.safetensors"), folder / "clip_g.safetensors")
    return SimpleNamespace(folder=folder, state=state, pipeline=pipeline, model=sdxl.small_model(seed=5))


def without_prefix(state: Tensors, start: str, new: str = "") -> Tensors:
    return {new + key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def with_prefix(state: Tensors, start: str) -> Tensors:
    return {key: value for key, value in state.items() if key.startswith(start)}


def check_loads(files: Any, path: Path | str, dtype: torch.dtype = torch.float32, **parts: Any) -> None:
    """Assert that a model gets exactly the stored weights from a file, rounded to its dtype."""
    sdxl.with_random_weights(files.model, seed=5)
    prefixes = {"vae": STAGE, "text_encoder": "cond_stage_model."}
    load_weights(files.model, path, files.model.schedule_names,
                 parts={prefixes[name]: value for name, value in parts.items()})
    loaded = sdxl.public_state(files.model)
    assert loaded.keys() == files.state.keys()
    for key, value in files.state.items():
        assert key == LOGIT_SCALE or torch.equal(loaded[key], value.to(dtype).float()), key


def warnings_of_ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records
            if record.levelno >= logging.WARNING and record.name.startswith("ldm.")]


# One file


def with_buffers(state: Tensors) -> Tensors:
    """Add what files of several programs also hold."""
    buffers = {f"{FIRST}transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
               f"{FIRST}logit_scale": torch.tensor(4.6), f"{SECOND}model.attn_mask": torch.zeros(24, 24),
               f"{FIRST}transformer.text_projection.weight": torch.eye(16),
               "denoiser.sigmas": torch.ones(1000), "alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000),
               "model_sampling.sigmas": torch.ones(1000), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    return {**state, **buffers}


def without_logit_scale(state: Tensors) -> Tensors:
    return {key: value for key, value in state.items() if key != LOGIT_SCALE}


def with_averages(state: Tensors) -> Tensors:
    """Store the network's weights as moving averages beside others, under names as `LitEma` forms them."""
    network = with_prefix(state, UNET)
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): value for key, value in network.items()}
    others = {key: value + 1 for key, value in network.items()}
    return {**state, **others, **averages, "model_ema.decay": torch.ones(())}


def of_conversion_script(state: Tensors) -> Tensors:
    """Name the projection as files of diffusers' conversion script do, in the orientation of `transformers`."""
    projection = f"{SECOND}model.text_projection"
    others = {key: value for key, value in state.items() if key != projection}
    return {**others, f"{projection}.weight": state[projection].T.contiguous()}


def with_names_of_transformers(state: Tensors) -> Tensors:
    """Keep the names of `transformers` in the second tower, too, in a file without `text_model.` in the first."""
    theirs = sdxl.second_tower(state).state_dict()
    others = {key.replace("text_model.", ""): value for key, value in state.items() if not key.startswith(SECOND)}
    return {**others, **{f"{SECOND}transformer.{key}": value.to(torch.float16) for key, value in theirs.items()}}


@pytest.mark.parametrize(("store", "dtype"), [
    (dict, torch.float32), (dict, torch.float16), (dict, torch.bfloat16), (dict, torch.float8_e4m3fn),
    (with_buffers, torch.float32), (without_logit_scale, torch.float16), (with_averages, torch.float32),
    (of_conversion_script, torch.float32), (with_names_of_transformers, torch.float16)])
def test_one_file(files: Any, tmp_path: Path, caplog: Any, store: Callable[[Tensors], Tensors], dtype: torch.dtype
                  ) -> None:
    stored = store({key: value.to(dtype) for key, value in files.state.items()})
    save_file(stored, tmp_path / "x.safetensors")
    check_loads(files, tmp_path / "x.safetensors", dtype)
    marked = store is with_buffers  # the model predicts eps, and the marks say v
    assert bool(warnings_of_ours(caplog)) == marked


def test_a_ckpt_with_the_state_of_a_run(files: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": files.state, "global_step": 5}, tmp_path / "x.ckpt")
    check_loads(files, tmp_path / "x.ckpt")


# Parts in several files


@pytest.mark.parametrize("prefix", [UNET, "diffusion_model.", ""])
def test_a_network_alone_with_parts_from_other_files(files: Any, tmp_path: Path, prefix: str) -> None:
    save_file(without_prefix(files.state, UNET, prefix), tmp_path / "x.safetensors")
    folder = files.folder
    two = [folder / "clip_g.safetensors", folder / "clip_l.safetensors"]
    encoders: list[Any] = [two] if prefix else [two, ",".join(map(str, two)), folder / "pipeline",
                                                folder / "whole.safetensors"]
    for encoder in encoders:
        check_loads(files, tmp_path / "x.safetensors", vae=folder / "vae.safetensors", text_encoder=encoder)


def test_one_encoder_replaces_one(files: Any, tmp_path: Path) -> None:
    broken = {key: torch.zeros_like(value) if key.startswith(SECOND) else value for key, value in files.state.items()}
    save_file(broken, tmp_path / "x.safetensors")
    for source in ("clip_g.safetensors", "pipeline/text_encoder_2"):
        check_loads(files, tmp_path / "x.safetensors", text_encoder=files.folder / source)


def test_a_first_stage_of_diffusers_replaces_the_files_own(files: Any, tmp_path: Path) -> None:
    broken = {key: torch.zeros_like(value) if key.startswith(STAGE) else value for key, value in files.state.items()}
    save_file(broken, tmp_path / "x.safetensors")
    check_loads(files, tmp_path / "x.safetensors", vae=files.folder / "pipeline" / "vae")


# Folders of diffusers


@pytest.mark.parametrize(("options", "dtype"), [
    ({}, torch.float32), ({"variant": "fp16"}, torch.float16), ({"max_shard_size": "4MB"}, torch.float32)], ids=str)
def test_folders_of_diffusers(files: Any, tmp_path: Path, caplog: Any, options: dict[str, Any], dtype: torch.dtype
                              ) -> None:
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        copy.deepcopy(getattr(files.pipeline, name)).to(dtype).save_pretrained(tmp_path / name, **options)
    assert ("max_shard_size" in options) == bool(list(tmp_path.glob("unet/*-of-*")))
    check_loads(files, tmp_path, dtype)
    assert not warnings_of_ours(caplog)


def test_diffusers_reads_our_names(files: Any) -> None:
    """diffusers' own loader finds the networks in our file, and its names lead back to ours."""
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(files.folder / "whole.safetensors"), config=str(files.folder / "pipeline"), local_files_only=True)
    back = {**with_start(unet_tensors(theirs.unet.state_dict()), UNET),
            **with_start(vae_tensors(theirs.vae.state_dict()), STAGE),
            **with_start(projected_clip_tensors(theirs.text_encoder_2.state_dict()), SECOND)}
    expected = {key: value for key, value in files.state.items() if not key.startswith(FIRST) and key != LOGIT_SCALE}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())


def with_start(tensors: Tensors, start: str) -> Tensors:
    return {start + key: value for key, value in tensors.items()}


def test_every_key_of_the_real_size() -> None:
    """The names of diffusers' own networks, of the real size and without weights, become exactly ours."""
    with torch.device("meta"):
        config = OmegaConf.load(PROJECT_ROOT / "configs" / "stable-diffusion" / "sd_xl_base.yaml")
        ours = sdxl.public_state(instantiate_from_config(config.model))
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
        vae = AutoencoderKL(
            latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        clip_l = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
        clip_g = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280))
        theirs = {**with_start(unet_tensors(unet.state_dict()), UNET),
                  **with_start(vae_tensors(vae.state_dict()), STAGE),
                  **with_start(clip_tensors(clip_l.state_dict()), FIRST),
                  **with_start(projected_clip_tensors(clip_g.state_dict()), SECOND)}
    expected = {key: value.shape for key, value in ours.items() if key != LOGIT_SCALE}
    assert {key: value.shape for key, value in theirs.items()} == expected


def test_images_do_not_depend_on_the_layout(files: Any) -> None:
    images = []
    for path in ("whole.safetensors", "pipeline"):
        pipeline = PerfusionPipeline.from_config(sdxl.small_config(), files.folder / path, "cpu")
        images.append(pipeline("a photo of a cat", seed=1, num_inference_steps=2, height=16, width=16).images[0])
    assert images[0].tobytes() == images[1].tobytes()


# Files that are not enough


@pytest.mark.parametrize(("absent", "message"), [
    ((FIRST,), r"holds no first text encoder \(CLIP ViT-L\); .*--text_encoder clip_l.safetensors"),
    ((SECOND,), r"holds no second text encoder \(OpenCLIP ViT-bigG\); .*--text_encoder clip_g.safetensors"),
    ((FIRST, SECOND), r"no first text encoder .* and no second .*--text_encoder clip_l.safetensors,clip_g.safetensors"),
    ((STAGE, FIRST, SECOND), "the U-Net alone, no first stage .*--vae FILE and --text_encoder")])
def test_missing_parts_are_named(files: Any, tmp_path: Path, absent: tuple[str, ...], message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({key: value for key, value in files.state.items() if not key.startswith(absent)}, path)
    for refuse in (lambda: check_checkpoint("--ckpt", path, sdxl.small_config()),
                   lambda: load_weights(files.model, path, files.model.schedule_names)):
        with pytest.raises(UserError, match=message) as refused:
            refuse()
        assert "\n" not in str(refused.value)


def test_a_folder_without_its_second_encoder(files: Any, tmp_path: Path) -> None:
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).symlink_to(files.folder / "pipeline" / name)
    with pytest.raises(UserError, match="holds no second text encoder"):
        load_weights(files.model, tmp_path, files.model.schedule_names)


def test_encoders_of_other_models_are_refused(files: Any, tmp_path: Path) -> None:
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(9, 10)}, tmp_path / "h.safetensors")
    for source, message in ((tmp_path / "h.safetensors", "of width 10, and this model's have 16 and 24"),
                            (files.folder / "vae.safetensors", "holds no text encoder")):
        with pytest.raises(UserError, match=f"--text_encoder .*{message}"):
            check_loads(files, files.folder / "whole.safetensors", text_encoder=source)


def test_a_diffusion_transformer_is_named(tmp_path: Path) -> None:
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is a diffusion transformer"):
        read_state_dict(tmp_path)
