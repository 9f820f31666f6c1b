"""Regenerate a part of an image from a prompt, with or without learned concepts; the rest stays as it is."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import expand_home  # noqa: E402
from ldm.inference.settings import GenerationOptions, SourceSettings  # noqa: E402

DESCRIPTION = f"""{__doc__}

The white part of the mask is regenerated. In a border around it, the new image blends into the old one. Beyond the
border, every pixel is exactly that of the image, cropped to the generated size.
Results go to OUTDIR/samples; a sheet of them with their prompts and the mask in use go to OUTDIR; earlier ones stay.
The i-th result of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/inpaint.py --init-img photo.png --mask mask.png --prompt "a dog on the beach"
  python scripts/inpaint.py --init-img photo.png --mask-word cat --grow 8 \\
      --concept teddy.safetensors --prompt "a photo of a <my-teddy> on the beach"

You can touch up the mask that was written and pass it with --mask.
"""
STRENGTH = ("of the regenerated part: 1 ignores what was there, lower values keep its colors and rough shapes. This "
            "share of the sampling steps is taken, the last ones")
MAX_PIXELS = 4096


def parse_arguments(arguments: Sequence[str] | None = None) -> GenerationOptions:
    """Read the command line."""
    parser = Parser(DESCRIPTION, EXAMPLES)
    group = flags.add_source_flags(parser, 1.0, STRENGTH)
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--mask", type=expand_home, metavar="FILE",
                       help="image with the photo's proportions or of the size that is "
                       "generated: white is regenerated, black stays; if it has transparency, its opaque part is "
                       "regenerated")
    which.add_argument("--mask-word", "--mask_word", dest="mask_word", metavar="TEXT",
                       help='what to regenerate, in plain words such as "cat"; the segmenter looks for it')
    group.add_argument("--segmenter", type=expand_home, metavar="NAME",
                       help="folder or hub name of that CLIPSeg (default: the "
                       "config's, or else CIDAS/clipseg-rd64-refined)")
    group.add_argument("--grow", type=int_in_range(0, MAX_PIXELS), default=0, metavar="PIXELS",
                       help="spread the mask to all sides first (default: 0)")
    group.add_argument("--border", type=int_in_range(0, MAX_PIXELS), metavar="PIXELS",
                       help="width of the border around the mask; 0 for a hard edge (default: 1/32 of the shorter "
                       "side)")
    flags.add_generation_flags(parser, outdir="outputs/inpaint-samples")
    options = parser.parse_args(arguments)
    if options.segmenter is not None and options.mask is not None:
        raise UserError("--segmenter looks for what --mask-word names; leave it out with --mask")
    if options.mask_word is not None and not options.mask_word.strip():
        raise UserError('--mask-word: names nothing; say what to regenerate, such as "cat"')
    flags.check_generation_flags(options)
    return flags.generation_options(options, SourceSettings(
        options.init_img, options.strength, options.mask, options.mask_word, options.segmenter, options.grow,
        options.border))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.inference.run import generate_to_folder  # loads torch, which --help need not wait for

    print(generate_to_folder(options).summary())


if __name__ == "__main__":
    main()
