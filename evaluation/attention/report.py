"""The results of a run: a figure, a CSV and a JSON file, and a line for each case."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.attention.cases import AttentionCase
from evaluation.attention.figure import AttentionRow, attention_figure
from evaluation.attention.masked_attention import COLUMNS, MaskedAttention, attention_records, estimate_attention
from evaluation.attention.settings import AttentionOptions
from evaluation.output.table import write_csv
from ldm.common.atomic_write import write_atomically
from ldm.inference.output_folder import OutputFolder


def write_report(options: AttentionOptions, cases: Sequence[AttentionCase], rows: Sequence[Sequence[AttentionRow]]
                 ) -> list[Path]:
    """Write the figure of the first rows of each case, and the numbers of all rows as CSV and JSON; return the paths.

    Args:
        options: options of the script.
        cases: in the order of the figure.
        rows: rows of each case.
    """
    shown = [replace(row, notes=_row_notes(row, case_rows))
             for case_rows in rows for row in case_rows[:options.shown]]
    title = f"Attention to “{cases[-1].word}” in “{options.prompt}”"
    figure_file = OutputFolder(options.generation.outdir, columns=1).add_extra(
        "attention_maps", attention_figure(shown, title))
    csv_file, json_file = figure_file.with_suffix(".csv"), figure_file.with_suffix(".json")

    records, summaries = [], []
    for case, case_rows in zip(cases, rows, strict=True):
        records += attention_records(case.name, _measured(case_rows))
        summaries.append(_summarize(case, case_rows))
    write_csv(csv_file, records, COLUMNS)
    text = json.dumps({"mask": options.mask, "cases": summaries, "rows": records}, indent=1) + "\n"
    write_atomically(json_file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [figure_file, csv_file, json_file]


def describe_case(case: AttentionCase, rows: Sequence[AttentionRow]) -> str:
    """Return the numbers of a case in one line."""
    measured = _measured(rows)
    if not measured:
        return f"{case.name}: no {case.subject} was found in any image, so nothing is measured"
    area, attention, share, ratio = estimate_attention(measured)
    return (f"{case.name}: {case.word} gets {attention.text('%')} of all attention; {share.text('%')} of that lies "
            f"inside the mask, which covers {area.mean:.1f} % of the image: {ratio.mean:.2f} times uniform attention; "
            f"{len(measured)} of {len(rows)} images")


def _measured(rows: Sequence[AttentionRow]) -> list[MaskedAttention]:
    """Return the measurements of the images in which the object was found."""
    return [row.measured for row in rows if row.measured is not None]


def _summarize(case: AttentionCase, rows: Sequence[AttentionRow]) -> dict[str, Any]:
    """Return how the images of a case were generated, and what each shows over all layers and steps, in %."""
    images = []
    for request, row in zip(case.run.requests, rows, strict=True):
        summary: dict[str, Any] = {"seed": request.seed}
        if row.measured is not None:
            summary |= {"area": 100 * row.measured.area, "attention": 100 * row.measured.attention(),
                        "share": 100 * row.measured.share()}
        images.append(summary)
    return {"label": case.name, "word": case.word, "subject": case.subject, "prompt": case.prompt,
            **case.run.metadata, "images": images}


def _row_notes(row: AttentionRow, rows: Sequence[AttentionRow]) -> str:
    """Return the notes of a shown image: its own, and the means over all images of its case."""
    measured = _measured(rows)
    if not measured:
        return row.notes
    _, attention, share, ratio = estimate_attention(measured)
    interval = f" ({share.low:.0f} to {share.high:.0f}), {len(measured)} seeds" if len(measured) > 1 else ""
    return (f"{row.notes}\n{attention.mean:.1f} % of all attention\n{share.mean:.0f} % inside{interval}\n"
            f"{ratio.mean:.1f} × uniform")
