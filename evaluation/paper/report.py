"""The report of all studies: a table and a figure for each, and a summary with the claims."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.paper.claims import ClaimCheck, check_claims
from evaluation.paper.decisions import MARGIN, MIN_CONCEPTS
from evaluation.paper.design import Study
from evaluation.paper.results import Results
from evaluation.paper.tables import TableRow, format_markdown, make_table_rows, plot_study
from evaluation.stats.intervals import Estimate
from ldm.common.atomic_write import write_atomically

RULE = f"""A claim is expressed as a number that is positive if the claim is true. It is *supported* if the 95 %
interval of this number lies above 0. It is *not supported* if the interval lies below 0, or within {MARGIN:g} on both
sides of 0, too small to matter. Otherwise, and with fewer than {MIN_CONCEPTS} concepts, it is *inconclusive*. A step
back between neighboring biases counts if it is larger than {MARGIN:g} beyond doubt. `evaluation/paper/decisions.py` has
the complete rule. Intervals generalize to other concepts, each trained once, and to other prompts: both are resampled
independently, and so are the two concepts of a pair. They say nothing about other base models. Intervals of
similarities serve to compare the rows of one table: what a prompt of a concept contributes to all rows is removed from
them."""
COST_NOTE = """Medians over concepts. Seconds are processor time, summed over all cores, of whole runs of `main.py`, on
{machine}. Images for prior preservation are generated once for all methods; they count for the run that comes first."""


@dataclass
class Report:
    """Everything that is known so far; written after each study.

    Attributes:
        folder: gets `<study>.md` and `<study>.png` for each study, `summary.md` and `results.json`.
        settings: what everything was made with.
        ceilings: accuracy of recognizing attributes and kinds on real scenes.
        sections: Markdown of each study.
        claims: checked claims of all studies.
        tables: rows of each study's table.
    """

    folder: Path
    settings: Mapping[str, Any]
    ceilings: Mapping[str, Estimate] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    claims: list[ClaimCheck] = field(default_factory=list)
    tables: dict[str, list[TableRow]] = field(default_factory=dict)

    def add(self, study: Study, results: Results) -> list[ClaimCheck]:
        """Write a study's table and figure, and update the summary; return the study's claims."""
        rows, claims = make_table_rows(study, results), list(check_claims(study, results))
        plot_study(study, rows, self.folder / f"{study.key}.png")
        listed = "".join(f"- **{claim.outcome}**: {claim.claim}: {claim.evidence}\n" for claim in claims)
        figure = f"![{study.title}]({study.key}.png)"
        self.sections[study.key] = (f"## {study.title}\n\n{format_markdown(study, rows)}\n{_note(study, results)}"
                                    f"{figure}\n\n{listed}")
        self.tables[study.key] = rows
        self.claims += claims
        _write_text(self.folder / f"{study.key}.md", self.sections[study.key])
        self.write()
        return claims

    def write(self) -> None:
        """Write `summary.md` and `results.json`."""
        _write_text(self.folder / "summary.md", self._summary())
        results = {
            "settings": dict(self.settings),
            "claims": [asdict(claim) for claim in self.claims],
            "studies": {key: [asdict(row) for row in rows] for key, rows in self.tables.items()},
            "ceilings": {name: asdict(estimate) for name, estimate in self.ceilings.items()},
        }
        _write_text(self.folder / "results.json", json.dumps(results, indent=1, default=str) + "\n")

    def _summary(self) -> str:
        settings = ", ".join(f"{name} {_format_setting(value)}" for name, value in self.settings.items())
        claims = "".join(f"| {claim.claim} | {claim.outcome} | {claim.evidence} |\n" for claim in self.claims)
        parts = ["# The paper's comparisons on this base model\n", f"Made with: {settings}.\n",
                 f"| claim | outcome | evidence |\n|---|---|---|\n{claims}\n{RULE}\n", *self.sections.values()]
        if self.ceilings:
            listed = "".join(f"- {name}: {estimate.text('%')}\n" for name, estimate in self.ceilings.items())
            parts.append(f"## Accuracy of recognizing attributes and kinds, on real scenes\n\n{listed}")
        return "\n".join(parts)


def _format_setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _note(study: Study, results: Results) -> str:
    """Return what a reader of the table has to know; empty for most studies."""
    if study.kind != "cost":
        return ""
    machines = dict.fromkeys(cost.machine for costs in results.costs.values() for cost in costs)
    return f"{COST_NOTE.format(machine=' and '.join(machines))}\n\n"


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
