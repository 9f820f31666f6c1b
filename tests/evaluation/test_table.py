"""Tables: lines of equal width, goals that are reached or missed, and what the CSV and JSON files hold."""
from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evaluation.output.file_names import slug
from evaluation.output.goals import GOAL_TABLE, GoalRow, write_results
from evaluation.output.table import MarkdownTable, write_csv
from evaluation.stats.intervals import Estimate

QUALITY = GoalRow("its category recognized", Estimate(91.0, 88.0, 94.0, 200), "%", 90,
                  ceilings={"known": Estimate(97.0, 95.0, 98.5, 512)})
SPEED = GoalRow("4 images", Estimate(15.0), "s", 15, at_most=True)


@pytest.mark.parametrize(("reached", "at_most", "met"), [(90.0, False, True), (89.9, False, False), (90.0, True, False),
                                                         (89.9, True, True)])
def test_at_least_includes_the_goal_and_under_excludes_it(reached: float, at_most: bool, met: bool) -> None:
    assert GoalRow("", Estimate(reached), "", 90, at_most).met is met


def test_cells_hold_estimate_goal_and_ceilings() -> None:
    assert QUALITY.cells() == ["its category recognized", "91.0 % (88.0 to 94.0)", "at least 90 %: yes",
                               "known 97.0 % (95.0 to 98.5)"]
    assert SPEED.cells() == ["4 images", "15.0 s", "under 15 s: no", "-"]


def test_all_lines_of_a_table_have_the_same_width() -> None:
    lines = [*GOAL_TABLE.header().splitlines(), GOAL_TABLE.line(QUALITY.cells()), GOAL_TABLE.line(SPEED.cells())]
    assert len({len(text) for text in lines}) == 1 and all(text.count("|") == 5 for text in lines)
    assert MarkdownTable(("a", "b"), (3, 1)).header() == "| a   | b |\n| --- | - |"


def test_results_are_written_as_csv_and_json(tmp_path: Path) -> None:
    write_results(tmp_path, [QUALITY, SPEED], {"seed": 1})
    first, second = csv.DictReader((tmp_path / "table.csv").open())
    assert (first["reached"], first["reached: low"], first["known"], first["met"]) == ("91.0", "88.0", "97.0", "True")
    assert (second["reached"], second["known"], second["met"]) == ("15.0", "", "False")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == {"seed": 1}
    assert [row["what"] for row in results["rows"]] == ["its category recognized", "4 images"]
    assert [row["met"] for row in results["rows"]] == [True, False]
    assert results["rows"][0]["ceilings"]["known"]["high"] == 98.5


def test_integers_stay_integers_in_a_column_with_gaps(tmp_path: Path) -> None:
    write_csv(tmp_path / "seeds.csv", [{"seed": 7, "text": 0.1 + 0.2}, {"text": None}], ["seed", "text"])
    assert (tmp_path / "seeds.csv").read_text().splitlines() == ["seed,text", "7,0.30000000000000004", ","]


def test_a_slug_is_part_of_a_file_name() -> None:
    assert slug("Custom Diffusion, bias 0.5 ") == "custom-diffusion-bias-0.5"
