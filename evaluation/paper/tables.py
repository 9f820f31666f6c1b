"""The table and the figure of a study."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from evaluation.metrics.registry import METRICS
from evaluation.output.plots import Series, plot_bars, plot_curves
from evaluation.paper.claims import PAIR_GOAL
from evaluation.paper.design import Study, Variant
from evaluation.paper.results import Results
from evaluation.stats.crossed import CellValues, estimate_means, estimate_paired_means
from evaluation.stats.intervals import Estimate


@dataclass(frozen=True)
class TableColumn:
    """A column of a study's table.

    Attributes:
        heading: what is measured.
        unit: unit of the numbers, if they have one.
        scale: factor from stored numbers to those in the table; used for costs.
    """

    heading: str
    unit: str = ""
    scale: float = 1.0

    @property
    def title(self) -> str:
        """The heading with the unit."""
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


# Kind of study -> CSV column or attribute of a cost -> column of the table.
COLUMNS = {
    "trade-off": {
        **{metric.name: TableColumn(metric.heading, metric.unit) for metric in METRICS},
        "attributes": TableColumn("attributes", "%"),
        "exact_match": TableColumn("exact match", "%"),
        "attributes_beside": TableColumn("attributes beside another", "%"),
        "own_kind": TableColumn("own kind beside another", "%"),
        "background_correct": TableColumn("background", "%"),
    },
    "pairs": {
        "attributes": TableColumn("attributes of both", "%"),
        "any_attributes": TableColumn("attributes of at least one", "%"),
        "super_categories": TableColumn("both super-categories", "%"),
    },
    "cost": {
        "size": TableColumn("file", "KB", 1e-3),
        "parameters": TableColumn("trained parameters", "thousand", 1e-3),
        "seconds": TableColumn("training", "CPU s"),
    },
}


@dataclass(frozen=True)
class TableRow:
    """A row of a study's table.

    Attributes:
        name: name of the curve or method.
        settings: settings that its concepts were used with; empty if as trained.
        estimates: column -> estimate; columns may be missing.
    """

    name: str
    settings: str
    estimates: Mapping[str, Estimate]


def make_table_rows(study: Study, results: Results) -> list[TableRow]:
    """Return a row for each variant, curve by curve, or for each method of a cost study."""
    if study.kind == "cost":
        return [TableRow(method.name, "", _median_costs(costs)) for method, costs in results.costs.items()]
    estimates: dict[Variant, dict[str, Estimate]] = {variant: {} for variant in study.variants}
    for name, column in COLUMNS[study.kind].items():
        cells = {variant: results.cells(variant, name) for variant in study.variants}
        measured = {variant: values for variant, values in cells.items() if values}
        for variant, estimate in _estimate_column(measured, column).items():
            estimates[variant][name] = estimate
    is_labeled = study.kind == "trade-off"
    return [TableRow(curve.name, variant.label if is_labeled else "", estimates[variant])
            for curve in study.curves for variant in curve.variants]


def format_markdown(study: Study, rows: Sequence[TableRow]) -> str:
    """Return the rows as a Markdown table.

    pandas would add two packages, pandas and tabulate, and a second of start-up time.
    """
    columns = COLUMNS[study.kind]
    headings = ["", "generated at", *(column.title for column in columns.values())]
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        cells = [row.estimates[name].text() if name in row.estimates else "-" for name in columns]
        lines.append([row.name, row.settings or "-", *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot_study(study: Study, rows: Sequence[TableRow], path: Path) -> Path:
    """Plot the study's figure to a PNG file."""
    return PLOTS[study.kind](study, rows, path)


def _median_costs(costs: Sequence[object]) -> dict[str, Estimate]:
    estimates = {}
    for name, column in COLUMNS["cost"].items():
        estimates[name] = Estimate(column.scale * median(getattr(cost, name) for cost in costs), count=len(costs))
    return estimates


def _estimate_column(measured: Mapping[Variant, CellValues], column: TableColumn) -> dict[Variant, Estimate]:
    if not measured:
        return {}
    # Intervals of paired means could leave the range of shares, 0 to 100 %.
    estimate: Callable[[Sequence[CellValues]], list[Estimate]] = (
        estimate_means if column.unit else estimate_paired_means)
    return dict(zip(measured, estimate(list(measured.values())), strict=True))


def _plot_tradeoff(study: Study, rows: Sequence[TableRow], path: Path) -> Path:
    series = []
    for curve in study.curves:
        points = [row.estimates for row in rows if row.name == curve.name]
        biases = [f"{variant.bias:g}" for variant in curve.variants if variant.bias is not None]
        series.append(Series(curve.name, [point["image"] for point in points], [point["text"] for point in points],
                             biases))
    return plot_curves(path, series, "image similarity", "text similarity", study.title)


def _plot_pairs(study: Study, rows: Sequence[TableRow], path: Path) -> Path:
    columns = COLUMNS["pairs"]
    groups = {row.name: {columns[name].heading: estimate for name, estimate in row.estimates.items()} for row in rows}
    return plot_bars(path, groups, "% of images", study.title, lines=[PAIR_GOAL])


def _plot_costs(study: Study, rows: Sequence[TableRow], path: Path) -> Path:
    groups = {column.title: {row.name: row.estimates[name] for row in rows}
              for name, column in COLUMNS["cost"].items()}
    return plot_bars(path, groups, "", study.title, logarithmic=True)


PLOTS: Mapping[str, Callable[[Study, Sequence[TableRow], Path], Path]] = {
    "trade-off": _plot_tradeoff, "pairs": _plot_pairs, "cost": _plot_costs}
