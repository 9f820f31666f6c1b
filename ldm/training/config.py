"""Build the config of a training run from YAML files, options and key=value overrides."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.annotations import matches_type
from ldm.common.errors import UserError, brief_reason
from ldm.common.file_formats import check_config_file
from ldm.common.instantiate import EMBEDDER_KEYS
from ldm.common.library_errors import OWN_PACKAGES
from ldm.common.paths import resolve_path, user_path
from ldm.inference.model_config import inference_defaults
from ldm.inference.sgm_config import is_sgm_config
from ldm.training.options import DEFAULT_SEED, NO_MASKS, SEED_LIMIT, TrainingOptions
from ldm.training.public_options import apply_public_options, flatten_checkpoint_settings, use_gpus
from ldm.util import get_obj_from_str, known_params

SECTIONS = {"": ("model", "data", "lightning", "inference"), "model": ("target", "params", "base_learning_rate"),
            "data": ("target", "params"), "lightning": ("trainer", "callbacks", "modelcheckpoint", "seed")}
PART_KEYS = ("target", "params", "base_learning_rate")  # of a section that describes an object
CHECKED_PACKAGES = (*OWN_PACKAGES, "main")
REQUIRED_SECTIONS = "model, data and, if need be, lightning"
FREE_SECTIONS = ("lightning.trainer", "lightning.callbacks", "lightning.modelcheckpoint", "inference")
TRAINER_OPTIONS = ("accelerator", "devices", "max_steps", "precision")
OPTION_KEYS = {  # option: the keys of the config that it sets, if they are there
    "data_root": ("data.params.train.params.data_root", "data.params.validation.params.data_root"),
    "super_category": ("model.params.super_category",),
    "init_embedding": ("model.params.init_embedding",),
    "placeholder": ("model.params.placeholder",),
    "masks": ("data.params.train.params.mask_root",),
    "crop": ("data.params.train.params.crop",),
    "checkpoint": ("model.params.ckpt_path",),
    "vae": ("model.params.vae_path",),
    "text_encoder": ("model.params.text_encoder_path",),
}
FLAGS = {"super_category": "--init_word", "checkpoint": "--actual_resume"}  # those not named after their option
SUPER_CATEGORY = "model.params.super_category"
REQUIRED_VALUES = {  # what to answer for a value that a config leaves to the user ("???")
    "data.params.train.params.data_root": "the folder of your photos: give it with --data_root photos/",
    "model.params.super_category": 'what kind of subject it is: give it with --init_word "teddy bear"',
    "model.params.placeholder": 'the word that stands for it in prompts: give it with --placeholder "<my-teddy>"',
    "model.params.ckpt_path": "the base model: give it with --actual_resume model.safetensors",
}
RENAMED_CALLBACKS = {"pictures": "previews"}  # keys of lightning.callbacks in earlier versions
RENAMED_PREVIEW_PARAMS = {"steps": "num_inference_steps", "scale": "guidance_scale"}


def read_config(options: TrainingOptions, earlier: DictConfig | None = None) -> DictConfig:
    """Return the merged config: YAML files in order, then options, then key=value overrides.

    Args:
        options: the options of the run.
        earlier: config of the run that is continued, which comes first.

    Raises:
        UserError: a file or an override cannot be read, a section is unknown, or a required value is missing.
    """
    if not options.configs and earlier is None:
        raise UserError("no config: give one with --base, for example --base configs/perfusion.yaml")
    config = OmegaConf.create({"lightning": {"trainer": {}}}) if earlier is None else earlier.copy()
    for path in options.configs:
        later = _read_file(path)
        config = _merge(path, _without_params_of_another_target(config, later), later)
    _check_sections(config)
    _apply_options(config, apply_public_options(config, _with_placeholders(config, options)))
    overrides = list(options.overrides)
    parsed = _parse(" ".join(overrides), lambda: OmegaConf.from_dotlist(overrides))
    config = _merge(" ".join(overrides), config, _with_current_keys(parsed))
    _check_required(config)
    _parse("config", lambda: OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    _check_sections(config)
    use_gpus(config.lightning.trainer)
    _check_values(config)
    return config


# Files


def _read_file(path: str) -> DictConfig:
    found = resolve_path(path)
    if not found.exists():
        raise UserError(f"--base {path}: no such file")
    check_config_file(found)
    config = _with_current_keys(_parse(path, lambda: OmegaConf.load(found)))
    if is_sgm_config(config):
        raise UserError(f"--base {path}: is a config of generative-models; to train a concept on Stable Diffusion XL "
                        "use configs/perfusion-sd-xl.yaml")
    return config


def _with_current_keys(config: DictConfig) -> DictConfig:
    """Translate the keys of configs and overrides of earlier versions, and of the LDM family's."""
    flatten_checkpoint_settings(config)
    lightning = config.get("lightning")
    callbacks = lightning.get("callbacks") if isinstance(lightning, DictConfig) else None
    if isinstance(callbacks, DictConfig):
        _rename_keys(callbacks, RENAMED_CALLBACKS)
        _rename_keys(OmegaConf.select(callbacks, "previews.params"), RENAMED_PREVIEW_PARAMS)
    return config


