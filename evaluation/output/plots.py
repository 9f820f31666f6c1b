"""Figures with intervals: curves of one measure against another, and bars. No window is opened; files are PNG."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from evaluation.stats.intervals import Figure
from ldm.common.files import write_atomically

INCHES = (6.4, 4.4)
DOTS_PER_INCH = 150
FAINT = 0.45  # opacity of intervals and grids
COLOURS = tuple(matplotlib.colormaps["tab10"].colors)
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Series:
    """A curve, or a single point.

    Attributes:
        across, up: (x, y) of each point with intervals, in the order in which they are joined.
        labels: a few letters beside each point, such as the value that was swept.
    """

    name: str
    across: Sequence[Figure]
    up: Sequence[Figure]
    labels: Sequence[str] = ()


def draw_curves(path: str | Path, series: Sequence[Series], across: str, up: str, title: str = "") -> Path:
    """A line with crosses of intervals for each series; `across` and `up` name the axes.

    Raises:
        UserError: the file cannot be written.
    """
    def draw(axes: Axes) -> None:
        for number, one in enumerate(series):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            places = [[figure.mean for figure in figures] for figures in (one.across, one.up)]
            errors = [_errors(figures) for figures in (one.across, one.up)]
            axes.errorbar(*places, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=colour, alpha=FAINT, linewidth=1)
            axes.plot(*places, color=colour, marker=marker, markersize=5, label=one.name)
            for x, y, text in zip(*places, one.labels, strict=False):
                axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=FAINT / 2)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _write(path, draw, title)


def draw_bars(path: str | Path, bars: dict[str, dict[str, Figure]], up: str, title: str = "",
              logarithmic: bool = False, lines: Sequence[float] = ()) -> Path:
    """Groups of bars with intervals: group -> name of the bar -> its height; a group may lack some.

    Args:
        up: names the axis.
        lines: heights to compare with.

    Raises:
        UserError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for group in bars.values() for name in group))

    def draw(axes: Axes) -> None:
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            there = [(place, group[name]) for place, group in enumerate(bars.values()) if name in group]
            places = [place + (number - (len(names) - 1) / 2) * width for place, _ in there]
            figures = [figure for _, figure in there]
            axes.bar(places, [figure.mean for figure in figures], width, yerr=_errors(figures), capsize=2, label=name,
                     color=COLOURS[number % len(COLOURS)], error_kw={"alpha": 0.7, "linewidth": 1})
        for height in lines:
            axes.axhline(height, color="grey", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(bars)), bars, fontsize=8, rotation=15, ha="right")
        axes.set_ylabel(up)
        if logarithmic:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=8)

    return _write(path, draw, title)


def _errors(figures: Sequence[Figure]) -> list[list[float]]:
    """How far each interval reaches down and up from its mean; nowhere where there is none."""
    down = [0.0 if figure.low is None else max(0.0, figure.mean - figure.low) for figure in figures]
    return [down, [0.0 if figure.high is None else max(0.0, figure.high - figure.mean) for figure in figures]]


def _write(path: str | Path, draw: Callable[[Axes], None], title: str) -> Path:
    canvas = Canvas(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = canvas.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10)
    return write_atomically(path, lambda aside: canvas.savefig(aside, format="png"))
