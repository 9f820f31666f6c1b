"""Understand configs of Stability AI's generative-models (package `sgm`), such as its sd_xl_base.yaml.

They describe the same networks as LDM's configs, with other names around them. A model that this project does not have
is refused with a line that names the config to use instead.

Source: Stability-AI/generative-models, `configs/inference` and the constructors of the classes that they name.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT

PACKAGE = "sgm."
ENGINE = "sgm.models.diffusion.DiffusionEngine"
XL_CONFIG, XL_TRAINING = "configs/stable-diffusion/sd_xl_base.yaml", "configs/perfusion-sd-xl.yaml"
INSTEAD = f"use {XL_CONFIG}, or another one of configs/"
XL_WIDTH = 2048
PARAMETERIZATIONS = {"EpsScaling": "eps", "VScaling": "v"}
ENCODERS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder", "FrozenOpenCLIPEmbedder2", "ConcatTimestepEmbedderND")
FIRST_STAGES = ("AutoencoderKL", "AutoencoderKLInferenceWrapper")
# Params of the engine that sampling does not need: training, logging and speed.
UNUSED = {"sampler_config", "optimizer_config", "scheduler_config", "network_wrapper", "use_ema", "ema_decay_rate",
          "log_keys", "no_cond_log", "compile_model", "en_and_decode_n_samples_a_time"}
READ = {"scale_factor", "disable_first_stage_autocast", "denoiser_config", "network_config", "conditioner_config",
        "first_stage_config", "ckpt_path", "input_key", "loss_fn_config"}
ATTENTION_KERNELS = ("spatial_transformer_attn_type", "attn_type")  # which implementation computes attention
# The side of the latents that public models of each kind were trained on; these configs do not say it.
LATENT_SIDES = {"xl": 128, "v": 96, "eps": 64}


def is_sgm_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a model by a class of generative-models."""
    plain = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    model = plain.get("model")
    return isinstance(model, Mapping) and str(model.get("target") or "").startswith(PACKAGE)


def as_own_config(config: DictConfig, path: str | Path = "config") -> DictConfig:
    """Return a config of this project for the model that a config of generative-models describes; others as they are.

    Args:
        config: describes a model.
        path: where it comes from, for messages.

    Raises:
        UserError: this project has no such model, or the config lacks something.
    """
    if not is_sgm_config(config):
        return config
    model = _plain(config.model, path)
    try:
        params = _Engine(model, path).params()
    except KeyError as error:
        raise UserError(f"{path}: this config of generative-models lacks {error.args[0]}; {INSTEAD}") from None
    inference = _inference_of_xl() if _is_xl(params) else {}
    return OmegaConf.create({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
                             **inference})


