"""Measurements beside their goals: printed as a table, and kept as CSV and JSON."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.output.table import MarkdownTable, write_csv
from evaluation.stats.intervals import Estimate
from ldm.common.atomic_write import write_atomically

GOAL_TABLE = MarkdownTable(
    ("what", "reached (95 % interval)", "goal", "the recognizer's ceiling on real scenes"), (58, 26, 26, 64))


@dataclass(frozen=True)
class GoalRow:
    """One measurement beside its goal.

    Attributes:
        what: what is measured, in words.
        reached: the measurement, in `unit`.
        goal: `reached` has to be at least this, or less than this if `at_most`.
        ceilings: what the same recognizer reaches on real scenes, by the kind of scenes.
    """

    what: str
    reached: Estimate
    unit: str
    goal: float
    at_most: bool = False
    ceilings: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.reached.mean < self.goal if self.at_most else self.reached.mean >= self.goal

    def cells(self) -> list[str]:
        """Return the four cells of the row in `GOAL_TABLE`."""
        goal = f"{'under' if self.at_most else 'at least'} {self.goal:g} {self.unit}"
        ceilings = ", ".join(f"{kind} {estimate.text(self.unit)}" for kind, estimate in self.ceilings.items())
        return [self.what, self.reached.text(self.unit), f"{goal}: {'yes' if self.met else 'no'}", ceilings or "-"]

    def record(self) -> dict[str, Any]:
        """Return the row for a CSV file, with a column for each number of each estimate."""
        record = {"what": self.what, "unit": self.unit, "goal": self.goal, "at_most": self.at_most, "met": self.met}
        for name, estimate in {"reached": self.reached, **self.ceilings}.items():
            for key, value in asdict(estimate).items():
                record[name if key == "mean" else f"{name}: {key}"] = value
        return record


def write_results(folder: Path, rows: Sequence[GoalRow], settings: Mapping[str, Any]) -> None:
    """Write `table.csv`, and `results.json` with the settings of the measurement; both atomically."""
    records = [row.record() for row in rows]
    columns = list(dict.fromkeys(column for record in records for column in record))
    write_csv(folder / "table.csv", records, columns)
    results = {"settings": dict(settings), "rows": [{**asdict(row), "met": row.met} for row in rows]}
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(folder / "results.json", lambda temporary: temporary.write_text(text))
