"""What a study found, to be read: its table, its figure, and a summary of all of them with the paper's statements."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from evaluation.output.plots import Series, plot_bars, plot_curves
from evaluation.paper.claims import FEWEST_CONCEPTS, MARGIN, TOGETHER, Found, Verdict, verdicts
from evaluation.paper.studies import Setting, Study
from evaluation.stats.crossed import figures, paired
from evaluation.stats.intervals import Estimate
from ldm.common.files import write_atomically

MEASURES = {  # column -> its heading and its unit
    "trade-off": {"text": ("text similarity", ""), "image": ("image similarity", ""),
                  "object": ("object similarity", ""), "own": ("its marks", "%"), "itself": ("its very drawing", "%"),
                  "there": ("place", "%")},
    "pairs": {"own": ("both, with their marks", "%"), "one": ("at least one with its marks", "%"),
              "kinds": ("both kinds", "%")},
    "cost": {"size": ("file", "KB"), "parameters": ("trained numbers", "thousand"), "seconds": ("teaching", "CPU s")}}
SCALES = {"size": 1e-3, "parameters": 1e-3, "seconds": 1.0}  # of what costs are counted in
RULE = f"""Verdicts: *seen* where the 95 % interval of what a statement says to be positive lies above 0, *not seen*
where it lies below 0 or, on both sides of it, within {MARGIN:g}, too near to matter, *not decidable here* otherwise and
on fewer than {FEWEST_CONCEPTS} concepts; a step back between neighbouring biases counts where it is surely more than
{MARGIN:g}. The whole rule is in `evaluation/paper/claims.py`. Intervals speak of other concepts, each taught once, and of
other prompts: both are resampled, apart from each other, and of a pair both its concepts. They say nothing of other
base models. Intervals of similarities are for comparing the rows of one table: what a prompt of a concept contributes
to all rows alike is taken out of them."""
COST_NOTE = """Medians over concepts. Seconds are the processor's, of all cores together, in whole runs of `main.py`, on
{where}. Pictures for prior preservation are drawn once for all methods; they count for the run that comes first."""


@dataclass(frozen=True)
class Line:
    """A row of a table: what was drawn or taught how, and what was measured, by the measure's column."""

    name: str
    setting: str
    figures: Mapping[str, Estimate]


@dataclass
class Report:
    """All that is known so far; written after each study.

    Attributes:
        folder: gets `<study>.md` and `<study>.png` for each, `summary.md` and `results.json`.
        settings: what everything was made with.
        ceilings: what the recogniser of marks reaches on real scenes.
    """

    folder: Path
    settings: Mapping[str, Any]
    ceilings: Mapping[str, Estimate] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    lines: dict[str, list[Line]] = field(default_factory=dict)

    def add(self, study: Study, found: Found) -> list[Verdict]:
        """Writes table and figure of a study, and the summary anew; returns what is to be said."""
        lines, said = lines_of(study, found), list(verdicts(study, found))
        draw(study, lines, self.folder / f"{study.key}.png")
        table = markdown(study, lines)
        listed = "".join(f"- **{one.verdict}**: {one.statement}: {one.numbers}\n" for one in said)
        figure = f"![{study.title}]({study.key}.png)"
        self.sections[study.key] = f"## {study.title}\n\n{table}\n{note_of(study, found)}{figure}\n\n{listed}"
        self.lines[study.key] = lines
        self.verdicts += said
        _write_text(self.folder / f"{study.key}.md", self.sections[study.key])
        self.write()
        return said

    def write(self) -> None:
        """The summary, and everything as JSON."""
        overview = "".join(f"| {one.statement} | {one.verdict} | {one.numbers} |\n" for one in self.verdicts)
        ceilings = "".join(f"- {name}: {figure.text('%')}\n" for name, figure in self.ceilings.items())
        made = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        parts = ["# The paper's comparisons on this base model\n", f"Made with: {made}.\n",
                 f"| statement | verdict | numbers |\n|---|---|---|\n{overview}\n{RULE}\n",
                 *self.sections.values(),
                 f"## The recogniser of marks, on real scenes\n\n{ceilings}" if ceilings else ""]
        _write_text(self.folder / "summary.md", "\n".join(parts))
        whole = {"settings": dict(self.settings), "verdicts": [asdict(one) for one in self.verdicts],
                 "studies": {key: [asdict(line) for line in lines] for key, lines in self.lines.items()},
                 "ceilings": {name: asdict(figure) for name, figure in self.ceilings.items()}}
        _write_text(self.folder / "results.json", json.dumps(whole, indent=1, default=str) + "\n")


def lines_of(study: Study, found: Found) -> list[Line]:
    """A line for each setting, curve by curve."""
    if study.kind == "cost":
        return [Line(method.name, "", {name: Estimate(factor * median(getattr(cost, name) for cost in costs),
                                                    count=len(costs)) for name, factor in SCALES.items()})
                for method, costs in found.costs.items()]
    measured: dict[Setting, dict[str, Estimate]] = {setting: {} for setting in study.settings}
    for measure, (_, unit) in MEASURES[study.kind].items():
        there = {setting: cells for setting in study.settings if (cells := found.cells(setting, measure))}
        made = figures if unit else paired  # shares have to stay in 0 to 100
        for setting, figure in zip(there, made(list(there.values())) if there else (), strict=True):
            measured[setting][measure] = figure
    return [Line(curve.name, setting.label if study.kind == "trade-off" else "", measured[setting])
            for curve in study.curves for setting in curve.settings]


def note_of(study: Study, found: Found) -> str:
    """What has to be known to read the table; nothing of most."""
    if study.kind != "cost":
        return ""
    where = " and ".join(dict.fromkeys(cost.where for costs in found.costs.values() for cost in costs))
    return f"{COST_NOTE.format(where=where)}\n\n"


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """The lines as a Markdown table."""
    measures = MEASURES[study.kind]
    headings = ["", "drawn at", *(f"{heading}, {unit}" if unit else heading for heading, unit in measures.values())]
    rows = [[line.name, line.setting or "-", *(line.figures[name].text() if name in line.figures else "-"
                                               for name in measures)] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, ["---"] * len(headings), *rows))


def draw(study: Study, lines: Sequence[Line], path: Path) -> Path:
    """The study's figure."""
    measures = MEASURES[study.kind]
    if study.kind == "trade-off":
        series = []
        for curve in study.curves:
            own = [line for line in lines if line.name == curve.name]
            biases = [f"{setting.bias:g}" for setting in curve.settings if setting.bias is not None]
            series.append(Series(curve.name, [line.figures["image"] for line in own],
                                 [line.figures["text"] for line in own], biases))
        return plot_curves(path, series, "image similarity", "text similarity", study.title)
    if study.kind == "pairs":
        bars = {line.name: {measures[name][0]: figure for name, figure in line.figures.items()} for line in lines}
        return plot_bars(path, bars, "% of pictures", study.title, lines=[TOGETHER])
    bars = {", ".join(measures[name]): {line.name: line.figures[name] for line in lines} for name in measures}
    return plot_bars(path, bars, "", study.title, logarithmic=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
