"""Measures how fast the parts of this project are on this machine, side by side in one run, and prints a table.

    python scripts/benchmark.py scenes
"""
from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.command_line import Parser, check_folder, whole  # noqa: E402
from ldm.errors import one_line_errors  # noqa: E402
from ldm.files import write_whole  # noqa: E402

Row = dict[str, Any]


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of one call, after one call that warms caches up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def scenes(options: argparse.Namespace) -> list[Row]:
    """Scenes of the mini world composed by one core: training should never wait for them."""
    from ldm.data.scenes import SceneDataset

    count = 200
    wide = SceneDataset(seed=1)
    narrow = SceneDataset(seed=3, jitter=0.3, flips=0.0, sources=("fluent", "noto", "twemoji"))
    rows = []
    for what, take in (("for autoencoder and CLIP", wide.__getitem__), ("for the U-Net", narrow.__getitem__),
                       ("their captions alone", wide.plan)):
        starts = itertools.count(0, count)  # new scenes in every round, as in training

        def work(take: Callable[[int], object] = take, starts: Iterator[int] = starts) -> None:
            start = next(starts)
            for index in range(start, start + count):
                take(index)

        speed = round(count / median_seconds(work, options.rounds))
        rows.append({"what": f"scenes, {what}", "value": speed, "unit": "a second and core"})
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {"scenes": scenes}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "", "")
    parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS),
                        help=f"what to measure: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=whole(1), default=5, metavar="N", help="measured rounds (default: 5)")
    parser.add_argument("--outdir", default="outputs/benchmark", metavar="FOLDER",
                        help="where results.json goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    check_folder("--outdir", Path(options.outdir))
    return options


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    rows: list[Row] = []
    for part in options.parts:
        for row in PARTS[part](options):
            print(f"{row['what']:<55} {row['value']:>10,} {row['unit']}", flush=True)
            rows.append(row)
    text = json.dumps(rows, indent=2)
    write_whole(Path(options.outdir) / "results.json", lambda aside: aside.write_text(text))


if __name__ == "__main__":
    main()
