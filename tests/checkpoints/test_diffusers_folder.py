"""Folders that diffusers and transformers write, with those libraries' own networks and converters as the oracle."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from helpers import tiny_models
from helpers.oracles import randomize
from helpers.stand_ins import LENGTH, WIDTH, open_clip_arch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.diffusers_names import clip_tensors, open_clip_tensors, unet_tensors, vae_tensors
from ldm.checkpoints.load import load_model, load_weights, read_state_dict
from ldm.common.errors import UserError
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.encoders.bert import BERTEmbedder
from ldm.util import instantiate_from_config

PROJECT = Path(__file__).resolve().parents[2]
LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
UNET = {"sample_size": 8, "block_out_channels": (32, 64, 96), "layers_per_block": 2, "cross_attention_dim": WIDTH,
        "attention_head_dim": 2, **LEVELS}
UNET_2 = {**UNET, "attention_head_dim": (2, 4, 6), "use_linear_projection": True}
OUR_UNET = {"channel_mult": [1, 2, 3], "num_res_blocks": 2, "attention_resolutions": [1, 2]}
VAE = {"block_out_channels": (32, 64, 32), "layers_per_block": 2, "latent_channels": 4, "sample_size": 16,
       "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
OUR_VAE = {"ch_mult": [1, 2, 1], "num_res_blocks": 2}
# One layer less than the small open_clip tower, as in the public pipelines of Stable Diffusion 2.
TOWER = {"vocab_size": 49408, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": LENGTH, "projection_dim": WIDTH,
         "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def build_networks(version: int) -> dict[str, nn.Module]:
    """Return the networks of a tiny Stable Diffusion 1 or 2 by diffusers, with random parameters."""
    networks = {"unet": UNet2DConditionModel(**(UNET if version == 1 else UNET_2)), "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TOWER, hidden_act="quick_gelu" if version == 1 else "gelu"))}
    return {name: randomize(module, seed, scale=0.1).eval() for seed, (name, module) in enumerate(networks.items())}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, dict[str, nn.Module]]]:
    @cache
    def written(version: int) -> tuple[Path, dict[str, nn.Module]]:
        folder, modules = tmp_path_factory.mktemp(f"sd{version}"), build_networks(version)
        for name, module in modules.items():
            module.save_pretrained(folder / name)
        prediction = "epsilon" if version == 1 else "v_prediction"
        DDIMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
        return folder, modules

    return written


def config(version: int, folder: Path) -> dict[str, Any]:
    """Return the config of our model of the same shape."""
    second = {"use_linear_in_transformer": True, "num_head_channels": 16, "num_heads": -1} if version == 2 else {}
    first_stage = tiny_models.first_stage_config()
    first_stage["params"]["ddconfig"] |= OUR_VAE
    described = tiny_models.latent_diffusion_config(folder, unet_config=tiny_models.unet_config(**OUR_UNET, **second),
                                             first_stage_config=first_stage,
                                             parameterization="eps" if version == 1 else "v")
    if version == 1:
        (folder / "tower" / "config.json").write_text(json.dumps({**TOWER, "hidden_act": "quick_gelu",
                                                                  "model_type": "clip_text_model"}))
    else:
        described["params"]["cond_stage_config"] = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"arch": open_clip_arch(folder), "max_length": LENGTH, "layer": "penultimate"}}
    return {"model": described}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def agree(model: Any, theirs: dict[str, nn.Module]) -> None:
    """Assert that both give the same encodings, predictions, latents and images."""
    prompts = ["a photo of a cat on the beach", ""]
    tokens = model.cond_stage_model.tokenize(prompts)
    encoded = theirs["text_encoder"](input_ids=tokens).last_hidden_state
    close(model.get_learned_conditioning(prompts), encoded)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700])
    close(model.apply_model(x, t, encoded), theirs["unet"](x, t, encoded).sample)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    posterior = theirs["vae"].encode(images).latent_dist
    close(model.first_stage_model.encode(images).parameters, posterior.parameters)
    close(model.first_stage_model.decode(posterior.mean), theirs["vae"].decode(posterior.mean).sample)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_pipeline_gives_the_same_outputs(pipelines: Any, tmp_path: Path, caplog: Any, version: int) -> None:
    folder, theirs = pipelines(version)
    model = load_model(config(version, tmp_path), folder)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    agree(model, theirs)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_round_trip_through_diffusers_converters(pipelines: Any, tmp_path: Path, version: int) -> None:
    folder, theirs = pipelines(version)
    state = load_model(config(version, tmp_path), folder).state_dict()
    same(convert_ldm_unet_checkpoint(dict(state), dict(theirs["unet"].config)), theirs["unet"].state_dict())
    same(convert_ldm_vae_checkpoint(dict(state), dict(theirs["vae"].config)), theirs["vae"].state_dict())
    tower = {key.removeprefix("text_model."): value for key, value in theirs["text_encoder"].state_dict().items()
             if not key.endswith("position_ids")}
    if version == 1:
        back = convert_ldm_clip_checkpoint(dict(state))
    else:
        back = convert_open_clip_checkpoint(theirs["text_encoder"], dict(state))
        unread = ("text_projection", "text_model.encoder.layers.2.")
        back = {key: value for key, value in back.items() if not key.startswith(unread)}
    same({key.removeprefix("text_model."): value for key, value in back.items()}, tower)


@pytest.mark.slow
def test_weights_that_no_encoding_reads_are_not_required(pipelines: Any, tmp_path: Path) -> None:
    models = [load_model(config(2, tmp_path), pipelines(2)[0]) for _ in range(2)]
    last = [model.state_dict()["cond_stage_model.model.transformer.resblocks.2.mlp.c_fc.weight"] for model in models]
    assert not torch.equal(*last)
    fingerprints = {encoder_fingerprint(model.cond_stage_model) for model in models}
    assert len(fingerprints) == 1
    config_of_last = config(2, tmp_path)
    config_of_last["model"]["params"]["cond_stage_config"]["params"]["layer"] = "last"
    with pytest.raises(UserError, match=r"12 keys missing \(cond_stage_model.model.transformer.resblocks.2"):
        load_model(config_of_last, pipelines(2)[0])


def as_bin(folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()


def as_half(folder: Path) -> None:
    for name, module in build_networks(1).items():
        shutil.rmtree(folder / name)
        module.half().save_pretrained(folder / name, variant="fp16")


def in_shards(folder: Path) -> None:
    for name, module in build_networks(1).items():
        shutil.rmtree(folder / name)
        module.save_pretrained(folder / name, max_shard_size="100KB" if name == "vae" else "1MB")


def in_half_shards(folder: Path) -> None:
    for name, module in build_networks(1).items():
        shutil.rmtree(folder / name)
        size = "100KB" if name == "vae" else "500KB"
        module.half().save_pretrained(folder / name, max_shard_size=size, variant="fp16")


def with_more_beside(folder: Path) -> None:
    """Add what public folders also hold: weights that are not averaged, half precision, exports to other frameworks."""
    for name, module in build_networks(1).items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        other = {key: value + 1 for key, value in module.state_dict().items()}
        for extra in (f"{stem}.non_ema.bin", f"{stem}.fp16.bin", "openvino_model.bin"):
            torch.save(other, folder / name / extra)


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", [as_bin, as_half, in_shards, in_half_shards, with_more_beside])
def test_other_ways_to_write_a_pipeline(pipelines: Any, tmp_path: Path, rewrite: Callable[[Path], None]) -> None:
    folder, theirs = pipelines(1)
    shutil.copytree(folder, tmp_path / "copy")
    rewrite(tmp_path / "copy")
    if "shards" in rewrite.__name__:
        assert len(list(tmp_path.glob("copy/*/*-of-*.safetensors"))) > 5
    model = load_model(config(1, tmp_path), tmp_path / "copy")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if "half" in rewrite.__name__:
        theirs = {name: module.half().float() for name, module in build_networks(1).items()}
    agree(model, theirs)


def test_the_schedulers_prediction_type_is_compared_with_the_config(pipelines: Any, tmp_path: Path, caplog: Any
                                                                    ) -> None:
    eps_config = config(2, tmp_path)
    eps_config["model"]["params"]["parameterization"] = "eps"
    load_model(eps_config, pipelines(2)[0])
    assert "its scheduler says that the model predicts v, the config (parameterization) eps" in caplog.text


@pytest.mark.slow
def test_the_folder_of_a_single_network(pipelines: Any, tmp_path: Path) -> None:
    folder, theirs = pipelines(1)
    params = config(1, tmp_path)["model"]["params"]
    first_stage = instantiate_from_config(params["first_stage_config"])
    for source in (folder, folder / "vae", folder / "vae" / "diffusion_pytorch_model.safetensors"):
        randomize(first_stage, 9)
        assert load_weights(first_stage, source) == set(first_stage.state_dict())
        image = torch.rand(1, 3, 16, 16)
        close(first_stage.encode(image).parameters, theirs["vae"].encode(image).latent_dist.parameters)
    unet = instantiate_from_config(params["unet_config"])
    assert load_weights(unet, folder / "unet") == load_weights(unet, folder) == set(unet.state_dict())


def test_a_first_stage_with_a_codebook_and_attention_on_its_levels() -> None:
    shape = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
             "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "num_vq_embeddings": 8}
    theirs = randomize(VQModel(**{**VAE, **shape}), 1, scale=0.2)
    ddconfig = {"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 2], "num_res_blocks": 2, "attn_resolutions": [8], "dropout": 0.0}
    ours = instantiate_from_config({"target": "ldm.models.autoencoder.VQModelInterface", "params": {
        "embed_dim": 4, "n_embed": 8, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}})
    ours.load_state_dict(vae_tensors(theirs.state_dict()))
    image = torch.rand(1, 3, 16, 16)
    latents = ours.encode(image)
    close(latents, theirs.encode(image).latents)
    close(ours.decode(latents), theirs.decode(latents).sample)


def test_the_older_names_of_attention() -> None:
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = AutoencoderKL(**VAE).state_dict()
    renamed = {}
    for key, value in state.items():
        name = next((key.replace(f".{new}.", f".{old}.") for old, new in older.items() if f".{new}." in key), key)
        renamed[name] = value
    assert renamed.keys() != state.keys()
    same(vae_tensors(renamed), vae_tensors(state))


def test_the_pipeline_of_ldm_text_to_image(tmp_path: Path) -> None:
    """It has LDM-BERT instead of CLIP, and its first stage is in a folder called vqvae."""
    shape = {"vocab_size": 50, "max_position_embeddings": 9, "encoder_layers": 3, "d_model": 24, "encoder_ffn_dim": 96}
    bert, vae = randomize(LDMBertModel(LDMBertConfig(**shape)), 1, scale=0.2).eval(), AutoencoderKL(**VAE)
    for name, module in (("bert", bert), ("vqvae", vae)):
        (tmp_path / name).mkdir()
        torch.save(module.state_dict(), tmp_path / name / "pytorch_model.bin")
    encoder = BERTEmbedder(24, 3, 50, 9, use_tokenizer=False).eval()
    assert load_weights(encoder, tmp_path) == set(encoder.state_dict())
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        close(encoder(tokens), bert.model(tokens).last_hidden_state)
        close(encoder.transformer(tokens), bert.to_logits(bert.model(tokens).last_hidden_state))
    assert "first_stage_model.decoder.mid.attn_1.q.weight" in read_state_dict(tmp_path)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unet", "tower"), [
    ("v1-inference", {"cross_attention_dim": 768, "attention_head_dim": 8}, {"hidden_size": 768, "layers": 12}),
    ("v2-inference-v", {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                        "use_linear_projection": True}, {"hidden_size": 1024, "layers": 23}),
])
def test_every_key_of_the_real_sizes(name: str, unet: dict[str, Any], tower: dict[str, Any]) -> None:
    section = OmegaConf.load(PROJECT / "configs" / "stable-diffusion" / f"{name}.yaml").model
    width = tower["hidden_size"]
    with torch.device("meta"):
        ours = shapes(instantiate_from_config({"target": section.target, "params": section.params}).state_dict())
        theirs = {
            "model.diffusion_model.": unet_tensors(UNet2DConditionModel(**unet).state_dict()),
            "first_stage_model.": vae_tensors(AutoencoderKL(
                latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).state_dict()),
            "cond_stage_model.": clip_tensors(CLIPTextModel(CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=tower["layers"],
                num_attention_heads=width // 64, max_position_embeddings=77)).state_dict())}
        if name.startswith("v2"):
            prefix = "transformer.text_model."
            tensors = {key.removeprefix(prefix): value for key, value in theirs["cond_stage_model."].items()}
            theirs["cond_stage_model."] = {f"model.{key}": value for key, value in open_clip_tensors(tensors).items()}
    for start, tensors in theirs.items():
        unread = ("cond_stage_model.model.transformer.resblocks.23.", "cond_stage_model.model.text_projection",
                  "cond_stage_model.model.logit_scale")
        expected = {key: shape for key, shape in ours.items() if key.startswith(start) and not key.startswith(unread)}
        assert shapes({start + key: value for key, value in tensors.items()}) == expected


@pytest.fixture
def refusal(pipelines: Any, tmp_path: Path) -> Callable[[str, bytes | None], str]:
    """Return a function that replaces or removes a file of a pipeline, and returns the error message."""
    folder = shutil.copytree(pipelines(1)[0], tmp_path / "copy")

    def refused(name: str, content: bytes | None) -> str:
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read_state_dict(folder)
        assert "\n" not in str(error.value) and str(folder / name).startswith(str(error.value).split(":")[0])
        return str(error.value)

    return refused


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def test_missing_and_truncated_files_of_a_pipeline(refusal: Any) -> None:
    assert "its download or copy was not completed" in refusal(UNET_FILE, b"\0" * 99)
    assert "holds no weights" in refusal(UNET_FILE, None)


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", "[" * 99999, {"weight_map": []}, {"weight_map": {"a": "/etc/passwd"}},
    {"weight_map": {"a": "..", "b": 5}}, {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}},
    {"weight_map": {"a": "x.txt"}},
], ids=str)
def test_bad_shard_indices_are_refused(refusal: Any, content: Any) -> None:
    refusal(UNET_FILE, None)
    text = content if isinstance(content, str) else json.dumps(content)
    assert "download it again" in refusal(f"{UNET_FILE}.index.json", text.encode())


def test_missing_shards_are_named(refusal: Any) -> None:
    refusal(UNET_FILE, None)
    index = json.dumps({"weight_map": {"a": "x-00001-of-00002.safetensors"}})
    assert "x-00001-of-00002.safetensors is missing (1 of 1" in refusal(f"{UNET_FILE}.index.json", index.encode())


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for name, advice in (("notes.txt", "name a checkpoint"), ("model.ckpt", "name a file in it, such as")):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=advice) as refused:
            read_state_dict(tmp_path)
        assert "no diffusers folder" in str(refused.value)


def test_a_pipeline_without_all_its_networks(pipelines: Any, tmp_path: Path) -> None:
    shutil.copytree(pipelines(1)[0], tmp_path / "copy", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(UserError, match=r"holds no first stage \(VAE\); take what .* --vae FILE"):
        load_model(config(1, tmp_path), tmp_path / "copy")
