"""Check values of YAML files against the type annotations of Python functions, and describe types in plain words."""
from __future__ import annotations

import collections.abc
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path",
                type(None): "null"}


def parameter_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter name -> annotated type, or nothing if an annotation cannot be evaluated."""
    try:
        return typing.get_type_hints(function)
    except (TypeError, NameError, AttributeError):
        return {}


def matches_type(value: Any, expected: Any) -> bool:
    """Return whether `value`, read from YAML, has the `expected` type.

    More lenient than Python where YAML cannot express a difference: a list is a tuple, a string is a path, 0 and 1 are
    truth values, an int is a float. Types that YAML cannot express accept every object that is not a plain value.
    """
    if expected is Any:
        return True
    origin, arguments = _split_type(expected)
    if _is_union(origin):
        return any(matches_type(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in DESCRIPTIONS:
        return _matches_plain_type(value, origin)
    if not isinstance(origin, type):
        return True
    if issubclass(origin, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    if issubclass(origin, collections.abc.Sequence):
        return _matches_sequence(value, arguments)
    return not isinstance(value, str | int | float | None)


def describe_type(expected: Any) -> str:
    """Return the type in plain words, such as "a whole number or null"."""
    origin, arguments = _split_type(expected)
    if _is_union(origin):
        return _describe_union(arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(dict.fromkeys(map(str, arguments)))
    if origin in DESCRIPTIONS:
        return DESCRIPTIONS[origin]
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return "keys with values"
    if isinstance(origin, type) and issubclass(origin, collections.abc.Sequence):
        plain_items = bool(arguments) and arguments[0] in DESCRIPTIONS
        return f"a list of {describe_type(arguments[0])}" if plain_items else "a list"
    return getattr(origin, "__name__", str(origin))


def _split_type(expected: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without its arguments, and the arguments: `list[int]` becomes (list, (int,))."""
    return typing.get_origin(expected) or expected, typing.get_args(expected)


def _is_union(origin: Any) -> bool:
    return origin in (types.UnionType, typing.Union)


def _matches_plain_type(value: Any, expected: type) -> bool:
    if expected is bool:
        return isinstance(value, bool | int) and value in (0, 1)
    if expected is Path:
        return isinstance(value, str | Path)
    # bool is a subclass of int
    if expected in (int, float) and isinstance(value, bool):
        return False
    if expected is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, expected)


def _matches_sequence(value: Any, arguments: tuple[Any, ...]) -> bool:
    if isinstance(value, str) or not isinstance(value, collections.abc.Sequence):
        return False
    return not arguments or all(matches_type(item, arguments[0]) for item in value)


def _describe_union(options: tuple[Any, ...]) -> str:
    """Describe a union: the values of all its literals first, then its types."""
    values: list[Any] = []
    descriptions: list[str] = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            values += typing.get_args(option)
        elif not (option is int and float in options):  # "a finite number" covers both
            descriptions.append(describe_type(option))
    if values:
        descriptions.insert(0, describe_type(typing.Literal[tuple(values)]))
    return " or ".join(dict.fromkeys(descriptions))
