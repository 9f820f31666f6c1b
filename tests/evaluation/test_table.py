"""The table: what counts as reached, how lines look, and what is kept of them."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evaluation.output.table import Row, heading, line, write_results
from evaluation.stats.intervals import Figure

KIND = Row("its kind recognised", Figure(91.0, 88.0, 94.0, 200), "%", 90,
           ceilings={"known": Figure(97.0, 95.0, 98.5, 512)})
SPEED = Row("4 images", Figure(15.0), "s", 15, at_most=True)


@pytest.mark.parametrize(("reached", "at_most", "met"), [(90.0, False, True), (89.9, False, False), (90.0, True, False),
                                                         (89.9, True, True)])
def test_at_least_includes_the_goal_and_under_does_not(reached: float, at_most: bool, met: bool) -> None:
    assert Row("", Figure(reached), "", 90, at_most).met is met


def test_cells_say_what_is_reached_and_what_is_not() -> None:
    assert KIND.cells() == ["its kind recognised", "91.0 % (88.0 to 94.0)", "at least 90 %: yes",
                            "known 97.0 % (95.0 to 98.5)"]
    assert SPEED.cells() == ["4 images", "15.0 s", "under 15 s: no", "-"]


def test_all_lines_are_as_wide() -> None:
    lines = [*heading().splitlines(), line(KIND.cells()), line(SPEED.cells())]
    assert len({len(text) for text in lines}) == 1 and all(text.count("|") == 5 for text in lines)


def test_results_are_kept_as_csv_and_json(tmp_path: Path) -> None:
    write_results(tmp_path, [KIND, SPEED], {"seed": 1})
    first, second = csv.DictReader((tmp_path / "table.csv").open())
    assert (first["reached"], first["reached: low"], first["known"], first["met"]) == ("91.0", "88.0", "97.0", "True")
    assert (second["reached"], second["known"], second["met"]) == ("15.0", "", "False")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == {"seed": 1}
    assert [row["what"] for row in results["rows"]] == ["its kind recognised", "4 images"]
    assert [row["met"] for row in results["rows"]] == [True, False]
    assert results["rows"][0]["ceilings"]["known"]["high"] == 98.5
