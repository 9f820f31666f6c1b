"""Run a script on both packages and compare what it wrote: images and numbers."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from public_scripts.run import NUMBERS, Outcome, PublicRun, Workplace, earlier_outcome, run_script

PIXEL_TOLERANCE = 2  # of 255
FLAT = 3.0  # standard deviation of an image in which differences would not show


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: the run's name.
        ours, original: whether the script succeeded; None if it was not run.
        max_difference, mean_difference: of all pixels, of 255; None if no images were compared.
        number_difference: greatest relative difference of numbers; None if there are none.
        agrees: whether ours succeeded and differs from the original, if that can run, by no more than the tolerance; a
            difference with a reason (`PublicRun.original_differs`) is shown and counts as agreement.
        remark: errors, missing repositories, numbers.
    """

    name: str
    ours: bool | None
    original: bool | None
    max_difference: float | None
    mean_difference: float | None
    number_difference: float | None
    agrees: bool
    remark: str


def compare_run(run: PublicRun, place: Workplace) -> Row:
    """Run a script on the original and on ours, and compare the outcomes."""
    try:
        original = None if run.original_fails else earlier_outcome(run, place) or run_script(run, place, original=True)
        ours = run_script(run, place, original=False)
    except LookupError as error:
        return Row(run.name, None, None, None, None, None, False, str(error.args[0]))
    remarks = [run.original_fails, run.original_differs, original and original.error and f"original: {original.error}",
               ours.error and f"ours: {ours.error}"]
    row = {"name": run.name, "ours": ours.succeeded, "original": original.succeeded if original else None,
           "max_difference": None, "mean_difference": None, "number_difference": None,
           "agrees": ours.succeeded and original is None}
    if ours.succeeded and original is not None and original.succeeded:
        row |= compare_outcomes(run, ours, original, remarks)
    return Row(**row, remark="; ".join(remark for remark in remarks if remark))


def compare_outcomes(run: PublicRun, ours: Outcome, original: Outcome, remarks: list[str]) -> dict[str, object]:
    """Return the differences of two successful outcomes as fields of `Row`; add remarks."""
    images = [sorted(path.relative_to(outcome.folder) for path in outcome.folder.glob(run.images)
                     if str(path.relative_to(outcome.folder)) not in run.inputs) for outcome in (ours, original)]
    fields: dict[str, object] = {}
    agrees = len(images[0]) == len(images[1])
    if not agrees:
        remarks.append(f"{len(images[0])} images for {len(images[1])}")
    differences = [image_difference(ours.folder / one, original.folder / other)
                   for one, other in zip(*images, strict=False)]
    if differences:
        fields["max_difference"] = max(float(difference.max()) for difference in differences)
        fields["mean_difference"] = float(numpy.mean([difference.mean() for difference in differences]))
        agrees &= fields["max_difference"] <= PIXEL_TOLERANCE
        flat = [path.name for path in images[1] if pixels(original.folder / path).std() < FLAT]
        remarks.append(f"nearly constant: {', '.join(flat)}" if flat else "")
    numbers = [read_numbers(outcome.folder / NUMBERS) for outcome in (ours, original)]
    if any(numbers):
        fields["number_difference"] = number_difference(*numbers)
        agrees &= fields["number_difference"] <= run.tolerance
        remarks.append(f"numbers differ by {fields['number_difference']:.1e}")
    return {**fields, "agrees": agrees or bool(run.original_differs)}


def pixels(file: Path) -> numpy.ndarray:
    """Return an image as RGB values."""
    return numpy.asarray(Image.open(file).convert("RGB"), dtype=numpy.float32)


def image_difference(one: Path, other: Path) -> numpy.ndarray:
    """Return the absolute differences of two images; 255 everywhere if their sizes differ."""
    first, second = pixels(one), pixels(other)
    return abs(first - second) if first.shape == second.shape else numpy.full_like(first, 255)


def read_numbers(file: Path) -> dict[str, numpy.ndarray]:
    """Return the numbers that a script wrote, none if there is no file."""
    values = json.loads(file.read_text()) if file.is_file() else {}
    return {name: numpy.atleast_1d(numpy.array(value, dtype=numpy.float64)) for name, value in values.items()}


def number_difference(ours: dict[str, numpy.ndarray], original: dict[str, numpy.ndarray]) -> float:
    """Return the greatest difference of a number, relative to the greatest one of the same name."""
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in original.items()}:
        return float("inf")
    return max(float(abs(ours[name] - value).max() / max(abs(value).max(), 1e-12)) for name, value in original.items())
