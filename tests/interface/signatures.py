"""Read signatures that are written down as text, and compare them with those of functions."""
from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

REQUIRED = inspect.Parameter.empty
ANY_DEFAULT = ...


@dataclass(frozen=True)
class WrittenSignature:
    """A signature of the LDM family.

    Attributes:
        positional: names and defaults, in the order in which callers may give them.
        by_name: names and defaults that callers give by name.
        takes_more: whether any further keyword is accepted.
        takes_more_positional: whether any number of positional arguments is accepted.
    """

    positional: dict[str, Any]
    by_name: dict[str, Any]
    takes_more: bool
    takes_more_positional: bool


def parse_signature(text: str) -> WrittenSignature:
    """Parse "a, b=1, **kwargs; c=None": Python's own form, and after ";" what other members of the family add."""
    first, _, added = text.partition(";")
    arguments = _arguments(first)
    more = _arguments(added)
    required = [REQUIRED] * (len(arguments.args) - len(arguments.defaults))
    positional = dict(zip((a.arg for a in arguments.args), required + _values(arguments.defaults), strict=True))
    by_name = {a.arg: _value(default) for a, default in
               zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)}
    required = [REQUIRED] * (len(more.args) - len(more.defaults))
    by_name |= dict(zip((a.arg for a in more.args), required + _values(more.defaults), strict=True))
    return WrittenSignature(positional, by_name, arguments.kwarg is not None, arguments.vararg is not None)


def _arguments(text: str) -> ast.arguments:
    return ast.parse(f"lambda {text}: 0", mode="eval").body.args  # type: ignore[attr-defined]


def _values(nodes: list[ast.expr]) -> list[Any]:
    return [_value(node) for node in nodes]


def _value(node: ast.expr | None) -> Any:
    return REQUIRED if node is None else ast.literal_eval(node)


def differences(written: WrittenSignature, function: Callable[..., Any], is_method: bool) -> Iterator[str]:
    """Yield what callers of the family would miss of `function`, one line each.

    More of ours is allowed: parameters with defaults after the family's, and defaults where the family has none.
    """
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0:]
    by_name = {p.name: p for p in parameters}
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepts_positional = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    for name, default in {**written.positional, **written.by_name}.items():
        if name not in by_name:
            if not accepts_all:
                yield f"{name} is missing"
        elif default not in (ANY_DEFAULT, REQUIRED) and not _equal(default, by_name[name].default):
            yield f"{name} has the default {by_name[name].default!r}, not {default!r}"
    ours = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = list(written.positional)
    if ours[:len(theirs)] != theirs and not (accepts_positional and ours == theirs[:len(ours)]):
        yield f"positional parameters begin with {ours[:len(theirs)]}, not with {theirs}"
    yield from _missing_freedom(written, accepts_all, accepts_positional, function.__name__ == "__init__")
    for p in parameters:
        if p.default is REQUIRED and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) \
                and p.name not in {**written.positional, **written.by_name}:
            yield f"{p.name} is required, and the family does not know it"


def _missing_freedom(written: WrittenSignature, accepts_all: bool, accepts_positional: bool, is_constructor: bool
                     ) -> Iterator[str]:
    """Yield a line where ours accepts less. Constructors of ours refuse unknown keywords on purpose."""
    if written.takes_more and not accepts_all and not is_constructor:
        yield "further keywords are not accepted"
    if written.takes_more_positional and not accepts_positional and not is_constructor:
        yield "further positional arguments are not accepted"


def _equal(written: Any, found: Any) -> bool:
    """Return whether two defaults are equal; a tuple stands for a list, so that a default cannot be changed."""
    return written == (list(found) if isinstance(written, list) and isinstance(found, tuple) else found)
