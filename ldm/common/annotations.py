"""Whether a value from a YAML file is of the kind that a function's annotation asks for."""
from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path",
         type(None): "null"}


def annotated_kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter name -> annotation, evaluated; none where Python cannot tell."""
    try:
        return typing.get_type_hints(function)
    except (TypeError, NameError, AttributeError):
        return {}


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` may stand where `kind` is asked for; kinds that YAML cannot express are not judged."""
    if kind is Any:
        return True
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in PLAIN:
        return _fits_plain(value, origin)
    if not _is_class(origin):
        return True
    if issubclass(origin, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    if issubclass(origin, collections.abc.Sequence):
        many = isinstance(value, collections.abc.Sequence) and not isinstance(value, str)
        return many and (not inner or all(fits(item, inner[0]) for item in value))
    return not isinstance(value, str | int | float | None)


def _fits_plain(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool | int) and value in (0, 1)
    if kind is Path:
        return isinstance(value, str | Path)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _is_class(kind: Any) -> bool:
    return isinstance(kind, type)


def described(kind: Any) -> str:
    """The kind in plain words, such as "a whole number or null"."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        choices = tuple(choice for one in inner if typing.get_origin(one) is typing.Literal
                        for choice in typing.get_args(one))
        others = [one for one in inner if typing.get_origin(one) is not typing.Literal
                  and not (one is int and float in inner)]
        texts = [described(typing.Literal[choices])] if choices else []
        return " or ".join(dict.fromkeys([*texts, *map(described, others)]))
    if origin is typing.Literal:
        return "one of " + ", ".join(dict.fromkeys(map(str, inner)))
    if origin in PLAIN:
        return PLAIN[origin]
    if _is_class(origin) and issubclass(origin, collections.abc.Mapping):
        return "keys with values"
    if _is_class(origin) and issubclass(origin, collections.abc.Sequence):
        return "a list" + (f" of {described(inner[0])}" if inner and inner[0] in PLAIN else "")
    return getattr(origin, "__name__", str(origin))
