"""Repeat the paper's comparisons on the bundled model, and check each of the paper's claims."""
from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.paper.folder_lock import lock_folder  # noqa: E402
from evaluation.paper.methods import BASELINES, select_methods  # noqa: E402
from evaluation.paper.settings import BIASES, COMPARISON_BIASES, PAIR_BIASES, ReproduceOptions  # noqa: E402
from evaluation.paper.studies import STUDIES  # noqa: E402
from ldm.cli.generation import add_model_flags, model_settings  # noqa: E402
from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder, expand_home, resolve_path  # noqa: E402
from ldm.inference.settings import GenerationSettings  # noqa: E402
from ldm.sampling.samplers import SAMPLERS  # noqa: E402

CONFIG = "configs/perfusion.yaml"
DESCRIPTION = f"""{__doc__}

main.py trains the concepts; images are generated and measured set by set. Results in OUTDIR that were made by the same
code and settings are used again, so an interrupted run continues where it stopped. Each study gets a table and a
figure. summary.md and results.json cover all studies, also those that an earlier run completed.
"""
EXAMPLES = """examples:
  python evaluation/reproduce.py --quick              # a first look, 6 to 7 minutes on two cores
  python evaluation/reproduce.py                      # about an hour and a half on two cores
  python evaluation/reproduce.py --only baselines two_concepts --concepts 10
  python evaluation/reproduce.py --only baselines --methods textual-inversion my_method.yaml

my_method.yaml is a config like those in configs/baselines/, with its own model.target.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> ReproduceOptions:
    """Read the command line.

    Raises:
        UserError: flags contradict each other or name something that does not exist.
    """
    parser = Parser(DESCRIPTION, EXAMPLES)
    _add_study_flags(parser)
    _add_amount_flags(parser)
    _add_generation_flags(parser)
    parser.add_argument("--evaluation_clip", type=expand_home, metavar="FOLDER",
                        help="folder or name of the CLIP that measures (default: the model's)")
    parser.add_argument("--jobs", type=int_in_range(1), metavar="N",
                        help="trainings at a time, which share the cores (default: one for each core, up to 4)")
    add_model_flags(parser, outdir="outputs/reproduce")
    parser.set_defaults(config=CONFIG)
    flags = parser.parse_args(arguments)
    options = _make_options(flags)
    _check(options)
    return options


def _add_study_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared")
    group.add_argument("--only", nargs="+", choices=tuple(STUDIES), default=list(STUDIES), metavar="STUDY",
                       help=f"studies to carry out (default: all of {', '.join(STUDIES)})")
    group.add_argument("--methods", nargs="+", metavar="METHOD",
                       help="methods to compare Perfusion with, by name or as config files of your own (default: all "
                       f"of {', '.join(method.key for method in BASELINES)})")


def _add_amount_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much")
    group.add_argument("--quick", action="store_true",
                       help="fewer of everything, and trainings of a quarter of the length: a first look")
    group.add_argument("--concepts", type=int_in_range(2, 11), default=8, metavar="N",
                       help="number of bundled examples (default: %(default)s)")
    group.add_argument("--prompts", type=expand_home, metavar="FILE",
                       help="one prompt per line, with {} for the concept (default: "
                       "evaluation/prompts/mini.txt)")
    group.add_argument("--prompts-limit", "--prompts_limit", type=int_in_range(1), default=12, metavar="N",
                       help="number of prompts, taken from all categories in turn (default: %(default)s)")
    group.add_argument("--pair_backgrounds", "--pair_places", dest="pair_backgrounds", type=int_in_range(1), default=4,
                       metavar="N", help="number of backgrounds for two concepts (default: %(default)s)")
    group.add_argument("--seeds", type=int_in_range(1), default=8, metavar="N",
                       help="images per prompt (default: %(default)s)")
    group.add_argument("--train_steps", type=int_in_range(1), metavar="N",
                       help="steps of each training (default: as in the config)")


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how images are generated")
    group.add_argument("--biases", nargs="+", type=float_in_range(), default=BIASES, metavar="NUMBER",
                       help=f"of Perfusion's curve, rising (default: {' '.join(map(str, BIASES))})")
    group.add_argument("--other_biases", nargs="+", type=float_in_range(), metavar="NUMBER",
                       help="some of these, for the curves that it is compared with (default: those of "
                       f"{' '.join(map(str, COMPARISON_BIASES))} that are among --biases, or all)")
    group.add_argument("--pair_biases", nargs="+", type=float_in_range(), default=PAIR_BIASES, metavar="NUMBER",
                       help="for two concepts in one image; the first one is judged, others are only shown (default: "
                       f"{' '.join(map(str, PAIR_BIASES))})")
    group.add_argument("--sampler", choices=tuple(SAMPLERS), default="dpm",
                       help="default: %(default)s, which is closer to the converged sample in 10 steps than DDIM in 25")
    group.add_argument("--steps", "--ddim_steps", dest="steps", type=int_in_range(1), default=10, metavar="N",
                       help="sampling steps (default: %(default)s)")
    group.add_argument("--scale", type=float_in_range(1), metavar="NUMBER",
                       help="guidance (default: what the model's config says)")
    group.add_argument("--batch_size", type=int_in_range(1), default=32, metavar="N",
                       help="images generated at a time (default: %(default)s)")


def _make_options(flags: argparse.Namespace) -> ReproduceOptions:
    options = ReproduceOptions(
        model=model_settings(flags), outdir=flags.outdir, studies=tuple(flags.only),
        baselines=select_methods(flags.methods), concepts=flags.concepts, prompts=flags.prompts,
        prompt_limit=flags.prompts_limit, pair_backgrounds=flags.pair_backgrounds, seeds=flags.seeds,
        train_steps=flags.train_steps, biases=tuple(flags.biases), pair_biases=tuple(flags.pair_biases),
        generation=GenerationSettings(flags.steps, flags.scale, flags.sampler), batch_size=flags.batch_size,
        evaluation_clip=flags.evaluation_clip, jobs=flags.jobs)
    if flags.quick:
        options = options.quick()
    usual = tuple(bias for bias in COMPARISON_BIASES if bias in options.biases)
    return replace(options, comparison_biases=tuple(flags.other_biases or usual or options.biases))


def _check(options: ReproduceOptions) -> None:
    """Raise UserError for what is missing, before anything heavy is loaded."""
    check_folder("--outdir", Path(options.outdir))
    if find_spec("matplotlib") is None:
        raise UserError('figures need matplotlib; pip install -e ".[evaluation]"')
    if not resolve_path(options.model.config).is_file():
        raise UserError(f"--config {options.model.config}: no such file; name Perfusion's config for the base model")
    listed = " ".join(map(str, options.biases))
    if sorted(set(options.biases)) != list(options.biases):
        raise UserError(f"--biases {listed}: give them in rising order")
    if not set(options.comparison_biases) <= set(options.biases):
        raise UserError(f"--other_biases {' '.join(map(str, options.comparison_biases))}: give some of --biases, "
                        f"{listed}")


def stop(*_: object) -> NoReturn:
    """Exit when the system asks for it, so that running trainings are ended, too."""
    sys.exit("terminated; the same command continues with what exists")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    with lock_folder("--outdir", options.outdir):
        from evaluation.paper.reproduction import Reproduction  # loads torch, which --help need not wait for

        summary = Reproduction(options).run()
    print(f"{(time.perf_counter() - started) / 60:.1f} min; read {summary}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main()
