"""What all parts of the benchmark share: settings, rows of the table, and times taken side by side."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOPPER = ("H100", "H200")  # devices that some goals are for


@dataclass(frozen=True)
class Shape:
    """The model that is measured.

    Attributes:
        name: what the command line calls it.
        teach, draw: configs, the one that learns a concept and the one that draws.
        side, quick_side: of the pictures, in pixels.
        steps, quick_steps: of a sampling.
        batches, quick_batches: sizes of the batches whose training step is timed.
        most_pictures: that a run of many concepts has in one pass, to bound the memory it takes.
        checkpoint: weights that ship with the project; None: random ones are written for runs that load a file.
        segmenter: folder of a segmenter; None: one of the public CLIPSeg's shape, with random weights.
        has_goals: whether the goals, which are for Stable Diffusion, hold for it.
    """

    name: str
    teach: str
    draw: str
    side: int
    quick_side: int
    steps: int = 50
    quick_steps: int = 4
    batches: Sequence[int] = (1, 4, 16)
    quick_batches: Sequence[int] = (1,)
    most_pictures: int = 16
    checkpoint: str | None = None
    segmenter: str | None = None
    has_goals: bool = True


SHAPES = {
    "sd": Shape("sd", "configs/perfusion-sd-v1.yaml", "configs/stable-diffusion/v1-inference.yaml", 512, 256),
    "mini": Shape("mini", "configs/perfusion.yaml", "configs/perfusion.yaml", 64, 64, quick_steps=25,
                  quick_batches=(1, 16), most_pictures=64, checkpoint="models/mini/model.safetensors",
                  segmenter="models/mini/segmenter", has_goals=False),
}


@dataclass(frozen=True)
class Settings:
    """What the command line asked for, as every part takes it; `folder` is for files that nobody keeps."""

    device: torch.device
    folder: Path
    shape: Shape = SHAPES["sd"]
    rounds: int = 5
    quick: bool = False
    compile: bool = False
    with_tests: bool = False

    @property
    def side(self) -> int:
        """Of the pictures, in pixels."""
        return self.shape.quick_side if self.quick else self.shape.side

    @property
    def batches(self) -> Sequence[int]:
        return self.shape.quick_batches if self.quick else self.shape.batches

    @property
    def sampling_steps(self) -> int:
        return self.shape.quick_steps if self.quick else self.shape.steps

    @property
    def on_hopper(self) -> bool:
        """Whether the goals for an H100 or H200 are asked of this device."""
        return self.device.type == "cuda" and any(name in torch.cuda.get_device_name(self.device) for name in HOPPER)


@dataclass(frozen=True)
class Goal:
    """What a value has to reach: at most the bound, or at least."""

    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        value: the median where several were taken; None: not measured, and the note says why.
        lowest, highest: of the values that the median is of.
        count: how many they were.
    """

    what: str
    value: float | None
    unit: str
    lowest: float | None = None
    highest: float | None = None
    count: int = 1
    goal: Goal | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none, or no value."""
        return None if self.goal is None or self.value is None else self.goal.met(self.value)

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "goal": None if self.goal is None else str(self.goal), "met": self.met}

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:,.4g}"
        spread = "" if self.lowest is None else f"{self.lowest:,.4g} to {self.highest:,.4g}"
        reached = "" if self.met is None else f": {'yes' if self.met else 'no'}"
        goal = "" if self.goal is None else f"{self.goal}{reached}"
        return f"{self.what:<74} {value:>9} {self.unit:<10} {spread:<20} {goal:<20} {self.note}".rstrip()


def median_row(what: str, values: Sequence[float], unit: str, goal: Goal | None = None, note: str = "") -> Row:
    """The median of `values` with the lowest and the highest of them."""
    return Row(what, statistics.median(values), unit, min(values), max(values), len(values), goal, note)


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def repeated(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one call that warms caches up."""
    work()
    return [seconds(work) for _ in range(rounds)]


def ratio_row(what: str, values: Sequence[float], against: Sequence[float], goal: Goal | None = None) -> Row:
    """How many times as long, the median of the ratios of each round: what slows a machine down slows both."""
    ratios = [one / other for one, other in zip(values, against, strict=True)]
    return median_row(what, ratios, "x", goal)


@dataclass
class Race:
    """Works that take turns, round by round (A B C A B C ...), so that all of them have the same machine.

    Attributes:
        works: what is timed, by name; each waits for its device before it returns.
        times: seconds of each round, in the order of the rounds.
    """

    works: Mapping[str, Callable[[], object]]
    times: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
        """All `times`, after one untimed call of each."""
        for work in self.works.values() if warm_up else ():
            work()
        for _ in range(rounds):
            for name, work in self.works.items():
                self.times.setdefault(name, []).append(seconds(work))
        return self.times


def unavailable(what: str, unit: str, error: Exception) -> Row:
    """The row of something that could not be measured."""
    return Row(what, None, unit, note=" ".join(str(error).split())[:160])


def rows_of(part: str, measured: Iterable[Row]) -> Iterator[Row]:
    """The rows of a part; where it cannot go on, a last one that says why, so that the other parts have their turn."""
    try:
        yield from measured
    except (UserError, torch.OutOfMemoryError) as error:
        yield unavailable(f"the rest of {part}", "", error)
