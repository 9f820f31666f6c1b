"""Tables: Markdown that is printed line by line while results come in, and CSV files."""
from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.common.atomic_write import write_atomically


@dataclass(frozen=True)
class MarkdownTable:
    """A Markdown table with columns of fixed width, so that it also reads well on a screen.

    Attributes:
        headings: one for each column.
        widths: widths of the columns, in characters; longer cells stick out.
    """

    headings: Sequence[str]
    widths: Sequence[int]

    def header(self) -> str:
        """Return the first two lines: the headings, and the dashes below them."""
        return f"{self.line(self.headings)}\n{self.line(['-' * width for width in self.widths])}"

    def line(self, cells: Sequence[str]) -> str:
        """Return one line."""
        padded = [cell.ljust(width) for cell, width in zip(cells, self.widths, strict=True)]
        return f"| {' | '.join(padded)} |"


def write_csv(path: Path, records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write records as CSV, atomically; values that a record lacks stay empty.

    The csv module does this better than pandas: integers stay integers in a column with gaps, and nothing is imported.

    Raises:
        UserError: the file cannot be written.
    """
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(records)

    write_atomically(path, write)