def _rename_keys(section: Any, names: Mapping[str, str]) -> None:
    for old, current in names.items():
        if isinstance(section, DictConfig) and old in section and current not in section:
            section[current] = section.pop(old)


def _without_params_of_another_target(config: DictConfig, later: DictConfig) -> DictConfig:
    """Remove from `config` the model's params that the model named by `later` does not have.

    So the first file can give photos, base model and schedule, and the next one another method. Params that neither
    model has stay; building the model then refuses them.
    """
    both = (config, later)
    if not all(isinstance(one.get("model"), DictConfig) and one.model.get("target") for one in both):
        return config
    ours, theirs = (known_params(get_obj_from_str(one.model.target)) for one in both)
    params = config.model.get("params") or {}
    for name in (ours - theirs) & set(params):
        del params[name]
    return config


def _parse(name: str, read: Callable[[], DictConfig | ListConfig]) -> DictConfig:
    try:
        config = read()
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = brief_reason(error)
        raise UserError(f"{name}: not readable as a config ({reason})") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{name}: a config has keys with values at its top level")
    return config


def _merge(name: str, earlier: DictConfig, later: DictConfig) -> DictConfig:
    try:
        return OmegaConf.merge(earlier, later)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # such as a list in the place of keys
        reason = brief_reason(error)
        raise UserError(f"{name}: does not fit the config that it is to change ({reason})") from None


# Options


def _with_placeholders(config: DictConfig, options: TrainingOptions) -> TrainingOptions:
    """Name several concepts after their folders if no placeholders are given.

    Raises:
        UserError: the config trains no concept, or nothing says what the subjects are.
    """
    folders = options.data_root or ()
    if len(folders) < 2:
        return options
    if "placeholder" not in (OmegaConf.select(config, "model.params") or {}):
        raise UserError(f"--data_root: {len(folders)} folders, but this config does not train concepts; give it one")
    if options.super_category is None:
        raise UserError(f"--data_root: {len(folders)} subjects; say what they are, in order, for example "
                        '--init_word "teddy bear" teapot, or one word for all')
    if options.placeholder is not None:
        return options
    names = ["-".join(user_path(folder).resolve().name.strip("<>").split()) for folder in folders]
    return replace(options, placeholder=tuple(f"<{name}>" for name in names))


def _apply_options(config: DictConfig, options: TrainingOptions) -> None:
    for option, keys in OPTION_KEYS.items():
        value = getattr(options, option)
        if isinstance(value, tuple):
            value = value[0] if len(value) == 1 else list(value)
        if option == "masks" and value == NO_MASKS:
            _set_keys(config, option, ("model.params.segmenter", *keys), None)
        elif value is not None:
            _set_keys(config, option, keys, value)
    for option in TRAINER_OPTIONS:
        if (value := getattr(options, option)) is not None:
            config.lightning.trainer[option] = value
    seed = config.lightning.get("seed", DEFAULT_SEED)
    config.lightning.seed = seed if options.seed is None else options.seed


