"""Report the progress of a long run, and estimate the remaining time."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Unit:
    """Work of one kind.

    Attributes:
        left: number of pieces left.
        finished: number of finished pieces.
        seconds: time that the finished pieces took.
    """

    left: int
    finished: int = 0
    seconds: float = 0.0


class Progress:
    """Prints a line for each finished piece of work.

    Args:
        trainings, images: how many there will be.
    """

    def __init__(self, trainings: int, images: int) -> None:
        self.units = {"trainings": _Unit(trainings), "images": _Unit(images)}

    def report(self, description: str, unit: str, count: int, seconds: float) -> None:
        """Count `count` pieces of a unit as finished, and print the description and what remains."""
        done = self.units[unit]
        done.left, done.finished, done.seconds = done.left - count, done.finished + count, done.seconds + seconds
        print(f"  {description}: {seconds:.1f} s; {self.remaining()}", flush=True)

    def remaining(self) -> str:
        """Return what is left, for example "about 12 min left, 3 trainings and 1,536 images"."""
        left = {name: unit for name, unit in self.units.items() if unit.left}
        if not left:
            return "nothing is left to make"
        amounts = " and ".join(f"{unit.left:,} {name}" for name, unit in left.items())
        if not all(unit.finished for unit in left.values()):
            return f"left are {amounts}"
        seconds = sum(unit.left * unit.seconds / unit.finished for unit in left.values())
        return f"about {max(1, round(seconds / 60))} min left, {amounts}"
