"""Commands say what a file is before torch is imported, and take missing parts of a model from other files."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_models
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.early_checks import check_checkpoint, check_concept, identify_file
from ldm.checkpoints.load import load_model
from ldm.checkpoints.other_kinds import Role
from ldm.checkpoints.prediction import stated_prediction
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.storage import load_concepts

MINI = PROJECT_ROOT / "models" / "mini" / "model.safetensors"
Tensors = dict[str, Tensor]


def zeros(*keys: str, shape: tuple[int, ...] = (4, 4)) -> Tensors:
    return {key: torch.zeros(shape) for key in keys}


def unet(width: int, channels: int = 320, prefix: str = "model.diffusion_model.") -> Tensors:
    return {f"{prefix}input_blocks.0.0.weight": torch.zeros(channels, 4, 3, 3),
            f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(channels, width)}


def xl_with_channels(channels: int) -> Tensors:
    return {**unet(2048), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3)}


def xl_block(block: int, index: int) -> Tensors:
    return zeros(f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.{index}.attn2.to_k.weight")


KINDS: dict[str, tuple[Tensors, str, Role]] = {
    "SD 1": (unet(768), "Stable Diffusion 1.x", Role.BASE),
    "SD 2": (unet(1024), "Stable Diffusion 2.x", Role.BASE),
    "SDXL": ({**unet(2048), **zeros("conditioner.embedders.0.x")}, "Stable Diffusion XL", Role.BASE),
    "U-Net of SDXL": (unet(2048, prefix=""), "Stable Diffusion XL", Role.BASE),
    "inpainting SDXL": (xl_with_channels(9), "XL for inpainting", Role.OTHER),
    "InstructPix2Pix XL": (xl_with_channels(8), "instructions or other images", Role.OTHER),
    "SSD-1B": ({**unet(2048), **xl_block(7, 3)}, "smaller version of Stable Diffusion XL", Role.OTHER),
    "Playground 2.5": ({**unet(2048), **zeros("edm_mean", "edm_std")}, "noise of EDM", Role.OTHER),
    "CosXL": ({**unet(2048), **zeros("edm_vpred.sigma_max")}, "noise of EDM", Role.OTHER),
    "both encoders of SDXL": (zeros("conditioner.embedders.0.transformer.text_model.x", "conditioner.embedders.1.x"),
                              "the text encoders of Stable Diffusion XL alone", Role.PART),
    "clip_g": (zeros("text_model.encoder.layers.0.mlp.fc1.weight", "text_projection.weight"), "text encoder alone",
               Role.PART),
    "SDXL of diffusers": ({"conv_in.weight": torch.zeros(320, 4, 3, 3),
                           "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, 2048)},
                          "Stable Diffusion XL", Role.BASE),
    "refiner": ({**unet(1280, 384), **zeros("conditioner.embedders.0.x")}, "refiner", Role.OTHER),
    "SD 3": (zeros("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3", Role.OTHER),
    "Flux": (zeros("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.x"), "Flux", Role.OTHER),
    "VAE": ({"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
             "encoder.down.0.x": torch.zeros(1), "encoder.down.1.x": torch.zeros(1)}, "KL autoencoder", Role.PART),
    "text encoder": (zeros("text_model.encoder.layers.0.mlp.fc1.weight"), "text encoder alone", Role.PART),
    "CLIP": (zeros("text_model.x", "vision_model.x"), "a CLIP", Role.PART),
    "kohya": (zeros("lora_unet_down_0.lora_down.weight", "lora_unet_down_0.alpha"), "LoRA", Role.LORA),
    "PEFT": (zeros("base_model.model.down.to_q.lora_A.weight"), "LoRA", Role.LORA),
    "ControlNet": (zeros("control_model.input_blocks.0.0.weight"), "ControlNet", Role.ADDITION),
    "ControlNet of diffusers": (zeros("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"), "ControlNet",
                                Role.ADDITION),
    "T2I-Adapter": (zeros("adapter.body.0.resnets.0.block1.weight"), "T2I-Adapter", Role.ADDITION),
    "IP-Adapter": (zeros("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"), "IP-Adapter", Role.ADDITION),
    "upscaler": (zeros("conv_first.weight", "body.0.rdb1.conv1.weight"), "upscaler", Role.OTHER),
    "a1111": ({"emb_params": torch.zeros(2, 768)}, "Textual Inversion embedding", Role.EMBEDDING),
    "diffusers word": ({"<cat-toy>": torch.zeros(1, 768)}, "Textual Inversion embedding", Role.EMBEDDING),
    "SDXL word": ({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, "for Stable Diffusion XL",
                  Role.EMBEDDING),
    "our concept": (zeros("0.embedding", "0.target_input", "0.super_input"), "concept of this project", Role.CONCEPT),
    "our run": (zeros("concepts.0.embedding"), "run's checkpoint", Role.RUN),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files_are_named(tmp_path: Path, kind: str, wrapped: bool) -> None:
    tensors, name, role = KINDS[kind]
    path = tmp_path / "x.bin"
    torch.save({"state_dict": tensors, "global_step": 5}, path) if wrapped else save_file(tensors, path)
    family = identify_file(path)
    assert name in family.name and family.role is role
    if role not in (Role.BASE, Role.PART):
        with pytest.raises(UserError, match=f"--ckpt .*x.bin: is .*{name}"):
            check_checkpoint("--ckpt", path)
    if role not in (Role.CONCEPT, Role.EMBEDDING):
        for check in (check_concept, load_concepts):
            with pytest.raises(UserError, match=f"x.bin: is .*{name}.*, not a concept"):
                check(path)


@pytest.mark.parametrize(("content", "name"), [
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}}, "Textual Inversion embedding"),
    ({"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(1, 768))})}, "Textual Inversion embedding"),
    ({768: (zeros("linear.0.weight"), zeros("linear.0.weight")), "layer_structure": [1, 2, 1]}, "a hypernetwork")])
def test_pickled_kinds_are_named(tmp_path: Path, content: Any, name: str) -> None:
    torch.save(content, tmp_path / "x.safetensors")
    assert name in identify_file(tmp_path / "x.safetensors").name
    with pytest.raises(UserError, match=f"is .*{name}, not a base model"):
        check_checkpoint("--ckpt", tmp_path / "x.safetensors")


CONFIGS = {768: "v1-inference", 1024: "v2-inference", 2048: "sd_xl_base"}


@pytest.mark.parametrize("own", CONFIGS)
@pytest.mark.parametrize("other", CONFIGS)
def test_the_config_of_another_family_is_refused_with_the_right_one(tmp_path: Path, own: int, other: int) -> None:
    config = yaml.safe_load((PROJECT_ROOT / "configs" / "stable-diffusion" / f"{CONFIGS[other]}.yaml").read_text())
    file, folder = tmp_path / "x.safetensors", tmp_path / "folder"
    parts = ("first_stage_model.x", "cond_stage_model.x", "conditioner.embedders.0.x", "conditioner.embedders.1.x")
    save_file({**unet(own), **zeros(*parts)}, file)
    (folder / "unet").mkdir(parents=True)
    save_file({"conv_in.weight": torch.zeros(320, 4, 3, 3),
               "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, own)},
              folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for path in (file, folder):
        if own == other:
            check_checkpoint("--ckpt", path, config)
            continue
        with pytest.raises(UserError, match=f"have {other} numbers; it looks like .*{CONFIGS[own]}.yaml") as refused:
            check_checkpoint("--ckpt", path, config)
        assert "\n" not in str(refused.value)


def test_words_of_other_tools_are_concepts(tmp_path: Path) -> None:
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "my cat.safetensors")
    save_file({"<cat-toy>": torch.ones(768)}, tmp_path / "learned_embeds.bin")
    (mine,), (theirs,) = map(load_concepts, (tmp_path / "my cat.safetensors", tmp_path / "learned_embeds.bin"))
    assert (mine.placeholder, mine.vectors.shape) == ("<my-cat>", (2, 768))
    assert (theirs.placeholder, theirs.vectors.shape) == ("<cat-toy>", (1, 768))


def answer(*arguments: str) -> str:
    """Return what a command answers in a process in which torch cannot be imported."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], " \
           "run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True,
                            check=False, timeout=60)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    return result.stderr


