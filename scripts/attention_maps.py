"""Shows where in the picture the model looks for a word of the prompt, and says how much of that is on the thing."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402

DESCRIPTION = f"""{__doc__}

The same prompt and seeds are drawn with each concept file. OUTDIR gets attention_maps-0000.png, with a row for each
file: the picture, the mask of the thing in it, the mean map of each cross-attention layer, and that of all layers at
early, middle and late steps; beside it a CSV and a JSON with the same name, of all pictures: how much of the word's
attention lies inside the mask, and how much it would be, were it spread evenly. Earlier ones stay.
"""
EXAMPLES = """examples:
  python scripts/attention_maps.py "a photo of a <my-teddy> on the beach" --scale 2 --n_samples 8 --reference \\
      --concepts locked.safetensors trained_keys.safetensors textual_inversion.safetensors
  python scripts/attention_maps.py "a photo of a cat on the beach" --word beach
"""
FEWEST_STEPS = 3  # one for each group


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, in quotes")
    parser.add_argument("--concepts", "--concept", dest="concept", nargs="+", action="extend", default=[],
                        metavar="FILE", help="concept files of any method, each drawn on its own; without this flag "
                        "the base model draws, and --word says which word to look at")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="what to call them, one for each (default: by "
                        "their method)")
    parser.add_argument("--word", metavar="TEXT", help="the word to look at, or several that follow each other; it "
                        "stands in the prompt (default: the concept's)")
    parser.add_argument("--reference", action="store_true", help="show the base model too, with the super-category in "
                        "place of the concept's word")
    parser.add_argument("--shown", type=whole(1), default=1, metavar="N",
                        help="pictures of each file that are shown, the first ones (default: 1)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mask", metavar="FILE", help="your own mask for all pictures, white where the thing is "
                       "(default: the segmenter looks for the super-category, or the plain word, in each picture)")
    which.add_argument("--segmenter", metavar="NAME", help="folder or hub name of the CLIPSeg that does (default: the "
                       "config's, or else CIDAS/clipseg-rd64-refined)")
    flags.add_sampling_options(parser)
    flags.add_amount_options(parser)
    flags.add_model_options(parser, outdir="outputs/attention-maps")
    flags.draw_as_trained(parser)
    options = parser.parse_args(arguments)
    flags.check_together(options)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.ddim_steps < FEWEST_STEPS:
        raise UserError(f"--steps {options.ddim_steps}: maps are of early, middle and late steps; give {FEWEST_STEPS} "
                        "or more")
    if options.labels is not None and len(options.labels) != len(options.concept):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.concept)} concept files; give one for each")
    if not options.concept and options.word is None:
        raise UserError("nothing to look at; give a concept file with --concepts, or a word of the prompt with --word")
    if options.reference and not options.concept:
        raise UserError("--reference stands beside concepts; name a file of one with --concepts")
    if options.word is not None and options.word.strip().lower() not in options.prompt.lower():
        raise UserError(f"--word {options.word}: does not stand in the prompt {options.prompt!r}; name one that does")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if find_spec("matplotlib") is None:
        raise UserError('the picture needs matplotlib; pip install -e ".[evaluation]"')
    from evaluation.attention import cases as attention  # here, as torch takes its time and --help should not
    from ldm.inference import sampling as inference

    cases = attention.cases_of(options)
    plan = cases[0].plan
    masks = attention.Masks(options, plan)
    model = inference.load_base(plan.config, options.ckpt, plan.device)
    found = [attention.measured(case, attention.look(case, model), masks) for case in cases]
    for case, rows in zip(cases, found, strict=True):
        print(attention.said(case, rows))
    print(", ".join(map(str, attention.write(options, cases, found))))


if __name__ == "__main__":
    main()
