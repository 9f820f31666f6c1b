"""Shared by all parts of the benchmark: settings, rows of the table, and timing."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOPPER = ("H100", "H200")  # GPUs that some goals are for


@dataclass(frozen=True)
class ModelShape:
    """The model that is measured.

    Attributes:
        name: its name on the command line.
        train_config: config that trains a concept.
        inference_config: config that generates images.
        side, quick_side: side of the images in pixels.
        steps, quick_steps: number of sampling steps.
        batches, quick_batches: batch sizes of the training step.
        max_images_per_pass: images in one pass of a run that trains many concepts, which bounds its memory.
        checkpoint: weights in this project; None: runs load random weights from a file.
        segmenter: folder of a segmenter; None: one of the public CLIPSeg's shape, with random weights.
        has_goals: whether the goals apply, which are for Stable Diffusion.
    """

    name: str
    train_config: str
    inference_config: str
    side: int
    quick_side: int
    steps: int = 50
    quick_steps: int = 4
    batches: Sequence[int] = (1, 4, 16)
    quick_batches: Sequence[int] = (1,)
    max_images_per_pass: int = 16
    checkpoint: str | None = None
    segmenter: str | None = None
    has_goals: bool = True


SHAPES = {
    "sd": ModelShape("sd", "configs/perfusion-sd-v1.yaml", "configs/stable-diffusion/v1-inference.yaml", 512, 256),
    "sdxl": ModelShape("sdxl", "configs/perfusion-sd-xl.yaml", "configs/stable-diffusion/sd_xl_base.yaml", 1024, 512,
                       batches=(1, 4), has_goals=False),
    "mini": ModelShape("mini", "configs/perfusion.yaml", "configs/perfusion.yaml", 64, 64, quick_steps=25,
                       quick_batches=(1, 16), max_images_per_pass=64, checkpoint="models/mini/model.safetensors",
                       segmenter="models/mini/segmenter", has_goals=False),
}


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings of the command line.

    Attributes:
        device: where to measure.
        folder: temporary folder for files.
        shape: shape of the model.
        rounds: number of timed calls.
        quick: whether to measure smaller images and fewer of everything.
        compile: whether to compile blocks of the U-Net.
        with_tests: whether to time the test suite.
    """

    device: torch.device
    folder: Path
    shape: ModelShape = SHAPES["sd"]
    rounds: int = 5
    quick: bool = False
    compile: bool = False
    with_tests: bool = False

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return self.shape.quick_side if self.quick else self.shape.side

    @property
    def batches(self) -> Sequence[int]:
        """Batch sizes of the training step."""
        return self.shape.quick_batches if self.quick else self.shape.batches

    @property
    def sampling_steps(self) -> int:
        """Number of sampling steps."""
        return self.shape.quick_steps if self.quick else self.shape.steps

    @property
    def on_hopper(self) -> bool:
        """Whether the device is one that the goals for an H100 or H200 are for."""
        return self.device.type == "cuda" and any(name in torch.cuda.get_device_name(self.device) for name in HOPPER)


@dataclass(frozen=True)
class Goal:
    """A bound that a value should not exceed, or, with `at_least`, should reach."""

    bound: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}"


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of the table.

    Attributes:
        name: what was measured.
        value: the median of the measured values; None: not measured, and the note says why.
        unit: unit of the value.
        minimum, maximum: extremes of the measured values.
        count: number of measured values.
        goal: bound of the value.
        note: a remark.
    """

    name: str
    value: float | None
    unit: str
    minimum: float | None = None
    maximum: float | None = None
    count: int = 1
    goal: Goal | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value meets the goal; None if there is no goal or no value."""
        return None if self.goal is None or self.value is None else self.goal.is_met(self.value)

    def as_record(self) -> dict[str, Any]:
        """Return the row as values for JSON."""
        return {**asdict(self), "goal": None if self.goal is None else str(self.goal), "met": self.met}

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:,.4g}"
        spread = "" if self.minimum is None else f"{self.minimum:,.4g} to {self.maximum:,.4g}"
        answer = "" if self.met is None else f": {'yes' if self.met else 'no'}"
        goal = "" if self.goal is None else f"{self.goal}{answer}"
        return f"{self.name:<74} {value:>9} {self.unit:<10} {spread:<20} {goal:<20} {self.note}".rstrip()


def median_row(name: str, values: Sequence[float], unit: str, goal: Goal | None = None, note: str = ""
               ) -> BenchmarkRow:
    """Return a row with the median, the minimum and the maximum of `values`."""
    return BenchmarkRow(name, statistics.median(values), unit, min(values), max(values), len(values), goal, note)


def ratio_row(name: str, values: Sequence[float], references: Sequence[float], goal: Goal | None = None
              ) -> BenchmarkRow:
    """Return a row with the median of the ratios of each round: a slower machine slows both down."""
    ratios = [value / reference for value, reference in zip(values, references, strict=True)]
    return median_row(name, ratios, "x", goal)


def unavailable_row(name: str, unit: str, error: Exception) -> BenchmarkRow:
    """Return the row of something that could not be measured."""
    return BenchmarkRow(name, None, unit, note=" ".join(str(error).split())[:160])


def until_error(part: str, rows: Iterable[BenchmarkRow]) -> Iterator[BenchmarkRow]:
    """Yield the rows of a part. If it fails, yield a last row with the reason, so that the next part can run."""
    try:
        yield from rows
    except (UserError, torch.OutOfMemoryError) as error:
        yield unavailable_row(f"the rest of {part}", "", error)


# ---------------------------------------------------------------------------------------------------------------------
# Timing. Functions that run on an accelerator must synchronize before they return (`device.synchronize`).
# `torch.utils.benchmark.Timer` does not fit: it calls a function twice before each measurement (and some take minutes),
# it cannot alternate between functions, and its import writes a warning if CUDA is installed without a GPU.

def time_call(function: Callable[[], object]) -> float:
    """Return how long one call takes, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_calls(function: Callable[[], object], rounds: int) -> list[float]:
    """Return the seconds of each of `rounds` calls, after one call that is not timed."""
    function()
    return [time_call(function) for _ in range(rounds)]


def time_alternating(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
                     ) -> dict[str, list[float]]:
    """Time several functions in turns (A B C A B C ...), so that a change of the machine's speed affects all of them.

    Args:
        functions: name -> function.
        rounds: number of timed calls of each.
        warm_up: whether to call each function once before.

    Returns:
        name -> seconds of each round.
    """
    if warm_up:
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(time_call(function))
    return times
