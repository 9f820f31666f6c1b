"""Plots with confidence intervals, as PNG files: one metric against another, and bars. Opens no window."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.stats.intervals import Estimate
from ldm.common.atomic_write import write_atomically

SIZE_INCHES = (6.4, 4.4)
DPI = 150
INTERVAL_ALPHA, GRID_ALPHA = 0.45, 0.225
COLORS = tuple(matplotlib.colormaps["tab10"].colors)
MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Series:
    """A curve, or a single point.

    Attributes:
        name: stands in the legend.
        x, y: coordinates of each point, in the order in which the points are joined.
        labels: a few letters beside each point, such as the value that was swept.
    """

    name: str
    x: Sequence[Estimate]
    y: Sequence[Estimate]
    labels: Sequence[str] = ()


def plot_curves(path: str | Path, series: Sequence[Series], x_label: str, y_label: str, title: str = "") -> Path:
    """Plot a line for each series, with a cross of intervals at each point.

    Raises:
        UserError: the file cannot be written.
    """
    def plot(axes: Axes) -> None:
        for index, one in enumerate(series):
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            x, y = _means(one.x), _means(one.y)
            axes.errorbar(x, y, xerr=_errors(one.x), yerr=_errors(one.y), fmt="none", ecolor=color,
                          alpha=INTERVAL_ALPHA, linewidth=1)
            axes.plot(x, y, color=color, marker=marker, markersize=5, label=one.name)
            for label, *point in zip(one.labels, x, y, strict=False):
                axes.annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=GRID_ALPHA)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _save(path, plot, title)


def plot_bars(path: str | Path, groups: dict[str, dict[str, Estimate]], y_label: str, title: str = "",
              logarithmic: bool = False, lines: Sequence[float] = ()) -> Path:
    """Plot groups of bars with intervals.

    Args:
        groups: name of the group -> name of the bar -> its height. A group may lack some bars.
        lines: heights of horizontal lines to compare the bars with.

    Raises:
        UserError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)

    def plot(axes: Axes) -> None:
        for index, name in enumerate(names):
            offset = (index - (len(names) - 1) / 2) * width
            present = [(position, group[name]) for position, group in enumerate(groups.values()) if name in group]
            positions = [position + offset for position, _ in present]
            estimates = [estimate for _, estimate in present]
            axes.bar(positions, _means(estimates), width, yerr=_errors(estimates), capsize=2, label=name,
                     color=COLORS[index % len(COLORS)], error_kw={"alpha": 0.7, "linewidth": 1})
        for height in lines:
            axes.axhline(height, color="grey", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(groups)), groups, fontsize=8, rotation=15, ha="right")
        axes.set_ylabel(y_label)
        if logarithmic:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(fontsize=8)

    return _save(path, plot, title)


def _means(estimates: Sequence[Estimate]) -> list[float]:
    return [estimate.mean for estimate in estimates]


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return how far each interval reaches down and up from its mean; 0 if there is no interval."""
    down = [0.0 if one.low is None else max(0.0, one.mean - one.low) for one in estimates]
    up = [0.0 if one.high is None else max(0.0, one.high - one.mean) for one in estimates]
    return [down, up]


def _save(path: str | Path, plot: Callable[[Axes], None], title: str) -> Path:
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    axes.set_title(title, fontsize=10)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
