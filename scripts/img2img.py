"""Draws a picture again after a prompt, close to it or far from it, with learned concepts or without."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402

DESCRIPTION = f"""{__doc__}

Noise is added to the picture, the more the higher the strength, and taken away again as the prompt says (SDEdit, Meng
et al., arXiv 2108.01073).
Results go to OUTDIR/samples, a sheet of them with their prompts to OUTDIR; earlier ones stay.
The i-th result of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/img2img.py --init-img photo.png --prompt "a painting of a dog" --strength 0.75
  python scripts/img2img.py --init-img bear.jpg --concept teddy.safetensors --prompt "a photo of a <my-teddy>"
"""
STRENGTH = ("how far to go from the picture: near 0 it stays nearly as it is, 1 does not look at it. Of the sampling "
            "steps this share is taken, the last ones")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    flags.add_original_options(parser, 0.75, STRENGTH)
    flags.add_drawing_options(parser, outdir="outputs/img2img-samples")
    options = parser.parse_args(arguments)
    flags.check_drawing(options)
    return options


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    prompts = flags.read_prompts(options.prompt, options.from_file)
    from ldm.inference import run as drawing  # here, as torch takes its time and --help should not

    run = drawing.plan(options, prompts)
    print(drawing.summary(drawing.draw(run, drawing.read_start(run))))


if __name__ == "__main__":
    main()
