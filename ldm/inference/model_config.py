"""Read image sizes, default settings and helper models from a model's config. Loads no weights, imports no torch."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.errors import UserError, brief_reason
from ldm.common.file_formats import check_config_file
from ldm.common.paths import resolve_path
from ldm.inference.settings import AUTO, GenerationSettings
from ldm.inference.sgm_config import as_own_config
from ldm.sampling.samplers import sampler_class
from ldm.sampling.spacings import TIMESTEP_SPACINGS
from ldm.util import check_param_types

# Defaults of UNetModel, Encoder and DDPM for what a config leaves out.
DEFAULT_CHANNEL_MULT = (1, 2, 4, 8)
DEFAULT_IMAGE_SIZE = 256
DEFAULT_TIMESTEPS = 1000
DEFAULT_SEGMENTER = "CIDAS/clipseg-rd64-refined"
MODEL_CONFIG = "config.yaml"  # beside a model's weights


@dataclass(frozen=True)
class InferenceDefaults:
    """Default settings and helper models of a model: the section `inference` of its config.

    Attributes:
        guidance_scale: guidance scale; 1 means no guidance.
        sampler: a name in `ldm.sampling.samplers.SAMPLERS`.
        num_inference_steps: number of sampling steps.
        timestep_spacing: a name in `ldm.sampling.spacings.TIMESTEP_SPACINGS`, for samplers that know it; None: the
            sampler's own.
        guidance_rescale: 0..1, see `ldm.sampling.sampler.rescale_guidance`.
        evaluation_clip: folder or name of the CLIP that measures its images.
        segmenter: folder or hub name of a CLIPSeg that finds objects in its images.
        covariance: file of the covariance C of its text encoder; None: computed from default captions and cached.
        encoder: folder of the encoder that predicts concepts from photos; None: there is none.
        domain: what its images show, if that is not the world of photos, such as "a small world of drawings".
    """

    guidance_scale: float = 6.0
    sampler: str = "ddim"
    num_inference_steps: int = 50
    evaluation_clip: str | None = None
    segmenter: str | None = None
    covariance: str | None = None
    encoder: str | None = None
    domain: str | None = None
    timestep_spacing: str | None = None
    guidance_rescale: float = 0.0


def read_model_config(path: str | Path) -> DictConfig:
    """Read a config that describes a model. A relative path may count from the project's root.

    Configs of generative-models are translated, see `ldm.inference.sgm_config`.

    Raises:
        UserError: the file is missing, is not YAML, or describes no model or one that this project does not have.
    """
    config = _read_yaml(path)
    if not isinstance(config, DictConfig) or model_setting(config, "target") is None:
        raise UserError(f"{path}: describes no model (it has no model.target); name the base model's config")
    return as_own_config(config, path)


def inference_defaults(config: DictConfig | None, checkpoint: str | Path | None = None) -> InferenceDefaults:
    """Return the section `inference` of a config, or that of the `config.yaml` beside the model's weights.

    Args:
        config: config of a model or of a training run; None: return the defaults of this class.
        checkpoint: the weights in use; None: those that the config names.

    Raises:
        UserError: the section has an unknown key or a value of the wrong kind.
    """
    if config is None:
        return InferenceDefaults()
    section = OmegaConf.select(config, "inference")
    if section is None:
        section = _section_beside(checkpoint or model_setting(config, "params.ckpt_path"))
    if section is None:
        return InferenceDefaults()
    if not isinstance(section, DictConfig):
        raise UserError(f"config section inference: must be keys with values, not {section!r}")
    values = OmegaConf.to_container(section, resolve=True)
    known = [field.name for field in fields(InferenceDefaults)]
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise UserError(f"config section inference: unknown key {', '.join(unknown)}; it has {', '.join(known)}")
    check_param_types("config section inference", InferenceDefaults, values)
    return InferenceDefaults(**values)


def _section_beside(checkpoint: str | Path | None) -> Any:
    """Return the section `inference` of the `config.yaml` beside a checkpoint; None if there is none."""
    beside = None if checkpoint is None else resolve_path(checkpoint).parent / MODEL_CONFIG
    if beside is None or not beside.is_file():
        return None
    config = _read_yaml(beside)
    return OmegaConf.select(config, "inference") if isinstance(config, DictConfig) else None


def _read_yaml(path: str | Path) -> Any:
    found = resolve_path(path)
    if found.exists():
        check_config_file(found)
    try:
        return OmegaConf.load(found)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a config ({brief_reason(error)})") from None


def latent_size(config: DictConfig, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Return (h, w) of the latents of images with this height and width in pixels; None: the model's own.

    Raises:
        UserError: a side is not a multiple of the total downsampling factor of first stage and U-Net.
    """
    default = model_setting(config, "params.image_size", DEFAULT_IMAGE_SIZE)
    rows, columns = (default, default) if isinstance(default, int) else default
    factor = _first_stage_factor(config)
    levels = len(model_setting(config, "params.unet_config.params.channel_mult", DEFAULT_CHANNEL_MULT))
    step = factor * 2 ** (levels - 1)
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < step or side % step):
            nearest = max(1, round(side / step)) * step
            raise UserError(f"{name} {side}: this model generates multiples of {step} pixels; the nearest is {nearest}")
    return rows if height is None else height // factor, columns if width is None else width // factor


