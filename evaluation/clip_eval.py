"""Measures by a CLIP how well pictures of a concept follow their prompts, and how like its photos they are."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402

EVALUATION_CLIP = Path(__file__).resolve().parents[1] / "models" / "mini" / "evaluation_clip"
NO_SEGMENTER = "none"
USUAL_SEEDS = 4
DESCRIPTION = f"""{__doc__}

Text similarity is the cosine of picture and prompt, with the super-category in the concept's stead; image similarity
the mean cosine of picture and photos; object similarity the same with all but the object cut away by a segmenter. All
times 100. What is compared is the middle square of each picture. Means stand with their 95 % bootstrap intervals.
"""
EXAMPLES = """examples:
  python evaluation/clip_eval.py --concept logs/.../concept.safetensors --photos models/mini/examples/teddy --save
  python evaluation/clip_eval.py --concept teddy.safetensors --photos my_photos --prompts my_prompts.txt --bias 0.6
  python evaluation/clip_eval.py --images outputs/txt2img-samples/samples --photos my_photos
  python evaluation/clip_eval.py --images drawn --captions drawn.csv --photos my_photos --super_category "teddy bear" \\
      --clip ViT-B-32/openai --segmenter CIDAS/clipseg-rd64-refined

Pictures that this project's scripts drew carry their prompts with them. A list of prompts has one a line, with {} for
the concept; evaluation/prompts/mini.txt is for the bundled model, evaluation/prompts/photos.txt for Stable Diffusion.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    there = parser.add_argument_group("pictures that are there already")
    there.add_argument("--images", metavar="FOLDER", help="measure these")
    there.add_argument("--captions", metavar="FILE", help="CSV file with the columns file and prompt, and perhaps "
                       "category and seed (default: what the pictures' own notes say)")
    there.add_argument("--prompt", metavar="TEXT", help="one prompt for all of them")
    drawn = parser.add_argument_group("or pictures that are drawn here, of a concept")
    add_list_options(drawn)
    drawn.add_argument("--save", action="store_true", help="keep the pictures, and sheets of them, in OUTDIR")
    flags.add_concept_flags(parser)
    flags.add_sampling_flags(parser)
    add_comparison_options(parser)
    flags.add_model_flags(parser, outdir="outputs/clip_eval")
    parser.set_defaults(negative_prompt=[])
    options = parser.parse_args(arguments)
    check(options)
    return options


def add_list_options(group: argparse._ArgumentGroup) -> None:
    """The flags of what is drawn of a concept; None where prompts and seeds are the usual ones."""
    group.add_argument("--prompts", metavar="FILE", help="one a line, with {} for the concept (default: "
                       "evaluation/prompts/mini.txt)")
    group.add_argument("--seeds", type=whole(1), metavar="N", help="pictures per prompt, from --seed on "
                       f"(default: {USUAL_SEEDS})")
    group.add_argument("--batch_size", type=whole(1), default=32, metavar="N",
                       help="pictures drawn at a time (default: %(default)s)")


def add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """The flags of what pictures are measured by, as `clip_measures.meter_of` takes them."""
    beside = parser.add_argument_group("what they are compared with")
    beside.add_argument("--photos", required=True, metavar="FOLDER", help="the concept's photos")
    beside.add_argument("--masks", metavar="FOLDER", help="where it is in them: a mask of each photo's name, white "
                        "where the concept is (default: the segmenter's)")
    beside.add_argument("--super_category", "--init_word", dest="super_category", metavar="TEXT", help='what kind of '
                        'thing it is, such as "teddy bear" (default: what the concept or the pictures say)')
    beside.add_argument("--clip", default=str(EVALUATION_CLIP), metavar="NAME", help="a folder with a CLIP of "
                        "transformers or open_clip, or a name such as ViT-B-32/openai: ARCHITECTURE/WEIGHTS of "
                        "open_clip (default: models/mini/evaluation_clip)")
    beside.add_argument("--segmenter", metavar="NAME", help="a folder or hub name of a CLIPSeg, or none (default: the "
                        "config's)")


def check(options: argparse.Namespace) -> None:
    """Raises a UserError for flags that contradict each other or name what is not there, before torch is loaded."""
    if bool(options.images) == bool(options.concept):
        raise UserError("give either --images FOLDER, to measure pictures that are there, or --concept FILE, to draw "
                        "some and measure them")
    for_images = {"--captions": options.captions, "--prompt": options.prompt}
    for_drawing = {"--prompts": options.prompts, "--seeds": options.seeds, "--save": options.save}
    for mode, idle in (("--images", for_images), ("--concept", for_drawing)):
        given = [flag for flag, value in idle.items() if value and not getattr(options, mode.strip("-"))]
        if given:
            raise UserError(f"{given[0]} goes with {mode}; leave it out, or name pictures by {mode}")
    if options.captions and options.prompt:
        raise UserError("--captions and --prompt both say what the pictures were drawn from; give one of them")
    check_folder_is_there("--images", options.images)
    check_comparison(options)
    flags.check_flags(options)


def check_comparison(options: argparse.Namespace) -> None:
    """Raises a UserError where the flags of `add_comparison_options` contradict each other or name what is missing."""
    if options.masks and options.segmenter == NO_SEGMENTER:
        raise UserError("--masks serve the similarity of objects, which --segmenter none leaves out; drop one of them")
    if options.clip == str(EVALUATION_CLIP) and not EVALUATION_CLIP.is_dir():
        raise UserError(f"--clip {options.clip}: there are no weights; name another CLIP, such as ViT-B-32/openai")
    for flag in ("photos", "masks"):
        check_folder_is_there(f"--{flag}", getattr(options, flag))


def check_folder_is_there(flag: str, folder: str | None) -> None:
    """Raises a UserError where a flag names a folder of pictures that does not exist."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the one that holds the pictures")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from evaluation.metrics import clip_measures  # here, as torch takes its time and --help should not

    result = clip_measures.of_folder(options) if options.images else clip_measures.of_concept(options)
    for line in result.lines():
        print(line)
    each, means = result.write(Path(options.outdir))
    print(f"every picture: {each}\nmeans: {means}")


if __name__ == "__main__":
    main()