def _set_keys(config: DictConfig, option: str, keys: Sequence[str], value: Any) -> None:
    present = [key for key in keys if _can_be_set(config, key)]
    if not present:
        raise UserError(f"{FLAGS.get(option, f'--{option}')}: this config has no {' or '.join(keys)} to set")
    for key in present:
        OmegaConf.update(config, key, value, force_add=True)


def _can_be_set(config: DictConfig, key: str) -> bool:
    """Return whether a config has a param, or names a class that has it."""
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(config, parent)
    if isinstance(section, DictConfig) and name in section.keys():  # noqa: SIM118 - `in` overlooks "???"
        return True
    target = OmegaConf.select(config, f"{parent.removesuffix('.params')}.target")
    return target is not None and name in known_params(get_obj_from_str(target))


# Checks


def _check_required(config: DictConfig) -> None:
    """Raise UserError that names every value that the config requires ("???") and nothing has set."""
    # Leave references unresolved: a broken one is a different error, which is found later.
    missing = sorted(_missing_keys(OmegaConf.to_container(config, resolve=False)))
    if missing == [SUPER_CATEGORY]:
        from ldm.training.likely_kinds import ask_for_super_category  # loads a CLIP, which no other run needs

        raise ask_for_super_category(config)
    if missing:
        demands = [f"{key} is required, {REQUIRED_VALUES[key]}" if key in REQUIRED_VALUES else
                   f"{key} is required: give {key}=VALUE" for key in missing]
        raise UserError("; ".join(demands))


def _missing_keys(section: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of the values "???" in nested dicts and lists."""
    if section == MISSING:
        yield path
        return
    items = section.items() if isinstance(section, dict) else enumerate(section) if isinstance(section, list) else ()
    for key, value in items:
        yield from _missing_keys(value, f"{path}.{key}" if path else str(key))


def _check_sections(config: DictConfig) -> None:
    for name in FREE_SECTIONS:
        if not isinstance(OmegaConf.select(config, name, default=OmegaConf.create()), DictConfig):
            raise UserError(f"config: {name} must hold keys with values")
    for name, known in SECTIONS.items():
        section = OmegaConf.select(config, name) if name else config
        if not isinstance(section, DictConfig):
            raise UserError(f"config: there is no section {name} with keys in it; a run needs {REQUIRED_SECTIONS}")
        unknown = sorted(set(map(str, section)) - set(known))
        if unknown:
            raise UserError(f"config: unknown key {', '.join(unknown)} in {name or 'the top level'}; "
                            f"known: {', '.join(known)}")
    _check_parts(OmegaConf.to_container(config, resolve=False))


def _check_parts(section: Any, keys: Sequence[str] = PART_KEYS) -> None:
    """Raise UserError if a part of the config that names an own class has other keys than a part can have.

    Args:
        section: a part, or what holds parts.
        keys: those that the part can have.
    """
    if isinstance(section, list):
        for item in section:
            _check_parts(item, keys)
    if not isinstance(section, dict):
        return
    if "target" in section:
        if str(section["target"]).partition(".")[0] not in CHECKED_PACKAGES:
            return
        unknown = sorted(set(map(str, section)) - {*keys})
        if unknown:
            raise UserError(f"config section of {section['target']}: unknown key {', '.join(unknown)}; "
                            f"it has {'a target and params' if keys is PART_KEYS else ', '.join(keys)}")
    for name, item in section.items():
        _check_parts(item, EMBEDDER_KEYS if name == "emb_models" else PART_KEYS)


def _check_values(config: DictConfig) -> None:
    seed, rate = config.lightning.seed, config.model.get("base_learning_rate")
    if not matches_type(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise UserError(f"config: lightning.seed must be a whole number from 0 to {SEED_LIMIT - 1}, not {seed!r}")
    if rate is not None and not (matches_type(rate, float) and rate > 0):
        raise UserError(f"config: model.base_learning_rate must be a number above 0, not {rate!r}")
    inference_defaults(config)
