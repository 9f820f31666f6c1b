"""Print rows of the comparison, as text or as Markdown."""
from __future__ import annotations

from collections.abc import Sequence

from public_scripts.compare import Row

WORDS = {True: "yes", False: "no", None: "-"}


def difference(row: Row) -> str:
    """Return the greatest and the mean difference of pixels."""
    if row.max_difference is None:
        return "-"
    return f"{row.max_difference:.0f} ({row.mean_difference:.2g})"


def text_line(row: Row) -> str:
    """Return a row as a line of text."""
    return (f"{'ok ' if row.agrees else 'NOT'} {row.name:<40} ours {WORDS[row.ours]:<4} "
            f"original {WORDS[row.original]:<4} max (mean) {difference(row):<14} {row.remark}").rstrip()


def markdown_table(rows: Sequence[Row]) -> str:
    """Return rows as a table in Markdown."""
    lines = ["| run | ours | original | max (mean) difference of 255 | remark |", "|---|---|---|---|---|"]
    return "\n".join(lines + [
        f"| {row.name} | {WORDS[row.ours]} | {WORDS[row.original]} | {difference(row)} | {row.remark or ' '} |"
        for row in rows])
