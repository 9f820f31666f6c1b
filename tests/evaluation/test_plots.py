"""Plots and image grids: what matplotlib gets, what the files show, and the error if a file cannot be written."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from evaluation.output.image_grid import ColumnHeading, save_image_grid
from evaluation.output.plots import Series, plot_bars, plot_curves
from evaluation.stats.intervals import Estimate
from ldm.common.errors import UserError

CURVE = Series("Perfusion", [Estimate(80, 79, 81, 9), Estimate(70, 68, 72, 9)],
               [Estimate(20, 19, 21, 9), Estimate(24)], ["0.4", "0.9"])
POINT = Series("DreamBooth", [Estimate(75)], [Estimate(21)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The arguments of all calls of some methods of `Axes`, by the method's name."""
    recorded: dict[str, list[Any]] = {}
    for name in ("errorbar", "bar", "axhline", "annotate"):
        method = getattr(Axes, name)

        def record(self: Axes, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            recorded.setdefault(name, []).append((args, kwargs))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Axes, name, record)
    return recorded


def test_curves_have_crosses_of_intervals(tmp_path: Path, calls: dict[str, list[Any]]) -> None:
    path = plot_curves(tmp_path / "deep" / "curve.png", [CURVE, POINT], "image similarity", "text similarity", "title")
    assert Image.open(path).format == "PNG" and min(Image.open(path).size) > 400
    ((x, y), options), _ = calls["errorbar"]
    assert (x, y) == ([80, 70], [20, 24])
    assert options["xerr"] == [[1, 2], [1, 2]] and options["yerr"] == [[1, 0], [1, 0]]
    assert [args[0] for args, _ in calls["annotate"]] == ["0.4", "0.9"]


def test_groups_may_lack_bars_and_have_lines_to_compare_with(tmp_path: Path, calls: dict[str, list[Any]]) -> None:
    groups = {"one": {"both": Estimate(60, 50, 70, 9), "any": Estimate(90)}, "two": {"any": Estimate(40)}}
    path = plot_bars(tmp_path / "bars.png", groups, "%", lines=[60.0])
    assert Image.open(path).format == "PNG" and calls["axhline"][0][0] == (60.0,)
    both, some = ([*args[0]] for args, _ in calls["bar"])
    assert both == [pytest.approx(-0.2)] and some == pytest.approx([0.2, 1.2])
    assert [args[1] for args, _ in calls["bar"]] == [[60], [90, 40]]


def test_an_image_grid_has_a_tile_for_every_row_and_column(tmp_path: Path) -> None:
    colors = [["red", "lime"], ["blue", "yellow"], ["cyan", "magenta"]]
    images = [[Image.new("RGB", (16, 8), color) for color in row] for row in colors]
    path = save_image_grid(tmp_path / "grid.png", images, ["a", "b", "a prompt that is longer than a line"],
                           [ColumnHeading("x", "1"), ColumnHeading("y", "2", bold=True)], "title")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    tiles = {color: np.argwhere((pixels == np.array(Image.new("RGB", (1, 1), color))[0]).all(2))
             for row in colors for color in row}
    height, width = np.ptp(tiles["red"], axis=0) + 1
    centers = {color: positions.mean(0) for color, positions in tiles.items()}
    for left, right in colors:
        assert centers[left][0] == pytest.approx(centers[right][0], abs=1)
        assert centers[right][1] - centers[left][1] > width
    assert width == pytest.approx(2 * height, abs=2) and len(tiles["red"]) == height * width


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plot_curves(tmp_path / "file" / "curve.png", [POINT], "x", "y")