class _Engine:
    """The section `model` of a config of generative-models."""

    def __init__(self, model: Mapping[str, Any], path: str | Path) -> None:
        self.path = path
        self.given: Mapping[str, Any] = model.get("params") or {}
        if model["target"] != ENGINE:
            self.refuse(f"describes {model['target'].rpartition('.')[2]}, not a text-to-image model")
        unknown = sorted(set(self.given) - READ - UNUSED)
        if unknown:
            self.refuse(f"has unknown params ({', '.join(unknown)})")
        if self.given.get("loss_fn_config"):
            raise UserError(f"{path}: is a config that trains a base model in generative-models; to train a concept "
                            f"use {XL_TRAINING}, to generate {XL_CONFIG}")

    def refuse(self, what: str) -> None:
        raise UserError(f"{self.path}: this config of generative-models {what}; {INSTEAD}")

    def params(self) -> dict[str, Any]:
        """Return the params of the same model as a `LatentDiffusion`."""
        network = self._network()
        params: dict[str, Any] = {
            **self._noise(),
            "channels": network["in_channels"],
            "first_stage_key": self.given.get("input_key", "jpg"),
            "cond_stage_key": "txt",
            "conditioning_key": "crossattn-adm" if network.get("num_classes") else "crossattn",
            "scale_factor": self.given.get("scale_factor", 1.0),
            "disable_first_stage_autocast": bool(self.given.get("disable_first_stage_autocast", False)),
            "use_ema": False,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
            "first_stage_config": self._first_stage(),
            "cond_stage_config": self._conditioner(),
        }
        params["image_size"] = LATENT_SIDES["xl" if _is_xl(params) else params.get("parameterization", "eps")]
        if self.given.get("ckpt_path"):
            params["ckpt_path"] = self.given["ckpt_path"]
        return params

    def _noise(self) -> dict[str, Any]:
        """Return what the network predicts and the noise schedule."""
        denoiser = self.given["denoiser_config"]
        if _name(denoiser) != "DiscreteDenoiser":
            self.refuse(f"has continuous noise ({_name(denoiser)})")
        settings = denoiser["params"]
        scaling, schedule = settings["scaling_config"], settings["discretization_config"]
        if _name(scaling) not in PARAMETERIZATIONS or _name(schedule) != "LegacyDDPMDiscretization":
            self.refuse(f"has other noise than Stable Diffusion ({_name(scaling)}, {_name(schedule)})")
        betas = schedule.get("params") or {}
        # Eps is the default, and leaving it out lets the marks of a checkpoint say otherwise.
        kind = PARAMETERIZATIONS[_name(scaling)]
        return {**({} if kind == "eps" else {"parameterization": kind}), "timesteps": settings.get("num_idx", 1000),
                "linear_start": betas.get("linear_start", 0.00085), "linear_end": betas.get("linear_end", 0.0120)}

    def _network(self) -> dict[str, Any]:
        """Return the params of the U-Net."""
        section = self.given["network_config"]
        params = dict(section["params"])
        if _name(section) != "UNetModel":
            self.refuse(f"describes another kind of network ({_name(section)})")
        if isinstance(params.get("context_dim"), list) or "aesthetic_score" in self._input_keys():
            self.refuse("describes the refiner of Stable Diffusion XL, which only refines images of the base model")
        if params["in_channels"] != params["out_channels"]:
            self.refuse(f"reads further images ({params['in_channels']} input channels)")
        for key in ATTENTION_KERNELS:
            params.pop(key, None)
        return {"image_size": 32, "use_spatial_transformer": True, "legacy": False, **params}

    def _first_stage(self) -> dict[str, Any]:
        section = self.given["first_stage_config"]
        if _name(section) not in FIRST_STAGES:
            self.refuse(f"has another first stage ({_name(section)})")
        params = dict(section["params"])
        ddconfig = {key: value for key, value in params["ddconfig"].items() if key not in ATTENTION_KERNELS}
        return {"target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {**params, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}}

    def _embedders(self) -> list[Mapping[str, Any]]:
        return self.given["conditioner_config"]["params"]["emb_models"]

    def _input_keys(self) -> set[str]:
        return {str(embedder.get("input_key")) for embedder in self._embedders()}

    def _conditioner(self) -> dict[str, Any]:
        """Return the config of the text encoder, or of a `GeneralConditioner` if there are several embedders."""
        embedders = []
        for embedder in self._embedders():
            name = _name(embedder)
            if name not in ENCODERS:
                self.refuse(f"has other conditions than texts and sizes ({name})")
            embedders.append({**embedder, "target": f"ldm.modules.encoders.modules.{name}"})
        if len(embedders) > 1:
            return {"target": "ldm.modules.encoders.modules.GeneralConditioner", "params": {"emb_models": embedders}}
        if not embedders:
            self.refuse("reads no prompts")
        return {"target": embedders[0]["target"], "params": embedders[0].get("params") or {}}


def _name(section: Mapping[str, Any]) -> str:
    """Return the name of the class that a section describes."""
    return str(section["target"]).rpartition(".")[2]


def _is_xl(params: Mapping[str, Any]) -> bool:
    return params["unet_config"]["params"].get("context_dim") == XL_WIDTH


def _inference_of_xl() -> dict[str, Any]:
    """Return the default settings of generating of our own config of Stable Diffusion XL."""
    own = OmegaConf.to_container(OmegaConf.load(PROJECT_ROOT / XL_CONFIG))
    return {"inference": own["inference"]} if "inference" in own else {}


def _plain(section: DictConfig, path: str | Path) -> Mapping[str, Any]:
    try:
        return OmegaConf.to_container(section, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
