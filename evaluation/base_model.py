"""Measure the base model and its parts, and print a table of results and goals.

    python evaluation/base_model.py                     # everything, about half an hour on two cores
    python evaluation/base_model.py --quick             # a first look
    python evaluation/base_model.py --only clip one_subject --ckpt logs/..._text2img/checkpoints/last.ckpt

The evaluation CLIP recognizes what images show; no model was conditioned on it or trained with it. Its accuracy on
composed scenes, with known and with held-out sprites, is printed beside the results as a ceiling. Writes table.csv,
results.json, recognized.csv (every image and what was recognized in it) and contact sheets to OUTDIR.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.mini.settings import CAPTIONS, MEASUREMENTS, MINI, BaseModelSettings  # noqa: E402
from ldm.cli.generation import add_model_flags, model_settings  # noqa: E402
from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder, expand_home, resolve_path, user_path  # noqa: E402

WITH_IMAGES = ("one_subject", "two_subjects")
OLD_NAMES = {"one_thing": "one_subject", "two_things": "two_subjects"}
QUICK = {"prompts": 48, "scenes": 128, "ddim_steps": 25}


def parse_arguments(arguments: Sequence[str] | None = None) -> BaseModelSettings:
    """Read the command line.

    Raises:
        UserError: something is missing; nothing heavy is loaded to find out.
    """
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", type=lambda name: OLD_NAMES.get(name, name), choices=MEASUREMENTS,
                        default=list(MEASUREMENTS), metavar="WHAT",
                        help=f"what to measure (default: all of {', '.join(MEASUREMENTS)})")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, scenes and steps: a first look")
    group = parser.add_argument_group("how much, from where")
    group.add_argument("--prompts", type=int_in_range(2), default=200, metavar="N",
                       help="prompts with one subject, and as many with two (default: %(default)s)")
    group.add_argument("--scenes", type=int_in_range(2), default=512, metavar="N",
                       help="composed scenes for every other measurement and for ceilings (default: %(default)s)")
    group.add_argument("--ddim_steps", type=int_in_range(1), default=50, metavar="N", help="default: %(default)s")
    group.add_argument("--scale", type=float_in_range(1), default=4.0, metavar="NUMBER",
                       help="guidance (default: %(default)s)")
    group.add_argument("--batch_size", type=int_in_range(1), default=40, metavar="N",
                       help="images generated at a time (default: %(default)s)")
    group.add_argument("--seed", type=int_in_range(0, 2**32), default=1, metavar="N",
                       help="of prompts, images and scenes (default: %(default)s)")
    parts = parser.add_argument_group("parts other than the bundled ones")
    parts.add_argument("--autoencoder", type=expand_home, metavar="FILE",
                       help="weights of configs/mini/autoencoder.yaml to measure "
                       "instead of the base model's own")
    parts.add_argument("--clip", type=user_path, default=MINI / "clip", metavar="FOLDER", help="or a name, such as "
                       "ViT-B-32/openai: ARCHITECTURE/WEIGHTS of open_clip, or one on the hub")
    parts.add_argument("--segmenter", type=user_path, default=MINI / "segmenter", metavar="FOLDER")
    parts.add_argument("--evaluation_clip", type=user_path, default=MINI / "evaluation_clip", metavar="FOLDER",
                       help="or a name, as for --clip")
    parts.add_argument("--weights", type=user_path, default=MINI, metavar="FOLDER",
                       help="folder whose size is measured")
    add_model_flags(parser, outdir="outputs/base_model")
    options = parser.parse_args(arguments)
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, min(value, getattr(options, name)))
    _check(options)
    return BaseModelSettings(
        model=model_settings(options), outdir=Path(options.outdir), measurements=tuple(options.only),
        prompts=options.prompts, scenes=options.scenes, num_inference_steps=options.ddim_steps,
        guidance_scale=options.scale, batch_size=options.batch_size, seed=options.seed,
        autoencoder=options.autoencoder, clip=options.clip, segmenter=options.segmenter,
        evaluation_clip=options.evaluation_clip, weights=options.weights)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError if something is missing, before anything heavy is loaded."""
    check_folder("--outdir", Path(options.outdir))
    if "clip" in options.only and options.scenes < CAPTIONS:
        raise UserError(f"--scenes {options.scenes}: a caption is to be found among {CAPTIONS}; give at least as many")
    for part, measurements in {"clip": ("clip",), "segmenter": ("segmenter",), "evaluation_clip": WITH_IMAGES}.items():
        folder = resolve_path(getattr(options, part))
        if part != "segmenter" and not folder.exists() and len(folder.parts) == 2:
            continue  # a name, which only the libraries know
        needed = any(name in options.only for name in measurements)
        if needed and not (folder / "model.safetensors").is_file():
            raise UserError(f"--{part} {folder}: there are no weights; train it with configs/mini/{part}.yaml and "
                            f"scripts/mini/export.py, or leave {', '.join(measurements)} out of --only")
        setattr(options, part, folder)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse_arguments(arguments)
    # These load torch, which --help need not wait for.
    from evaluation.mini.model_quality import BaseModelEvaluator, measure
    from evaluation.output.goals import GOAL_TABLE, GoalRow, write_results
    from ldm.training.run_record import describe_machine

    evaluator = BaseModelEvaluator(settings)
    record = {"machine": describe_machine(evaluator.device), **settings.record()}
    rows: list[GoalRow] = []
    print(GOAL_TABLE.header(), flush=True)
    for row in measure(evaluator):
        print(GOAL_TABLE.line(row.cells()), flush=True)
        rows.append(row)
        write_results(settings.outdir, rows, record)
    missed = [row.what for row in rows if not row.met]
    print(f"goals not reached: {'; '.join(missed)}" if missed else "every goal is reached")
    print(f"written to {settings.outdir}")


if __name__ == "__main__":
    main()
