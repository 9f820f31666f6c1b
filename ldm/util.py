"""Build objects from configs, and the small helpers that the whole package shares.

Reading flags and configs needs them too and must not wait for torch, so functions import it where they use it.
"""
from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.annotations import describe_type, matches_type, parameter_types
from ldm.common.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
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
    # Public configs name these by main.py, which Python finds only if it runs in the project's root.
    "main.DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
}
NO_MODULE = ("__is_first_stage__", "__is_unconditional__")  # in place of a config, as latent diffusion writes it
SYNCHRONOUS_COPY_LIMIT = 2**16  # bytes that CUDA copies at once (CUDA Runtime API, "API synchronization behavior")
DEVICE_ERRORS = ("CUDA", "cuDNN", "HIP", "MPS")  # messages that begin so are not caused by a user's value
OWN_PACKAGES = ("ldm", "evaluation", "scripts")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the work that is queued on a CUDA device.

    CUDA copies small tensors at once from anywhere, and larger ones without waiting only from pinned memory.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    if tensor.nbytes >= SYNCHRONOUS_COPY_LIMIT:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def get_obj_from_str(path: str) -> Any:
    """Import the object that a dotted path such as `ldm.modules.ema.LitEma` names.

    Targets of earlier versions are translated by `MOVED_TARGETS`.

    Raises:
        UserError: if the module or the name in it does not exist.
    """
    module, _, name = MOVED_TARGETS.get(str(path), str(path)).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"config target {path!r} cannot be imported: {error}") from error


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"]` with the keyword arguments `config["params"]`, which `extra` overrides.

    The strings `__is_first_stage__` and `__is_unconditional__` mean "no module" and give None.

    Raises:
        UserError: if there is no target, a param is unknown, missing or of the wrong type, or a library rejects a
            value.
    """
    if isinstance(config, str) and config in NO_MODULE:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"config section without a `target`: {config}")
    unknown = sorted(map(str, set(config) - {"target", "params"}))
    if unknown:
        raise UserError(f"config section of {config['target']}: unknown key {', '.join(unknown)}; "
                        "it has a target and params")
    name, target = config["target"], get_obj_from_str(config["target"])
    params = rename_old_params(name, target, _plain_params(name, config.get("params") or {}))
    check_param_names(name, target, params)
    given = {**params, **extra}
    missing = [p.name for p in _named_parameters(target) if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)} in its params")
    check_param_types(name, target, params)
    with user_error_for(f"{name} cannot be built from its params"):
        return target(**given)


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


# Errors of libraries


@contextmanager
def user_error_for(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn errors that libraries raise for a user's values into a UserError that begins with `what`.

    Bugs of this project (see `_is_own_bug`), errors of the device and too little memory pass unchanged.

    Args:
        also: further exception types to turn into a UserError.
    """
    from torch import OutOfMemoryError

    try:
        yield
    except OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, *also) as error:
        if str(error).startswith(DEVICE_ERRORS) or _is_own_bug(error):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{what} ({type(error).__name__}: {reason[:300]}); change them") from error


def _is_own_bug(error: Exception) -> bool:
    """Return whether an error arose in this project's code rather than in a library that the code calls.

    Call it in `user_error_for` only: it skips the two outermost frames, which are that function's and its caller's. An
    error without further frames was raised by the function that the caller called with the user's values.

    torch's operators leave no frame of their own. They raise plain RuntimeErrors, which this project's code never does.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][2:]
    if not frames or type(error) is RuntimeError:
        return False
    module = frames[-1].f_globals.get("__name__", "")
    return module.partition(".")[0] in OWN_PACKAGES


# Parameters of constructors and functions


def known_params(target: Any) -> set[str]:
    """Return the names of all keyword arguments of `target`, those that `**kwargs` passes to base classes included."""
    known = {parameter.name for parameter in _named_parameters(target)}
    if inspect.isclass(target):
        for constructor in _constructors(target):
            known |= {parameter.name for parameter in _named_parameters(constructor)}
        known.discard("self")
    return known


def rename_old_params(name: str, target: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `params` with every old spelling replaced by the current one, so that older configs keep loading.

    A class lists its old spellings in a class attribute `renamed_params`, old -> current. Its subclasses inherit them.

    Raises:
        UserError: if a param is given in both spellings.
    """
    renamed: dict[str, str] = {}
    for owner in reversed(getattr(target, "__mro__", ())):
        renamed |= vars(owner).get("renamed_params", {})
    for old, current in renamed.items():
        if old in params and current in params:
            raise UserError(f"{name}: {old} is the old name of {current}; give {current} alone")
    return {renamed.get(key, key): value for key, value in params.items()}


def check_param_names(name: str, target: Any, params: Mapping[str, Any]) -> None:
    """Raise UserError if `target` does not know one of the params. The message names it and lists the known ones."""
    known = known_params(target)
    unknown = sorted(set(map(str, params)) - known)
    if unknown:
        raise UserError(f"{name} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known)) or 'none'}")


def check_param_types(name: str, target: Any, params: Mapping[str, Any]) -> None:
    """Raise UserError if a param does not have its annotated type, such as text in place of a number."""
    functions = list(_constructors(target)) if inspect.isclass(target) else [target]
    expected: dict[str, Any] = {}
    for function in reversed(functions):
        expected |= parameter_types(function)
    for key, value in params.items():
        if key in expected and not matches_type(value, expected[key]):
            raise UserError(f"{name}: {key} must be {describe_type(expected[key])}, not {value!r}")


def _constructors(cls: type) -> Iterator[Callable[..., None]]:
    """Yield the `__init__` of a class and, while each one takes `**kwargs`, those of the next classes in its MRO."""
    for owner in cls.__mro__:
        function = vars(owner).get("__init__")
        if inspect.isfunction(function):
            yield function
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
                return


def _named_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters that accept keywords, or none if Python cannot read the signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


# Values, modules and devices


def default(value: T | None, fallback: T) -> T:
    """Return `value`, or `fallback` if it is None."""
    return fallback if value is None else value


def has_trainable_parameters(module: torch.nn.Module) -> bool:
    """Return whether any parameter of `module` requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_params(model: torch.nn.Module, trainable_only: bool = False) -> int:
    """Return the number of elements of all parameters, or of the trainable ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def pick_device(name: str | None = None) -> torch.device:
    """Return the device called `name`, by default the best available: cuda, then mps, then cpu.

    Raises:
        UserError: if the named device does not exist.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for "meta" and for devices that do not exist
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: this machine has no such device; leave the flag out") from None
    return device