def test_files_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    save_file(KINDS["SD 1"][0], tmp_path / "sd.safetensors")
    save_file(KINDS["kohya"][0], tmp_path / "lora.safetensors")
    txt2img = ("scripts/txt2img.py", "--prompt", "a dog")
    train = ("main.py", "--base", "configs/perfusion.yaml")
    for arguments, message in (
        ((*txt2img, "--ckpt", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
        ((*txt2img, "--ckpt", f"{tmp_path}/sd.safetensors"), "configs/stable-diffusion/v1-inference.yaml"),
        ((*txt2img, "--concept", f"{tmp_path}/lora.safetensors"), "is a LoRA, not a concept"),
        ((*txt2img, "--vae", "nowhere"), "--vae nowhere: no such file"),
        ((*train, "--actual_resume", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
        ((*train, "--actual_resume", f"{tmp_path}/lora.safetensors"), "is a LoRA, not a base model"),
        ((*train, "model.params.ckpt_path=nowhere.ckpt"), "nowhere.ckpt: no such file"),
        ((*train, "--resume", str(MINI)), "no state of a training run; to start from weights use --actual_resume"),
        (("main.py", "--base", str(MINI)), "is a safetensors file, not a config"),
    ):
        assert message in answer(*arguments)


# Parts from other files


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, dict[str, Any]]:
    """Return a folder with a tiny model in parts, its weights and its config."""
    folder = tmp_path_factory.mktemp("parts")
    state = {key: value.clone() for key, value in tiny_models.build_model(folder, use_ema=False).state_dict().items()}
    starts = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
    for name, start in starts.items():
        tensors = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        save_file(tensors, folder / f"{name}.safetensors")
    save_file(state, folder / "whole.safetensors")
    return folder, state, {"model": tiny_models.latent_diffusion_config(folder, use_ema=False)}


@pytest.mark.parametrize(("vae", "text"), [("vae", "text"), ("whole", "whole")])
def test_missing_parts_come_from_other_files(parts: Any, vae: str, text: str) -> None:
    folder, state, config = parts
    model = load_model(config, folder / "unet.safetensors", vae=folder / f"{vae}.safetensors",
                       text_encoder=folder / f"{text}.safetensors")
    loaded = model.state_dict()
    schedule = tuple(model.schedule_names)
    assert all(torch.equal(loaded[key], state[key]) for key in loaded if not key.startswith(schedule))


@pytest.mark.parametrize("refuse", [
    lambda config, path: load_model(config, path),
    lambda config, path: check_checkpoint("--ckpt", path, config)], ids=["loading", "early"])
def test_missing_parts_are_named(parts: Any, tmp_path: Path, refuse: Callable[[Any, Path], Any]) -> None:
    folder, state, config = parts
    save_file({key: value for key, value in state.items() if "first_stage" not in key}, tmp_path / "x.safetensors")
    for path, message in ((tmp_path / "x.safetensors", "holds no first stage .VAE.; take .* --vae FILE, or"),
                          (folder / "unet.safetensors", "the U-Net alone, .* --vae FILE and --text_encoder FOLDER")):
        with pytest.raises(UserError, match=message):
            refuse(config, path)
    with pytest.raises(UserError, match="--vae .*text.safetensors: holds no first stage"):
        load_model(config, folder / "unet.safetensors", vae=folder / "text.safetensors")


# What the network predicts


@pytest.mark.parametrize(("metadata", "keys", "beside", "kind"), [
    ({"modelspec.prediction_type": "v"}, (), None, "v"), ({"modelspec.prediction_type": "epsilon"}, (), None, "eps"),
    ({}, ("v_pred",), None, "v"), ({}, ("v_pred", "ztsnr"), None, "v"), ({}, (), "v", "v"), ({}, (), None, None),
    ({"modelspec.prediction_type": "v_prediction"}, (), "eps", "v"), ({"prediction_type": "nonsense"}, (), None, None)])
def test_files_say_what_their_network_predicts(tmp_path: Path, metadata: dict[str, str], keys: tuple[str, ...],
                                               beside: str | None, kind: str | None) -> None:
    save_file({**unet(768), **{key: torch.zeros(0) for key in keys}}, tmp_path / "x.safetensors", metadata=metadata)
    if beside is not None:
        (tmp_path / "x.yaml").write_text(f"model: {{params: {{unet_config: {{}}, parameterization: {beside}}}}}")
    stated = stated_prediction(tmp_path / "x.safetensors")
    assert (stated and stated.kind) == kind
