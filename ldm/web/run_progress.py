"""What a run shows while it trains, read from its folder."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm.web.run_folder import PROGRESS, RunFolder

PREVIEWS, MASKS = "images/before_during_after.png", "images/masks.png"


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run.

    Attributes:
        step: steps taken.
        steps: steps to take; 0 before the training begins.
        losses: (step, loss) of the steps so far; a resumed run's later value counts.
        seconds_left: estimate of the time that is left, or None.
        previews: the sheet of images before, during and after training, or None.
        masks: the sheet of photos with their masks, or None.
    """

    step: int = 0
    steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    seconds_left: float | None = None
    previews: Path | None = None
    masks: Path | None = None


def read_progress(run: RunFolder) -> RunProgress:
    """Return the progress of a run; an empty one before it begins."""
    folder = run.training
    if folder is None:
        return RunProgress()
    entries = list(_read_entries(folder / PROGRESS))
    losses = {entry["step"]: entry["loss"] for entry in entries if entry.get("loss") is not None}
    last = entries[-1] if entries else {"step": 0, "steps": 0}
    return RunProgress(
        step=last["step"], steps=last["steps"], losses=tuple(sorted(losses.items())),
        seconds_left=_estimate_seconds(entries), previews=_existing(folder / PREVIEWS),
        masks=_existing(folder / MASKS))


def _read_entries(path: Path) -> Iterator[dict]:
    """Yield the complete lines of a progress file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that is being written
            continue
        if isinstance(entry, dict) and {"step", "steps", "time"} <= entry.keys():
            yield entry


def _estimate_seconds(entries: list[dict]) -> float | None:
    """Return the time that is left at the pace of the current session."""
    session = []
    for entry in entries:
        if entry.get("loss") is None:  # the first line of a session
            session = []
        session.append(entry)
    if len(session) < 3:
        return None
    first, last = session[0], session[-1]
    steps = last["step"] - first["step"]
    return (last["steps"] - last["step"]) * (last["time"] - first["time"]) / steps if steps > 0 else None


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None
