"""Generate images with a model that needs no condition, as latent diffusion's script of this name does."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.inference.requests import SEED_LIMIT  # noqa: E402

if TYPE_CHECKING:
    from ldm.inference.unconditional import UnconditionalSampling

DESCRIPTION = f"""{__doc__}

Images go to samples/STEP/DATE/img in the model's folder, and all pixels to .../numpy as one .npz file. Further
arguments such as model.params.image_size=32 change the config.
"""
EXAMPLES = """example:
  python scripts/sample_diffusion.py -r models/ldm/celeba256/model.ckpt -l samples -n 20 --batch_size 10 -c 50 -e 0
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> UnconditionalSampling:
    """Read the command line."""
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("-r", "--resume", required=True, metavar="PATH", help="checkpoint beside a config.yaml, or a "
                        "folder with model.ckpt and config.yaml")
    parser.add_argument("-n", "--n_samples", type=int_in_range(1), default=50000, metavar="N",
                        help="images to generate (%(default)s)")
    parser.add_argument("-e", "--eta", type=float_in_range(0), default=1.0, metavar="NUMBER",
                        help="noise of each DDIM step; 0 is none (%(default)s)")
    parser.add_argument("-v", "--vanilla_sample", action="store_true", help="take all timesteps (DDPM), not DDIM")
    parser.add_argument("-l", "--logdir", metavar="FOLDER", help="where to write (default: the model's folder)")
    parser.add_argument("-c", "--custom_steps", type=int_in_range(1), default=50, metavar="N",
                        help="steps of DDIM (%(default)s)")
    parser.add_argument("--batch_size", type=int_in_range(1), default=10, metavar="N",
                        help="images generated at a time (%(default)s)")
    parser.add_argument("--seed", type=int_in_range(0, SEED_LIMIT), metavar="N", help="seed (default: none)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the fastest there is)")
    options, overrides = parser.parse_known_args(arguments)
    wrong = [text for text in overrides if text.startswith("-") or "=" not in text]
    if wrong:
        raise UserError(f"unrecognized arguments: {' '.join(wrong)}; see --help")
    from ldm.inference.unconditional import UnconditionalSampling  # loads torch, which --help need not wait for

    return UnconditionalSampling(**vars(options), overrides=tuple(overrides))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.inference.unconditional import sample_unconditionally

    print(f"logging to {sample_unconditionally(options)}")


if __name__ == "__main__":
    main()
