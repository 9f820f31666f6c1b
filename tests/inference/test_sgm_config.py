"""Configs of Stability AI's generative-models: the same model as our config describes, or one line that names it."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sdxl
import yaml
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.inference.model_config import read_model_config
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.sgm_config import as_own_config

OURS = {"xl": "sd_xl_base", "eps": "v2-inference", "v": "v2-inference-v"}
FIRST_STAGE = {"embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}}
DDCONFIG = {"attn_type": "vanilla-xformers", "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3,
            "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
            "dropout": 0.0}
UNETS = {
    "xl": {"adm_in_channels": 2816, "num_classes": "sequential", "attention_resolutions": [4, 2],
           "channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10], "context_dim": 2048,
           "spatial_transformer_attn_type": "softmax-xformers"},
    "2": {"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "transformer_depth": 1,
          "context_dim": 1024},
}
SHARED = {"use_checkpoint": True, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
          "num_head_channels": 64, "use_linear_in_transformer": True}


def target(name: str, **more: Any) -> dict[str, Any]:
    return {"target": f"sgm.{name}", **more}


def embedder(name: str, key: str = "txt", **params: Any) -> dict[str, Any]:
    return target(f"modules.encoders.modules.{name}", input_key=key, is_trainable=False, params=params)


def theirs(kind: str) -> dict[str, Any]:
    """Return a config as the public files of that repository write it."""
    module = "modules.diffusionmodules"
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    embedders = [embedder("FrozenCLIPEmbedder", layer="hidden", layer_idx=11),
                 embedder("FrozenOpenCLIPEmbedder2", arch="ViT-bigG-14", version="laion2b_s39b_b160k", freeze=True,
                          layer="penultimate", always_return_pooled=True, legacy=False),
                 *(embedder("ConcatTimestepEmbedderND", key, outdim=256) for key in sizes)]
    if kind != "xl":
        embedders = [embedder("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate")]
    denoiser = {"num_idx": 1000, "discretization_config": target(f"{module}.discretizer.LegacyDDPMDiscretization"),
                "scaling_config": target(f"{module}.denoiser_scaling.{'V' if kind == 'v' else 'Eps'}Scaling")}
    params = {
        "scale_factor": 0.13025 if kind == "xl" else 0.18215, "disable_first_stage_autocast": True,
        "denoiser_config": target(f"{module}.denoiser.DiscreteDenoiser", params=denoiser),
        "network_config": target(f"{module}.openaimodel.UNetModel",
                                 params={**SHARED, **UNETS["xl" if kind == "xl" else "2"]}),
        "conditioner_config": target("modules.GeneralConditioner", params={"emb_models": embedders}),
        "first_stage_config": target("models.autoencoder.AutoencoderKL", params={**FIRST_STAGE, "ddconfig": DDCONFIG}),
    }
    return {"model": target("models.diffusion.DiffusionEngine", params=params)}


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def differences(one: Any, other: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the keys at which two configs differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return {found: values for key in keys
                for found, values in differences(one.get(key), other.get(key), f"{path}.{key}").items()}
    return {} if one == other else {path: (one, other)}


@pytest.mark.parametrize("kind", OURS)
def test_public_configs_describe_the_same_model_as_ours(tmp_path: Path, kind: str) -> None:
    translated = OmegaConf.to_container(read_model_config(write(tmp_path, theirs(kind))), resolve=True)
    own = OmegaConf.to_container(OmegaConf.load(PROJECT_ROOT / f"configs/stable-diffusion/{OURS[kind]}.yaml"))
    found = {path.rpartition(".")[2] for path in differences(translated, own)}
    # What neither the network nor an image depends on
    assert found <= {"image_size", "use_fp16", "base_learning_rate", "num_timesteps_cond", "log_every_t", "monitor",
                     "cond_stage_trainable", "disable_first_stage_autocast"}
    assert translated["model"]["params"]["image_size"] == own["model"]["params"]["image_size"]


def changed(**changes: Any) -> dict[str, Any]:
    """Return the config of the base model with some params of the engine replaced."""
    config = theirs("xl")
    config["model"]["params"].update(changes)
    return config


def refiner() -> dict[str, Any]:
    config = theirs("xl")
    config["model"]["params"]["network_config"]["params"] |= {"model_channels": 384, "context_dim": [1280] * 4}
    return config


def with_channels(count: int) -> dict[str, Any]:
    config = theirs("xl")
    config["model"]["params"]["network_config"]["params"]["in_channels"] = count
    return config


def without(name: str) -> dict[str, Any]:
    config = theirs("xl")
    del config["model"]["params"][name]
    return config


@pytest.mark.parametrize(("config", "message"), [
    (refiner(), "describes the refiner of Stable Diffusion XL"),
    (with_channels(9), r"reads further images \(9 input channels\)"),
    (changed(network_config=target("modules.diffusionmodules.video_model.VideoUNet", params={})), "kind of network"),
    (changed(denoiser_config=target("modules.diffusionmodules.denoiser.Denoiser", params={})), "continuous noise"),
    (changed(conditioner_config=target("modules.GeneralConditioner", params={
        "emb_models": [embedder("FrozenOpenCLIPImageEmbedder", "frames")]})), "other conditions than texts and sizes"),
    (changed(first_stage_config=target("models.autoencoder.AutoencodingEngine", params={})), "another first stage"),
    (changed(loss_fn_config=target("modules.diffusionmodules.loss.StandardDiffusionLoss")),
     "trains a base model in generative-models; to train a concept use configs/perfusion-sd-xl.yaml"),
    (changed(nonsense=1), r"has unknown params \(nonsense\)"),
    (without("network_config"), "lacks network_config"),
    ({"model": target("models.autoencoder.AutoencodingEngine", params={})}, "describes AutoencodingEngine"),
], ids=range(10))
def test_other_configs_are_refused_with_ours(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"theirs.yaml: .*{message}") as refused:
        read_model_config(write(tmp_path, config))
    assert "configs/stable-diffusion/sd_xl_base.yaml" in str(refused.value) and "\n" not in str(refused.value)


def test_our_own_configs_stay_as_they_are() -> None:
    config = OmegaConf.load(PROJECT_ROOT / "configs/stable-diffusion/v1-inference.yaml")
    assert as_own_config(config) is config


@pytest.mark.slow
def test_an_image_of_a_small_model(tmp_path: Path) -> None:
    """A config of theirs, with small sizes, gives the image that ours gives."""
    _, weights = sdxl.write_small_model(tmp_path)
    own, config = sdxl.small_config().model.params, theirs("xl")
    params = config["model"]["params"]
    params["network_config"]["params"] |= sdxl.UNET
    params["first_stage_config"]["params"]["ddconfig"] |= sdxl.FIRST_STAGE
    emb_models = OmegaConf.to_container(own.cond_stage_config.params.emb_models)
    for entry, small in zip(params["conditioner_config"]["params"]["emb_models"], emb_models, strict=True):
        entry["params"] = small["params"]
    images = []
    for described in (sdxl.small_config(), OmegaConf.create(config)):
        pipeline = PerfusionPipeline.from_config(described, weights, "cpu")
        images.append(pipeline("a cat", seed=2, num_inference_steps=2, height=16, width=16).images[0])
    assert images[0].tobytes() == images[1].tobytes()


def test_marks_of_a_checkpoint_may_decide_what_the_network_predicts(tmp_path: Path) -> None:
    assert "parameterization" not in read_model_config(write(tmp_path, theirs("xl"))).model.params
