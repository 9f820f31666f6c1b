"""Objects from configs, and the small helpers that every part of the package shares.

Reading flags and configs needs them too, and should not wait for torch: it is imported where it is used.
"""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.annotations import annotated_kinds, described, fits
from ldm.common.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# What configs of runs by earlier versions call targets of ours that have moved.
MOVED_TARGETS = {
    "ldm.data.scenes.SceneDataset": "ldm.data.mini.scenes.SceneDataset",
    "ldm.models.diffusion.custom_diffusion.CustomDiffusion": "ldm.personalization.custom_diffusion.CustomDiffusion",
    "ldm.models.diffusion.dreambooth.DreamBooth": "ldm.personalization.dreambooth.DreamBooth",
    "ldm.models.diffusion.textual_inversion.TextualInversion": "ldm.personalization.textual_inversion.TextualInversion",
    "ldm.models.openclip.OpenCLIPTrainer": "ldm.models.mini.openclip.OpenCLIPTrainer",
    "ldm.models.segmenter.SegmenterTrainer": "ldm.models.mini.segmenter.SegmenterTrainer",
    "ldm.modules.encoders.asides.AsideCLIPEmbedder":
        "ldm.modules.encoders.attribute_binding.AttributeBindingCLIPEmbedder",
    "ldm.training.concept_progress.BeforeDuringAfter": "ldm.training.concept_callbacks.BeforeDuringAfter",
}
TAKEN_AT_ONCE = 2**16  # bytes (CUDA Runtime API, "API synchronization behavior")
OF_THE_DEVICE = ("CUDA", "cuDNN", "HIP", "MPS")  # how errors begin that no value of the user's brings about


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; one on CUDA is not waited for to have done what it was given before.

    It takes small tensors from anywhere, larger ones without waiting only from memory that cannot be swapped out.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.nbytes >= TAKEN_AT_ONCE else tensor).to(device, non_blocking=True)


def forward_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a public module whose names live in other modules (PEP 562).

    A name is imported when it is first asked for. So an import of the public module costs nothing, and the module may
    lie below the one that it forwards to.

    Args:
        module: the public module's `__name__`.
        homes: name -> module that defines it.
    """

    def getattr_(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return getattr_


def get_obj_from_str(path: str) -> Any:
    """Import the object that a dotted path such as `ldm.modules.ema.LitEma` names.

    Targets that configs of earlier versions name (`MOVED_TARGETS`) are found where they now are.

    Raises:
        UserError: there is no such module or no such name in it.
    """
    module, _, name = MOVED_TARGETS.get(str(path), str(path)).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"config target {path!r} cannot be imported: {error}") from error


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Builds `config["target"]` with the keyword arguments of `config["params"]`, and `extra` on top of them.

    The strings `__is_first_stage__` and `__is_unconditional__` stand for "no module here" and give None.

    Raises:
        UserError: no target is named, a param is not one that the target takes, or one that it needs is missing.
    """
    if isinstance(config, str) and config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"config section without a `target`: {config}")
    unknown = sorted(map(str, set(config) - {"target", "params"}))
    if unknown:
        raise UserError(f"config section of {config['target']}: unknown key {', '.join(unknown)}; "
                        "it has a target and params")
    name, params = config["target"], config.get("params") or {}
    target = get_obj_from_str(name)
    if isinstance(params, DictConfig | ListConfig):
        params = _resolved(name, params)
    if not isinstance(params, Mapping):
        raise UserError(f"params of {name}: not keys with values, but {params!r}")
    params = rename_old_params(name, target, params)
    check_param_names(name, target, params)
    given = {**params, **extra}
    missing = [p.name for p in _named(target) if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"{name} needs {', '.join(missing)} in its params")
    check_param_types(name, target, params)
    with user_error_for(f"{name} cannot be built from its params"):
        return target(**given)


@contextmanager
def user_error_for(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what libraries raise for values that they cannot use, and `also`, into a UserError that begins so."""
    from torch import OutOfMemoryError

    try:
        yield
    except OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, *also) as error:
        if str(error).startswith(OF_THE_DEVICE):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{what} ({type(error).__name__}: {reason[:300]}); change them") from error


def _resolved(name: str, params: DictConfig | ListConfig) -> Any:
    try:
        return OmegaConf.to_container(params, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"params of {name}: {str(error).splitlines()[0]}") from None


def known_params(target: Any) -> set[str]:
    """The names of what `target` can be given; where a constructor passes `**kwargs` on, its base classes' too."""
    known = {p.name for p in _named(target)}
    if inspect.isclass(target):
        known |= {p.name for base in _constructors(target) for p in _named(base)} - {"self"}
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
    """Raises a UserError that names the params which `target` would not read, and those it would.

    What `known_params` does not name counts as unknown.
    """
    known = known_params(target)
    unknown = sorted(set(map(str, params)) - known)
    if unknown:
        raise UserError(f"{name} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known)) or 'none'}")


def check_param_types(name: str, target: Any, params: Mapping[str, Any]) -> None:
    """Raises a UserError where a param is of another kind than the annotation says, such as text for a number."""
    functions = list(_constructors(target)) if inspect.isclass(target) else [target]
    kinds: dict[str, Any] = {}
    for function in reversed(functions):
        kinds |= annotated_kinds(function)
    for key, value in params.items():
        if key in kinds and not fits(value, kinds[key]):
            raise UserError(f"{name}: {key} must be {described(kinds[key])}, not {value!r}")


def _constructors(cls: type) -> Iterator[Callable[..., None]]:
    """The `__init__` of a class and, as long as each takes `**kwargs`, those of the classes after it."""
    for owner in cls.__mro__:
        function = vars(owner).get("__init__")
        if inspect.isfunction(function):
            yield function
            if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
                return


def _named(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be given by name; none where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def default(value: T | None, fallback: T) -> T:
    """`value`, or `fallback` where it is None."""
    return fallback if value is None else value


def has_trainable_parameters(module: torch.nn.Module) -> bool:
    """Whether any parameter of it is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_params(model: torch.nn.Module, trainable_only: bool = False) -> int:
    """How many numbers the parameters of `model` hold."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best one there is: cuda, then mps, then cpu.

    Raises:
        UserError: the named device is not there.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" and what is not there cannot do this
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: there is no such device on this machine; leave the flag out") from None
    return device
