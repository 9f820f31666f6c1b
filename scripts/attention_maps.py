"""Show where in the image the model attends to a word of the prompt, and how much of that lies on the object."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.attention.settings import AttentionOptions  # noqa: E402
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import expand_home  # noqa: E402
from ldm.common.words import fold_word  # noqa: E402
from ldm.inference.settings import GenerationOptions  # noqa: E402

DESCRIPTION = f"""{__doc__}

The same prompt and seeds are used with each concept file. OUTDIR gets attention_maps-0000.png, with a row for each
file: the image, the mask of the object in it, the mean map of each cross-attention layer, and that of all layers in the
early, middle and late steps. A CSV and a JSON file of the same name hold the numbers of all images: how much of the
word's attention lies inside the mask, and how that compares with uniform attention. Earlier files stay.
"""
EXAMPLES = """examples:
  python scripts/attention_maps.py "a photo of a <my-teddy> on the beach" --n_samples 8 --reference \\
      --concepts locked.safetensors trained_keys.safetensors textual_inversion.safetensors
  python scripts/attention_maps.py "a photo of a cat on the beach" --word beach
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> AttentionOptions:
    """Read the command line.

    Raises:
        UserError: flags contradict each other or name something that does not exist.
    """
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt, in quotes")
    parser.add_argument("--concepts", "--concept", dest="concept", nargs="+", action="extend", default=[],
                        type=expand_home, metavar="FILE", help="concept files of any method, each used on its own; "
                        "without this flag the base model generates, and --word says which word to look at")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="a name for each file (default: its method)")
    parser.add_argument("--word", metavar="TEXT", help="the word to look at, or several successive words of the prompt "
                        "(default: the concept's)")
    parser.add_argument("--reference", action="store_true", help="also show the base model, with the super-category in "
                        "place of the concept's word")
    parser.add_argument("--shown", type=int_in_range(1), default=1, metavar="N",
                        help="images of each file in the figure, the first ones (default: 1)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mask", type=expand_home, metavar="FILE", help="your own mask for all images, white "
                       "where the object is (default: the segmenter looks for the super-category, or the plain word, "
                       "in each image)")
    which.add_argument("--segmenter", type=expand_home, metavar="NAME", help="folder or hub name of that CLIPSeg "
                       "(default: the model's, or else CIDAS/clipseg-rd64-refined)")
    flags.add_sampling_flags(parser)
    flags.add_amount_flags(parser)
    flags.add_model_flags(parser, outdir="outputs/attention-maps")
    flags.leave_concepts_as_trained(parser)
    options = parser.parse_args(arguments)
    flags.check_flags(options)
    _check(options)
    generation = GenerationOptions(
        prompts=(options.prompt,), model=flags.model_settings(options), outdir=options.outdir,
        settings=flags.generation_settings(options), seed=options.seed, num_images=options.n_iter * options.n_samples,
        batch_size=options.batch_size or options.n_samples)
    return AttentionOptions(
        options.prompt, generation, tuple(options.concept), None if options.labels is None else tuple(options.labels),
        options.word, options.reference, options.shown, options.mask, options.segmenter)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError if the script's own flags contradict each other."""
    if options.labels is not None and len(options.labels) != len(options.concept):
        raise UserError(f"--labels: {len(options.labels)} for {len(options.concept)} concept files; give one for each")
    if not options.concept and options.word is None:
        raise UserError("nothing to look at; give a concept file with --concepts, or a word of the prompt with --word")
    if options.reference and not options.concept:
        raise UserError("--reference is shown beside concepts; name a file of one with --concepts")
    if options.word is not None and fold_word(options.word.strip()) not in fold_word(options.prompt):
        raise UserError(f"--word {options.word}: does not occur in the prompt {options.prompt!r}; name one that does")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if find_spec("matplotlib") is None:
        raise UserError('the figure needs matplotlib; pip install -e ".[evaluation]"')
    from evaluation.attention.cases import load_pipeline, prepare_cases, record_case  # loads torch
    from evaluation.attention.object_masks import ObjectMasks
    from evaluation.attention.report import describe_case, write_report

    cases = prepare_cases(options)
    masks = ObjectMasks(cases[0].run, options.mask, options.segmenter)
    pipeline = load_pipeline(cases[0])
    rows = [masks.measure(case, record_case(case, pipeline)) for case in cases]
    for case, case_rows in zip(cases, rows, strict=True):
        print(describe_case(case, case_rows))
    print(", ".join(map(str, write_report(options, cases, rows))))


if __name__ == "__main__":
    main()
