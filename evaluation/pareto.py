"""Plot text similarity against image similarity of a concept along its bias, and what changes that curve."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.clip_eval import (  # noqa: E402
    add_reference_flags,
    add_sample_flags,
    check_references,
    reference_settings,
    sample_settings,
)
from evaluation.sweeps.settings import LOCKS, ParetoOptions  # noqa: E402
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, float_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import expand_home  # noqa: E402

BIASES = (0.45, 0.6, 0.75, 0.9, 1.05)
DESCRIPTION = f"""{__doc__}

Images of each concept file are generated at each bias and with each lock, and measured as by clip_eval.py. With
--temperatures or --scales, the first file is also generated at these values, at each bias. Each of these sweeps writes
to OUTDIR its means with 95 % intervals as CSV, the curves as PNG, and for each curve a grid of images: a row for each
of some prompts, a column for each bias. similarities.csv has every image. The bias that --bias auto would choose is
marked with * in the tables and bold in the grids.
"""
EXAMPLES = """examples:
  python evaluation/pareto.py --concept teddy.safetensors --photos models/mini/examples/teddy
  python evaluation/pareto.py --concept teddy.safetensors trained_keys.safetensors --labels "locked keys" \\
      "trained keys" --photos models/mini/examples/teddy --temperatures 0.05 0.2 --scales 1 2 4 --steps 25

main.py trains keys with model.params.locking=trained. Files of other methods are single points.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> ParetoOptions:
    """Read the command line.

    Raises:
        UserError: flags contradict each other or name something that does not exist.
    """
    parser = Parser(DESCRIPTION, EXAMPLES)
    swept = parser.add_argument_group("what is swept")
    swept.add_argument("--concept", nargs="+", action="extend", required=True, type=expand_home, metavar="FILE",
                       help="concept files, each of one concept and all of the same subject")
    swept.add_argument("--labels", nargs="+", metavar="TEXT",
                       help="a name for each file (default: the names of the files)")
    swept.add_argument("--biases", nargs="+", type=float_in_range(), default=BIASES, metavar="NUMBER",
                       help=f"the points of each curve (default: {' '.join(map(str, BIASES))})")
    swept.add_argument("--locks", nargs="+", choices=LOCKS, default=LOCKS, metavar="LOCK",
                       help="local: the keys of the concept's word are locked to the super-category; global: those of "
                       "the whole prompt are. Files with trained keys use these (default: local global)")
    swept.add_argument("--temperatures", nargs="+", type=float_in_range(above=0), default=(), metavar="NUMBER",
                       help="temperatures besides that of training")
    swept.add_argument("--scales", nargs="+", type=float_in_range(0), default=(), metavar="NUMBER",
                       help="guidance scales besides --scale")
    add_sample_flags(parser.add_argument_group("which images"))
    flags.add_sampling_flags(parser)
    add_reference_flags(parser)
    flags.add_model_flags(parser, outdir="outputs/pareto")
    flags.leave_concepts_as_trained(parser)
    options = parser.parse_args(arguments)
    _check(options)
    check_references(options)
    flags.check_flags(options)
    return ParetoOptions(
        concepts=tuple(options.concept), biases=tuple(sorted(options.biases)), references=reference_settings(options),
        model=flags.model_settings(options), outdir=options.outdir,
        labels=None if options.labels is None else tuple(options.labels), locks=tuple(options.locks),
        temperatures=tuple(options.temperatures), guidance_scales=tuple(options.scales),
        samples=sample_settings(options), settings=flags.generation_settings(options))


def _check(options: argparse.Namespace) -> None:
    """Raise UserError if the flags of what is swept contradict each other."""
    if find_spec("matplotlib") is None:
        raise UserError('plots need matplotlib; pip install -e ".[evaluation]"')
    if options.labels is not None and len(options.labels) != len(options.concept):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.concept)} concept files; give one for each")
    for name in ("biases", "locks", "labels"):
        values = getattr(options, name) or ()
        if len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: a value is repeated; leave one out")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from evaluation.sweeps import pareto_curves  # loads torch, which --help need not wait for

    sweeps, runner = pareto_curves.prepare(options)
    results, folder = pareto_curves.run_points(sweeps, runner), Path(options.outdir)
    for sweep in sweeps:
        curves = {curve.name: pareto_curves.curve_rows(curve, results) for curve in sweep.curves}
        rows = [row for curve in curves.values() for row in curve]
        print(f"{sweep.title}:\n{pareto_curves.format_table(rows)}")
        paths = pareto_curves.write_sweep(folder, sweep, curves, runner.prompts)
        print("\n".join(map(str, paths)), flush=True)
    print(f"every image: {pareto_curves.write_scores(folder, runner, results)}")


if __name__ == "__main__":
    main()
