"""Draws curves of text- against image-similarity of a concept: what its bias trades, and what bends the curve."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.clip_eval import add_comparison_options, add_list_options, check_comparison  # noqa: E402
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, number  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402

BIASES = (0.45, 0.6, 0.75, 0.9, 1.05)
LOCKS = ("local", "global")
DESCRIPTION = f"""{__doc__}

Each file is drawn at each bias, with each lock; its text, image and object similarity are those of clip_eval.py. With
--temperatures or --scales the first file is drawn so, too, at each bias. For each of these sweeps OUTDIR gets its means
with 95 % intervals as CSV, the curves as PNG (of objects too, unless --segmenter none), and for each curve a grid of
pictures with a row for each of some prompts and a column for each bias; similarities.csv has every picture. The balance
that --bias auto would choose of a curve is printed in bold there, and marked with * in the table.
"""
EXAMPLES = """examples:
  python evaluation/pareto.py --concept teddy.safetensors --photos models/mini/examples/teddy --scale 2
  python evaluation/pareto.py --concept teddy.safetensors trained_keys.safetensors --labels "locked keys" \\
      "trained keys" --photos models/mini/examples/teddy --temperatures 0.05 0.2 --scales 1 2 4 --scale 2 --steps 25

Keys are trained by main.py with model.params.locking=trained. Files of other methods are single points.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    swept = parser.add_argument_group("what is swept")
    swept.add_argument("--concept", nargs="+", action="extend", required=True, metavar="FILE",
                       help="concept files, each of one concept and all of the same thing")
    swept.add_argument("--labels", nargs="+", metavar="TEXT",
                       help="what to call them, one for each (default: the names of the files)")
    swept.add_argument("--biases", nargs="+", type=number(), default=BIASES, metavar="NUMBER",
                       help=f"the points of each curve (default: {' '.join(map(str, BIASES))})")
    swept.add_argument("--locks", nargs="+", choices=LOCKS, default=LOCKS, metavar="LOCK",
                       help="local: the concept's keys are its super-category's; global: so are those of the whole "
                       "prompt; files of trained keys are drawn with these (default: local global)")
    swept.add_argument("--temperatures", nargs="+", type=number(above=0), default=(), metavar="NUMBER",
                       help="beside that of training")
    swept.add_argument("--scales", nargs="+", type=number(0), default=(), metavar="NUMBER",
                       help="guidance, beside --scale")
    add_list_options(parser.add_argument_group("what is drawn"))
    flags.add_sampling_flags(parser)
    add_comparison_options(parser)
    flags.add_model_flags(parser, outdir="outputs/pareto")
    flags.leave_concepts_as_trained(parser)
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Raises a UserError for flags that contradict each other or name what is not there, before torch is loaded."""
    if find_spec("matplotlib") is None:
        raise UserError('curves need matplotlib; pip install -e ".[evaluation]"')
    if options.labels is not None and len(options.labels) != len(options.concept):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.concept)} concept files; give one for each")
    for name in ("biases", "locks", "labels"):
        values = getattr(options, name) or ()
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: one stands there twice; leave one out")
    options.biases = sorted(options.biases)
    check_comparison(options)
    flags.check_flags(options)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from evaluation.sweeps.sweep import pareto_curves  # here, as torch takes its time and --help should not

    sweeps, sweeper = pareto_curves.set_up(options)
    drawn, folder = pareto_curves.drawn_points(sweeps, sweeper), Path(options.outdir)
    for sweep in sweeps:
        lines = pareto_curves.lines_of(sweep, drawn)
        print(f"{sweep.title}:\n{pareto_curves.table_of(lines)}")
        print("\n".join(map(str, pareto_curves.write_sweep(folder, sweep, lines, sweeper.prompts))), flush=True)
    print(f"every picture: {pareto_curves.write_every(folder, sweeper, drawn)}")


if __name__ == "__main__":
    main()