def image_size(config: DictConfig, latents: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in pixels of the images that latents of (h, w) decode to."""
    factor = _first_stage_factor(config)
    return latents[0] * factor, latents[1] * factor


def segmenter_of(config: DictConfig) -> str:
    """Return the folder or hub name of the segmenter that a config names, or else the public CLIPSeg."""
    return model_setting(config, "params.segmenter") or inference_defaults(config).segmenter or DEFAULT_SEGMENTER


def check_steps(config: DictConfig, steps: int) -> None:
    """Raise UserError if the model cannot be sampled in that many steps."""
    timesteps = model_setting(config, "params.timesteps", DEFAULT_TIMESTEPS)
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps: this model has {timesteps}; give 1 to {timesteps}")


def complete_settings(settings: GenerationSettings, config: DictConfig | None, defaults: InferenceDefaults
                      ) -> GenerationSettings:
    """Fill in the defaults of model and sampler, and check the settings before any weights are loaded.

    Raises:
        UserError: the model or the sampler does not support a setting.
    """
    def either(value: Any, default: Any) -> Any:
        return default if value is None else value

    sampler = either(settings.sampler, defaults.sampler)
    method = sampler_class(sampler)
    spacing = settings.timestep_spacing
    if defaults.timestep_spacing not in (None, *TIMESTEP_SPACINGS):
        raise UserError(f"config section inference: timestep_spacing {defaults.timestep_spacing!r} is unknown; choose "
                        f"one of {', '.join(TIMESTEP_SPACINGS)}")
    if spacing is None and defaults.timestep_spacing in method.spacings:
        spacing = defaults.timestep_spacing
    rescale = either(settings.guidance_rescale, defaults.guidance_rescale)
    steps = either(settings.num_inference_steps, defaults.num_inference_steps)
    scale = either(settings.guidance_scale, defaults.guidance_scale)
    eta = method.resolve_eta(settings.eta)
    method.check_spacing(spacing)
    method.check_steps(steps)
    _check_numbers(replace(settings, guidance_scale=scale, guidance_rescale=rescale))
    _check_size_conditions(settings)
    if config is not None:
        if settings.size_conditions and not describes_sizes(config):
            raise UserError(f"{next(iter(settings.size_conditions))}: this model does not read sizes, as Stable "
                            "Diffusion XL does; leave it out")
        check_steps(config, steps)
        latent_size(config, settings.height, settings.width)
    return replace(settings, sampler=sampler, num_inference_steps=steps, guidance_scale=scale, eta=eta,
                   timestep_spacing=spacing, guidance_rescale=rescale)


def describes_sizes(config: DictConfig) -> bool:
    """Return whether the model that a config describes is conditioned on sizes."""
    target = model_setting(config, "params.cond_stage_config.target")
    return str(target).rpartition(".")[2] == "GeneralConditioner"


def _check_size_conditions(settings: GenerationSettings) -> None:
    """Raise UserError if a size that the model is conditioned on is not two numbers in its range."""
    for name, value in settings.size_conditions.items():
        least = 0 if name == "crop" else 1
        is_pair = isinstance(value, tuple | list) and len(value) == 2
        if not is_pair or not all(isinstance(number, int) and number >= least for number in value):
            parts = "top and left" if name == "crop" else "height and width"
            raise UserError(f"{name} {value!r} must be two whole numbers of pixels, {parts}, each {least} or more")


def _check_numbers(settings: GenerationSettings) -> None:
    """Raise UserError if guidance, a bias or a temperature is out of range."""
    if not _is_finite(settings.guidance_scale) or settings.guidance_scale < 0:
        raise UserError(f"guidance_scale {settings.guidance_scale!r} must be a number of at least 0")
    if not _is_finite(settings.guidance_rescale) or not 0 <= settings.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale {settings.guidance_rescale!r} must be a number from 0 to 1")
    for bias in settings.biases or ():
        if bias is not None and bias != AUTO and not _is_finite(bias):
            raise UserError(f"bias {bias!r} must be a number or {AUTO!r}")
    for temperature in settings.temperatures or ():
        if temperature is not None and not (_is_finite(temperature) and temperature > 0):
            raise UserError(f"temperature {temperature!r} must be a number above 0")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def model_setting(config: DictConfig, path: str, default: Any = None) -> Any:
    """Return `config.model.<path>`, or `default` if there is none.

    Raises:
        UserError: the config is damaged at that key.
    """
    try:
        value = OmegaConf.select(config, f"model.{path}")
    except OmegaConfBaseException as error:
        raise UserError(f"config: model.{path} cannot be read ({str(error).splitlines()[0]})") from None
    return default if value is None else value


def _first_stage_factor(config: DictConfig) -> int:
    """Return how many pixels on a side one position of the latents stands for."""
    settings = model_setting(config, "params.first_stage_config.params.ddconfig")
    if settings is None:
        return 1
    return settings.get("patch_size", 1) * 2 ** (len(settings.get("ch_mult", DEFAULT_CHANNEL_MULT)) - 1)
