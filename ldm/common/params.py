"""Check the params of a config against the parameters of the class or function that they are for."""
from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ldm.common.annotations import describe_type, matches_type, parameter_types
from ldm.common.errors import UserError


def known_params(target: Any) -> set[str]:
    """Return the names of all keyword arguments of `target`, those that `**kwargs` passes to base classes included."""
    known = {parameter.name for parameter in _named_parameters(target)}
    if inspect.isclass(target):
        for constructor in _constructors(target):
            known |= {parameter.name for parameter in _named_parameters(constructor)}
        known.discard("self")
    return known


def missing_params(target: Any, given: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters without a default that are not given."""
    return [p.name for p in _named_parameters(target) if p.default is p.empty and p.name not in given]


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
        meant = dict.fromkeys(found for key in unknown for found in difflib.get_close_matches(key, known, 1))
        question = f"; do you mean {' and '.join(meant)}?" if meant else ""
        raise UserError(f"{name} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known)) or 'none'}"
                        f"{question}")


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
