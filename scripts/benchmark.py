"""Measure how fast this project is on this machine, compared with other methods, and print a table.

    python scripts/benchmark.py              everything, on a model of Stable Diffusion 1.5's shape
    python scripts/benchmark.py --quick      the same with smaller images and fewer of everything, for a laptop
    python scripts/benchmark.py training_step sampling --shape mini
    python scripts/benchmark.py --shape sdxl     a training step of Stable Diffusion XL's shape; needs a GPU

Weights are random and of the real shapes, so nothing is downloaded. Methods that are compared run in turns.
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors, set_log_level  # noqa: E402
from ldm.common.paths import check_folder, expand_home  # noqa: E402

SDXL, SDXL_PART = "sdxl", "sdxl_step"  # a shape, and the only part that measures it
PARTS = {
    "training_step": "a training step: time, memory, share of the matrix rate; also of diffusers and peft",
    SDXL_PART: "a training step of Stable Diffusion XL at 512, 768 and 1024 pixels, beside peft; with --shape sdxl",
    "whole_concept": "a whole concept by main.py, the first image, and start-up",
    "sampling": "sampling with 0, 1, 2, 8 and 32 concepts loaded",
    "diffusers_step": "a step in diffusers with concepts in the prompt and without",
    "many_concepts": "several concepts trained in one run, and used in one batch",
    "parts": "concept files, merging, the covariance of many captions, masks of many photos",
    "mini": "the README's commands on the bundled model",
    "scenes": "scenes of the mini world",
}
ROUNDS, QUICK_ROUNDS = 5, 3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:<15} {description}" for name, description in PARTS.items())
    parser = Parser(f"{__doc__}\nparts:\n{listed}")
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default: all of the shape)")
    parser.add_argument("--quick", action="store_true", help="smaller images, fewer of everything; rows say how many")
    parser.add_argument("--shape", choices=("sd", SDXL, "mini"), default="sd",
                        help="shape of the model: Stable Diffusion 1.5's or XL's, or the bundled one's "
                             "(default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest one available)")
    parser.add_argument("--compile", action="store_true", help="torch.compile blocks of the U-Net (on CUDA)")
    parser.add_argument("--rounds", type=int_in_range(1), metavar="N",
                        help=f"measured rounds, after one warm-up round (default: {ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument("--with_tests", action="store_true", help="also time the README's test command, which is slow")
    parser.add_argument("--outdir", type=expand_home, default="outputs/benchmark", metavar="FOLDER",
                        help="folder of results.json (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    own = [part for part in PARTS if (part == SDXL_PART) == (options.shape == SDXL)]
    options.parts = options.parts or own
    for part in options.parts:
        if part not in own:
            parser.error(f"--shape {options.shape} has no part {part}; it has {', '.join(own)}")
    check_folder("--outdir", Path(options.outdir))
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # Imported only now, since torch takes long to load and --help does not need it.
    from ldm.common.atomic_write import write_atomically
    from ldm.util import pick_device
    from scripts.benchmarks.common import SHAPES, BenchmarkSettings
    from scripts.benchmarks.device import describe_benchmark

    set_log_level(logging.WARNING)  # the table is the only output
    device = pick_device(options.device)
    if options.compile and device.type != "cuda":
        raise UserError(f"--compile: is for CUDA, not for {device.type}; leave it out")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = BenchmarkSettings(device, Path(folder), SHAPES[options.shape], options.rounds, options.quick,
                                     options.compile, options.with_tests)
        results: dict[str, Any] = {"machine": describe_benchmark(settings), "rows": []}
        print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), flush=True)
        for record in run_parts(options.parts, settings):
            results["rows"].append(record)
            text = json.dumps(results, indent=2)
            write_atomically(Path(options.outdir) / "results.json", lambda file, text=text: file.write_text(text))


def run_parts(parts: Sequence[str], settings: Any) -> Iterator[dict[str, Any]]:
    """Run the parts, print each row, and yield it as a record."""
    from scripts.benchmarks.common import until_error

    for part in parts:
        module = importlib.import_module(f"scripts.benchmarks.{part}")
        for row in until_error(part, module.measure(settings)):
            print(row, flush=True)
            yield {"part": part, **row.as_record()}


if __name__ == "__main__":
    main()
