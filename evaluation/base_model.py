"""Measures the base model and its parts, and prints a table of what they reach beside their goals.

    python evaluation/base_model.py                     # everything, about half an hour on two cores
    python evaluation/base_model.py --quick             # a first look
    python evaluation/base_model.py --only clip one_thing --ckpt logs/..._text2img/checkpoints/last.ckpt

Pictures are graded by the evaluation CLIP, which no model here has been conditioned on or trained with. Its accuracy on
real scenes, of known and of held-out drawings, stands beside as a ceiling. Writes table.csv, results.json, answers.csv
(every picture and what was recognised in it) and sheets of pictures to OUTDIR.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.generation import add_model_flags  # noqa: E402
from ldm.cli.parser import Parser, number, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder

MINI = Path(__file__).resolve().parents[1] / "models" / "mini"
MEASURES = ("autoencoder", "clip", "segmenter", "one_thing", "two_things", "speed", "size")
CAPTIONS = 64  # as in evaluation.mini.parts, which takes its time to import
GRADED = ("one_thing", "two_things")
QUICK = {"prompts": 48, "scenes": 128, "ddim_steps": 25}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="WHAT",
                        help=f"what to measure (default: all of {', '.join(MEASURES)})")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, scenes and steps: a first look")
    group = parser.add_argument_group("how much, from where")
    group.add_argument("--prompts", type=whole(2), default=200, metavar="N",
                       help="prompts with one thing, and as many with two (default: %(default)s)")
    group.add_argument("--scenes", type=whole(2), default=512, metavar="N",
                       help="real scenes for every other figure and for ceilings (default: %(default)s)")
    group.add_argument("--ddim_steps", type=whole(1), default=50, metavar="N", help="default: %(default)s")
    group.add_argument("--scale", type=number(1), default=4.0, metavar="NUMBER", help="guidance (default: %(default)s)")
    group.add_argument("--batch_size", type=whole(1), default=40, metavar="N",
                       help="pictures drawn at a time (default: %(default)s)")
    group.add_argument("--seed", type=whole(0, 2**32), default=1, metavar="N",
                       help="of prompts, pictures and scenes (default: %(default)s)")
    parts = parser.add_argument_group("parts other than the bundled ones")
    parts.add_argument("--autoencoder", metavar="FILE", help="weights of configs/mini/autoencoder.yaml to measure in "
                       "place of the base model's own")
    parts.add_argument("--clip", type=Path, default=MINI / "clip", metavar="FOLDER", help="or a name, such as "
                       "ViT-B-32/openai: ARCHITECTURE/WEIGHTS of open_clip, or one on the hub")
    parts.add_argument("--segmenter", type=Path, default=MINI / "segmenter", metavar="FOLDER")
    parts.add_argument("--evaluation_clip", type=Path, default=MINI / "evaluation_clip", metavar="FOLDER",
                       help="or a name, as for --clip")
    parts.add_argument("--weights", type=Path, default=MINI, metavar="FOLDER", help="whose size is measured")
    add_model_flags(parser, outdir="outputs/base_model")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, min(value, getattr(options, name)))
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Raises a UserError for what is missing, before anything heavy is loaded."""
    check_folder("--outdir", Path(options.outdir))
    if "clip" in options.only and options.scenes < CAPTIONS:
        raise UserError(f"--scenes {options.scenes}: a caption is looked for among {CAPTIONS}; give at least as many")
    needed = {"clip": ("clip",), "segmenter": ("segmenter",), "evaluation_clip": GRADED}
    for part, measures in needed.items():
        folder = getattr(options, part)
        if part != "segmenter" and not folder.exists() and len(folder.parts) == 2:
            continue  # a name, which only the libraries know
        if not (folder / "model.safetensors").is_file() and any(measure in options.only for measure in measures):
            raise UserError(f"--{part} {folder}: there are no weights; train it with configs/mini/{part}.yaml and "
                            "scripts/mini/export.py, or leave out of --only what needs it: " + ", ".join(measures))



@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from evaluation.mini.model_quality import Subject, measured
    from evaluation.output import goals  # here, as torch takes its time and --help should not
    from ldm.training.run_record import describe_machine

    subject, folder = Subject(options), Path(options.outdir)
    settings = {"machine": describe_machine(subject.device), **{key: str(value) if isinstance(value, Path) else value
                                                                for key, value in vars(options).items()}}
    rows: list[goals.GoalRow] = []
    print(goals.GOAL_TABLE.header(), flush=True)
    for row in measured(subject, options.only):
        print(goals.GOAL_TABLE.line(row.cells()), flush=True)
        rows.append(row)
        goals.write_results(folder, rows, settings)
    missed = [row.what for row in rows if not row.met]
    print(f"not reached: {'; '.join(missed)}" if missed else "every goal is reached")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
