"""Build the objects that configs describe by a `target` and its `params`."""
from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.dreambooth import mark_subject
from ldm.common.errors import UserError
from ldm.common.library_errors import OWN_PACKAGES, call_foreign, user_error_for
from ldm.common.params import check_param_names, check_param_types, missing_params, rename_old_params

# Old targets that configs of earlier versions name, and where those classes are now.
MOVED_TARGETS = {
    "ldm.data.folder.PictureFolder": "ldm.data.folder.ImageFolder",
    "ldm.data.scenes.SceneDataset": "ldm.data.mini.scenes.SceneDataset",
    "ldm.models.diffusion.custom_diffusion.CustomDiffusion": "ldm.personalization.custom_diffusion.CustomDiffusion",
    "ldm.models.diffusion.dreambooth.DreamBooth": "ldm.personalization.dreambooth.DreamBooth",
    "ldm.models.diffusion.textual_inversion.TextualInversion": "ldm.personalization.textual_inversion.TextualInversion",
    "ldm.models.openclip.OpenCLIPTrainer": "ldm.models.mini.openclip.OpenCLIPTrainer",
    "ldm.models.segmenter.SegmenterTrainer": "ldm.models.mini.segmenter.SegmenterTrainer",
    "ldm.modules.encoders.asides.AsideCLIPEmbedder":
        "ldm.modules.encoders.attribute_binding.AttributeBindingCLIPEmbedder",
    "ldm.training.concept_progress.BeforeDuringAfter": "ldm.training.concept_callbacks.BeforeDuringAfter",
    # Public configs name these by main.py. A main.py of the user comes first, see `_import_main`.
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
}
NO_MODULE = ("__is_first_stage__", "__is_unconditional__")  # in place of a config, as latent diffusion writes it
SECTION_KEYS = ("target", "params")
# Keys of an entry of `emb_models`, the embedders of a GeneralConditioner
EMBEDDER_KEYS = (*SECTION_KEYS, "input_key", "input_keys", "is_trainable", "ucg_rate", "legacy_ucg_value")
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class InvalidTarget(UserError, ValueError):
    """A config target is not a dotted path."""


class TargetModuleNotFound(UserError, ModuleNotFoundError):
    """The module that a config target names cannot be imported."""


class TargetNameNotFound(UserError, AttributeError):
    """The module that a config target names does not have the name."""


class NoTarget(UserError, KeyError):
    """A config section has no target."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the object that a dotted path such as `ldm.modules.ema.LitEma` names.

    `MOVED_TARGETS` translates targets of earlier versions and of the LDM family, if there is nothing at their own path.

    Args:
        reload: whether to import the module again, for interactive work.

    Raises:
        UserError: if the module or the name in it does not exist; it is also a ModuleNotFoundError or an
            AttributeError.
    """
    path = str(string)
    if not re.fullmatch(r"\w+(\.\w+)+", path):
        raise InvalidTarget(f"config target {path!r} cannot be imported: it is not a module and a name in it")
    try:
        return _import_main(path) if path.startswith("main.") else _import(path, reload)
    except Exception as error:
        if path in MOVED_TARGETS:
            return _import(MOVED_TARGETS[path], reload)
        reason = f"config target {path!r} cannot be imported: {' '.join(str(error).split())}"
        if isinstance(error, ImportError):
            raise TargetModuleNotFound(reason) from error
        if isinstance(error, AttributeError):
            raise TargetNameNotFound(reason) from error
        raise


def _import(path: str, reload: bool = False) -> Any:
    module_name, _, name = path.rpartition(".")
    module = importlib.import_module(module_name)
    return getattr(importlib.reload(module) if reload else module, name)


def _import_main(path: str) -> Any:
    """Import a name of main.py: of the running one if it has the name, otherwise of the one that Python finds."""
    running, name = sys.modules["__main__"], path.removeprefix("main.")
    if Path(getattr(running, "__file__", None) or "").stem == "main" and hasattr(running, name):
        return getattr(running, name)
    return _import(path)


def is_own(target: Any) -> bool:
    """Return whether a class or function belongs to this project. Users' own classes may have any params."""
    name = getattr(target, "__module__", None) or ""
    package = name.partition(".")[0]
    if package == "ldm" or package not in OWN_PACKAGES:
        return package == "ldm"
    # Users' repositories have packages called scripts and evaluation, too.
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(PROJECT_ROOT)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"]` with the keyword arguments `config["params"]`, which `extra` overrides.

    The strings `__is_first_stage__` and `__is_unconditional__` mean "no module" and give None. Other keys than target
    and params, such as `base_learning_rate`, are left to the caller. The params of this project's own classes are
    checked; those of other classes, and their exceptions, pass unchanged.

    Raises:
        UserError: if there is no target (also a KeyError), or a param of an own class is unknown, missing or of the
            wrong type, or a library rejects a value.
    """
    if isinstance(config, str) and config in NO_MODULE:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise NoTarget(f"config section without a `target`: {config}")
    _check_spelling(config)
    name, target = config["target"], get_obj_from_str(config["target"])
    if not is_own(target):
        return _build_foreign(name, target, config, extra)
    params = rename_old_params(name, target, _plain_params(name, config.get("params") or {}))
    check_param_names(name, target, params)
    given = {**params, **extra}
    if missing := missing_params(target, given):
        raise UserError(f"{name} needs {', '.join(missing)} in its params")
    check_param_types(name, target, params)
    with user_error_for(f"{name} cannot be built from its params"):
        return target(**given)


def _build_foreign(name: str, target: Any, config: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    """Build a target of another project. Its params pass unchecked and, as in latent diffusion, as OmegaConf values."""
    params = config.get("params") or {}
    if not isinstance(params, Mapping):
        raise UserError(f"params of {name}: must be keys with values, not {params!r}")
    return call_foreign(target, {**rename_old_params(name, target, mark_subject(params)), **extra})


def _check_spelling(config: Mapping[str, Any]) -> None:
    """Raise UserError if a key of a section looks like a misspelt `target` or `params`."""
    for key in config:
        meant = difflib.get_close_matches(str(key), SECTION_KEYS, n=1, cutoff=0.7)
        if meant and key not in SECTION_KEYS:
            raise UserError(f"config section of {config['target']}: unknown key {key}; did you mean {meant[0]}?")


def _plain_params(name: str, params: Any) -> Mapping[str, Any]:
    """Return params as plain Python values, with OmegaConf's references resolved."""
    if isinstance(params, DictConfig | ListConfig):
        try:
            params = OmegaConf.to_container(params, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"params of {name}: {str(error).splitlines()[0]}") from None
    if not isinstance(params, Mapping):
        raise UserError(f"params of {name}: must be keys with values, not {params!r}")
    return params
