"""Draws a part of a picture anew after a prompt, with learned concepts or without; the rest stays as it is."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.inference.run import Plan, Start

DESCRIPTION = f"""{__doc__}

What the mask shows white is drawn anew. On a border around it the new passes into the old; beyond the border every
pixel is exactly that of the picture, cut to the size that is drawn.
Results go to OUTDIR/samples, a sheet of them with their prompts and the mask that was used to OUTDIR; earlier ones
stay. The i-th result of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/inpaint.py --init-img photo.png --mask mask.png --prompt "a dog on the beach"
  python scripts/inpaint.py --init-img photo.png --mask-word cat --grow 8 \\
      --concept teddy.safetensors --prompt "a photo of a <my-teddy> on the beach"

A mask that was written can be touched up and given with --mask.
"""
STRENGTH = ("of what is drawn anew: 1 does not look at what was there, lower keeps its colours and rough shapes. Of "
            "the sampling steps this share is taken, the last ones")
LARGEST = 4096
BORDER_PARTS = 32  # of the shorter side, one is the usual border


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    group = flags.add_original_options(parser, 1.0, STRENGTH)
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--mask", metavar="FILE", help="a picture of the photo's proportions, or of the size that is "
                       "drawn: white is drawn anew, black stays; with transparency, what is opaque is drawn anew")
    which.add_argument("--mask-word", "--mask_word", dest="mask_word", metavar="TEXT",
                       help='what is drawn anew, in plain words such as "cat"; the segmenter looks for it')
    group.add_argument("--segmenter", metavar="NAME", help="folder or hub name of the CLIPSeg that does (default: the "
                       "config's, or else CIDAS/clipseg-rd64-refined)")
    group.add_argument("--grow", type=whole(0, LARGEST), default=0, metavar="PIXELS",
                       help="spread the mask to all sides first (default: 0)")
    group.add_argument("--border", type=whole(0, LARGEST), metavar="PIXELS",
                       help="width of the border, outside of the mask; 0 for a hard edge (default: "
                       f"1/{BORDER_PARTS} of the shorter side)")
    flags.add_drawing_options(parser, outdir="outputs/inpaint-samples")
    options = parser.parse_args(arguments)
    flags.check_drawing(options)
    if options.segmenter is not None and options.mask is not None:
        raise UserError("--segmenter looks for what --mask-word names; leave it out with --mask")
    if options.mask_word is not None and not options.mask_word.strip():
        raise UserError('--mask-word: names nothing; say what is to be drawn anew, such as "cat"')
    return options


def masked(start: Start, run: Plan) -> Start:
    """`start` with the part that the flags name, grown and with a border."""
    from ldm.data.masks import grown

    options = run.options
    border = min(run.size) // BORDER_PARTS if options.border is None else options.border
    return replace(start, mask=grown(part_to_draw(start, run), options.grow), border=border)


def part_to_draw(start: Start, run: Plan) -> Tensor:
    """(1, 1, H, W) of ones, where the picture is drawn anew, and zeros."""
    from ldm.data.masks import read_part
    from ldm.inference.sampling import segmenter_of
    from ldm.modules.segmentation import ZeroShotSegmenter, clear_mask

    options, (width, height) = run.options, run.size
    if options.mask is not None:
        return read_part(options.mask, start.file_size, width, height)
    segmenter = ZeroShotSegmenter.from_path(options.segmenter or segmenter_of(run.config), run.device,
                                            "draw the mask yourself (--mask FILE)")
    probabilities = segmenter.segment([start.picture], options.mask_word, (height, width))[0]
    return clear_mask(probabilities, options.mask_word, options.init_img)[None, None]


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    prompts = flags.read_prompts(options.prompt, options.from_file)
    from ldm.inference import run as drawing  # here, as torch takes its time and --help should not

    run = drawing.plan(options, prompts)
    print(drawing.summary(drawing.draw(run, masked(drawing.read_start(run), run))))


if __name__ == "__main__":
    main()
