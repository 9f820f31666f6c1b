"""Measures how fast this project is on this machine, beside other methods, and prints a table.

    python scripts/benchmark.py              everything, on a model of Stable Diffusion 1.5's shape
    python scripts/benchmark.py --quick      the same with smaller pictures and fewer of everything, for a laptop
    python scripts/benchmark.py training_step sampling --shape mini

Weights are random and of the real shapes: nothing is downloaded. What is compared takes turns in one run.
"""
from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.parser import Parser, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors, set_log_level  # noqa: E402
from ldm.common.paths import check_folder

PARTS = {
    "training_step": "a training step: time, memory, share of the matrix rate; diffusers and peft beside it",
    "whole_concept": "a whole concept by main.py, the first picture, what start-up costs",
    "sampling": "sampling with 0, 1, 2, 8 and 32 concepts loaded",
    "many_concepts": "several concepts learned in one run, and used in one batch",
    "parts": "concept files, merging, the covariance of many captions, masks of many photos",
    "mini": "the README's commands on the bundled model",
    "scenes": "scenes of the mini world",
}
ROUNDS, QUICK_ROUNDS = 5, 3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<15} {what}" for name, what in PARTS.items())
    parser = Parser(f"{__doc__}\nparts:\n{listed}")
    parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer of everything; rows say how many")
    parser.add_argument("--shape", choices=("sd", "mini"), default="sd",
                        help="shape of the model: Stable Diffusion 1.5's, or the bundled one's (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--compile", action="store_true", help="torch.compile blocks of the U-Net (on CUDA)")
    parser.add_argument("--rounds", type=whole(1), metavar="N",
                        help=f"measured rounds, after one that warms up (default: {ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument("--with_tests", action="store_true", help="with the README's test command, which takes long")
    parser.add_argument("--outdir", default="outputs/benchmark", metavar="FOLDER",
                        help="where results.json goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    check_folder("--outdir", Path(options.outdir))
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.common.files import (
        write_atomically,  # from here on torch is needed, which takes its time and --help should not
    )
    from ldm.util import pick_device
    from scripts.benchmarks.common import SHAPES, Settings
    from scripts.benchmarks.device import machine

    set_log_level(logging.WARNING)  # rows only
    device = pick_device(options.device)
    if options.compile and device.type != "cuda":
        raise UserError(f"--compile: is for CUDA, not for {device.type}; leave it out")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = Settings(device, Path(folder), SHAPES[options.shape], options.rounds, options.quick,
                            options.compile, options.with_tests)
        results = {"machine": machine(settings), "rows": []}
        print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), flush=True)
        for record in measured(options.parts, settings):
            results["rows"].append(record)
            text = json.dumps(results, indent=2)
            write_atomically(Path(options.outdir) / "results.json", lambda aside, text=text: aside.write_text(text))


def measured(parts: Sequence[str], settings: object) -> Iterator[dict[str, object]]:
    """Prints the rows of each part and yields them as records."""
    from scripts.benchmarks.common import rows_of

    for part in parts:
        for row in rows_of(part, importlib.import_module(f"scripts.benchmarks.{part}").measure(settings)):
            print(row, flush=True)
            yield {"part": part, **row.as_record()}


if __name__ == "__main__":
    main()
