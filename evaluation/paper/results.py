"""The measurements of a study, in the form that claims and tables are computed from."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.paper.design import Method, StudyCurve, Variant
from evaluation.stats.crossed import Cell
from evaluation.stats.tradeoff import TradeoffCurve, build_curve

ImageRecord = Mapping[str, Any]  # what was measured in one image, by CSV column


@dataclass(frozen=True)
class TrainingCost:
    """The cost of training one concept, and the size of the result.

    Attributes:
        seconds: processor time, summed over all cores; wall-clock time would depend on other processes.
        parameters: number of trained parameters.
        size: size of the concept file, in bytes.
        machine: where it was measured, and how many trainings shared the machine.
    """

    seconds: float
    parameters: int
    size: int
    machine: str


@dataclass(frozen=True)
class Results:
    """Everything that one study measured.

    Attributes:
        images: records of the images of each variant and of the concepts in them.
        costs: costs of training each concept, by method.
    """

    images: Mapping[tuple[Variant, tuple[str, ...]], Sequence[ImageRecord]]
    costs: Mapping[Method, Sequence[TrainingCost]]

    @property
    def concepts(self) -> set[str]:
        """The names of all concepts in the images."""
        return {name for _, names in self.images for name in names}

    def cells(self, variant: Variant, column: str) -> dict[Cell, list[float]]:
        """Return the values of a column for the images of a variant, by concept and prompt; gaps are left out."""
        cells: dict[Cell, list[float]] = {}
        for (owner, names), records in self.images.items():
            for record in records if owner == variant else ():
                if record[column] is not None:
                    cells.setdefault(Cell(names, record["template"]), []).append(record[column])
        return cells

    def curve(self, curve: StudyCurve) -> TradeoffCurve:
        """Return the measured trade-off curve of a study's curve."""
        text = [self.cells(variant, "text") for variant in curve.variants]
        image = [self.cells(variant, "image") for variant in curve.variants]
        return build_curve(text, image)
