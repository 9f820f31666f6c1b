"""Figures: that they are written, show what they are given, and say where they cannot be written."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image

from evaluation.output.plots import Series, draw_bars, draw_curves
from evaluation.stats.intervals import Figure
from ldm.common.errors import UserError

CURVE = Series("Perfusion", [Figure(80, 79, 81, 9), Figure(70, 68, 72, 9)], [Figure(20, 19, 21, 9), Figure(24)],
               ["0.4", "0.9"])
POINT = Series("DreamBooth", [Figure(75)], [Figure(21)])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was asked of matplotlib."""
    asked: dict[str, list[Any]] = {}
    for name in ("errorbar", "bar", "axhline", "annotate"):
        true = getattr(Axes, name)

        def noted(self: Axes, *given: Any, name: str = name, true: Any = true, **more: Any) -> Any:
            asked.setdefault(name, []).append((given, more))
            return true(self, *given, **more)

        monkeypatch.setattr(Axes, name, noted)
    return asked


def test_curves_have_crosses_of_intervals(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    path = draw_curves(tmp_path / "deep" / "curve.png", [CURVE, POINT], "image similarity", "text similarity", "title")
    assert Image.open(path).format == "PNG" and min(Image.open(path).size) > 400
    ((across, up), more), _ = drawn["errorbar"]
    assert (across, up) == ([80, 70], [20, 24])
    assert more["xerr"] == [[1, 2], [1, 2]] and more["yerr"] == [[1, 0], [1, 0]]
    assert [given[0] for given, _ in drawn["annotate"]] == ["0.4", "0.9"]


def test_bars_may_be_missing_and_have_lines_to_compare_with(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    bars = {"one": {"both": Figure(60, 50, 70, 9), "any": Figure(90)}, "two": {"any": Figure(40)}}
    path = draw_bars(tmp_path / "bars.png", bars, "%", lines=[60.0])
    assert Image.open(path).format == "PNG" and drawn["axhline"][0][0] == (60.0,)
    both, some = ([*given[0]] for given, _ in drawn["bar"])
    assert both == [pytest.approx(-0.2)] and some == pytest.approx([0.2, 1.2])
    assert [given[1] for given, _ in drawn["bar"]] == [[60], [90, 40]]


def test_it_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw_curves(tmp_path / "file" / "curve.png", [POINT], "x", "y")
