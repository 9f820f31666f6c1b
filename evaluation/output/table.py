"""The table of a measurement: printed row by row as it grows, and kept as CSV and JSON."""
from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.stats.intervals import Figure
from ldm.common.files import write_atomically

HEADINGS = ("what", "reached (95 % interval)", "goal", "recogniser's ceiling on real scenes")
WIDTHS = (58, 26, 26, 64)


@dataclass(frozen=True)
class Row:
    """One figure beside its goal.

    Attributes:
        what: the figure in words.
        reached: what was measured, in `unit`.
        goal: at least this much, or less than this where `at_most`.
        ceilings: what the same recogniser reaches on real pictures, by the kind of picture.
    """

    what: str
    reached: Figure
    unit: str
    goal: float
    at_most: bool = False
    ceilings: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        return self.reached.mean < self.goal if self.at_most else self.reached.mean >= self.goal

    def cells(self) -> list[str]:
        """The row's four cells as text."""
        goal = f"{'under' if self.at_most else 'at least'} {self.goal:g} {self.unit}"
        ceilings = ", ".join(f"{kind} {figure.text(self.unit)}" for kind, figure in self.ceilings.items())
        return [self.what, self.reached.text(self.unit), f"{goal}: {'yes' if self.met else 'no'}", ceilings or "-"]


def line(cells: Sequence[str], widths: Sequence[int] = WIDTHS) -> str:
    """One line of a Markdown table, its columns as wide as those of every other line."""
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def heading(headings: Sequence[str] = HEADINGS, widths: Sequence[int] = WIDTHS) -> str:
    return f"{line(headings, widths)}\n{line(['-' * width for width in widths], widths)}"


def write_results(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Writes `table.csv`, and `results.json` with the settings of the measurement; both are whole at any time."""
    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(key for record in flat for key in record))
    write_csv(folder / "table.csv", flat, columns)
    whole = {"settings": dict(settings), "rows": [{**asdict(row), "met": row.met} for row in rows]}
    write_atomically(folder / "results.json", lambda aside: aside.write_text(json.dumps(whole, indent=1) + "\n"))


def write_csv(path: Path, records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes records as CSV; what a record lacks stays empty."""
    def write(aside: Path) -> None:
        with aside.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(records)

    write_atomically(path, write)


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    yield from (("what", row.what), ("unit", row.unit), ("goal", row.goal), ("at_most", row.at_most), ("met", row.met))
    for name, figure in {"reached": row.reached, **row.ceilings}.items():
        yield from ((f"{name}: {key}" if key != "mean" else name, value) for key, value in asdict(figure).items())
