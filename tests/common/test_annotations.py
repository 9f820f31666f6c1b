from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from torch import nn

from ldm.common.annotations import describe_type, matches_type, parameter_types


@pytest.mark.parametrize(("kind", "good", "bad"), [
    (int, (3, -1), ("3", 3.0, True, None, [3])),
    (float, (3, 0.5), ("3", float("nan"), float("inf"), True, None)),
    (bool, (True, False, 0, 1), (2, "true", None, [])),
    (str, ("", "x"), (3, None, ["x"])),
    (str | Path | None, ("x", Path("x"), None), (3, ["x"])),
    (Optional[int], (3, None), ("3",)),  # noqa: UP045 - as Lightning writes it
    (Sequence[int], ([1, 2], (1,), []), ("12", 3, [1, "2"], None, {1: 2})),
    (tuple[int, ...], ([1, 2],), ([1.5],)),
    (str | Sequence[str], ("x", ["x"]), (3, [3])),
    (Mapping[str, Any], ({"a": 1}, {}), ([], "a", 3, None)),
    (Literal["a", 16] | None, ("a", 16, None), ("b", 17)),
    (nn.Module, (nn.Identity(),), ("x", 3, None)),
    (Any, ("x", 3, None, []), ()),
])
def test_values_match_types(kind: Any, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    assert all(matches_type(value, kind) for value in good)
    assert not any(matches_type(value, kind) for value in bad)


@pytest.mark.parametrize(("kind", "words"), [
    (int | None, "a whole number or null"), (int | float, "a finite number"), (Sequence[str], "a list of text"),
    (Mapping[str, Any], "keys with values"), (Literal[1] | Literal["1", "x"], "one of 1, x"), (nn.Module, "Module"),
])
def test_descriptions_of_types(kind: Any, words: str) -> None:
    assert describe_type(kind) == words


def test_unreadable_annotations_give_no_types() -> None:
    def function(value: Missing) -> None:  # noqa: F821 - the point of it
        """Has an annotation that does not exist."""

    assert parameter_types(function) == {}
    assert parameter_types(matches_type)["value"] is Any
