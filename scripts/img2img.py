"""Generate variations of an image that follow a prompt, close to the image or far from it."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.inference.settings import GenerationOptions, SourceSettings  # noqa: E402

DESCRIPTION = f"""{__doc__}

Noise is added to the image, the more the higher the strength, and removed again as the prompt says (SDEdit, Meng et
al., arXiv 2108.01073).
Results go to OUTDIR/samples and a sheet of them with their prompts to OUTDIR; earlier ones stay.
The i-th result of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/img2img.py --init-img photo.png --prompt "a painting of a dog" --strength 0.75
  python scripts/img2img.py --init-img bear.jpg --concept teddy.safetensors --prompt "a photo of a <my-teddy>"
"""
STRENGTH = ("how far to go from the image: near 0 it hardly changes, 1 ignores it. This share of the sampling steps is "
            "taken, the last ones")


def parse_arguments(arguments: Sequence[str] | None = None) -> GenerationOptions:
    """Read the command line."""
    parser = Parser(DESCRIPTION, EXAMPLES)
    flags.add_source_flags(parser, 0.75, STRENGTH)
    flags.add_generation_flags(parser, outdir="outputs/img2img-samples")
    options = parser.parse_args(arguments)
    flags.check_generation_flags(options)
    return flags.generation_options(options, SourceSettings(options.init_img, options.strength))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.inference.run import generate_to_folder  # loads torch, which --help need not wait for

    print(generate_to_folder(options).summary())


if __name__ == "__main__":
    main()
