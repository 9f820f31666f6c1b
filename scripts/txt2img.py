"""Generate images from prompts, with or without learned concepts."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.inference.settings import GenerationOptions  # noqa: E402

DESCRIPTION = f"""{__doc__}

Images go to OUTDIR/samples and a sheet of them with their prompts to OUTDIR; earlier ones stay.
The i-th image of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/txt2img.py --prompt "a photo of a dog on the beach"
  python scripts/txt2img.py --concept teddy.safetensors --prompt "a photo of a <my-teddy> on the beach" --bias 0.7
  python scripts/txt2img.py --prompt "a photo of a dog" --negative_prompt "snow" --sampler dpm --steps 20
  python scripts/txt2img.py --concept teddy.safetensors mug.safetensors --bias 0.7 0.65 \\
      --prompt "a <my-teddy> next to a <my-mug>" "a <my-mug> in the snow"

The word of each concept is printed. If two concepts have the same word, the second becomes <word-2>.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> GenerationOptions:
    """Read the command line."""
    parser = Parser(DESCRIPTION, EXAMPLES)
    flags.add_generation_flags(parser, outdir="outputs/txt2img-samples")
    options = parser.parse_args(arguments)
    flags.check_generation_flags(options)
    return flags.generation_options(options)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.inference.run import generate_to_folder  # loads torch, which --help need not wait for

    print(generate_to_folder(options).summary())


if __name__ == "__main__":
    main()
