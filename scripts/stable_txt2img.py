"""Generate images from prompts as Textual Inversion's script of this name does, with vectors of an embeddings.pt."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.generation import read_prompts  # noqa: E402
from ldm.cli.parser import Parser, float_in_range, int_in_range  # noqa: E402
from ldm.common.errors import one_line_errors  # noqa: E402
from ldm.inference.requests import SEED_LIMIT  # noqa: E402
from ldm.inference.settings import ModelSettings  # noqa: E402

if TYPE_CHECKING:
    from ldm.inference.ldm_sampling import PromptSampling

DESCRIPTION = f"""{__doc__}

One seed is for all images of a run, as in the LDM family. scripts/txt2img.py gives each image a seed of its own, has
more samplers, and takes concepts of every method.
"""
EXAMPLES = """example:
  python scripts/stable_txt2img.py --ckpt sd-v1-4.ckpt --embedding_path logs/.../embeddings.pt --prompt "a photo of *"
"""
LAION_400M = ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt",
              "outputs/txt2img-samples-laion400m")


def build_parser() -> Parser:
    """Return the parser, with the flags and defaults of the public script."""
    count = int_in_range(1)
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("--prompt", default="a painting of a virus monster playing guitar", help="the prompt")
    parser.add_argument("--from-file", metavar="FILE", help="text file with one prompt per line, instead of --prompt")
    parser.add_argument("--embedding_path", metavar="FILE", help="vectors of Textual Inversion, such as embeddings.pt")
    parser.add_argument("--ddim_steps", type=count, default=50, metavar="N", help="sampling steps (%(default)s)")
    parser.add_argument("--plms", action="store_true", help="sample by PLMS, in place of DDIM")
    parser.add_argument("--ddim_eta", type=float_in_range(0), default=0.0, metavar="NUMBER", help="noise of each step")
    parser.add_argument("--scale", type=float_in_range(), default=7.5, metavar="NUMBER", help="guidance (%(default)s)")
    parser.add_argument("--n_samples", type=count, default=3, metavar="N", help="images per batch (%(default)s)")
    parser.add_argument("--n_iter", type=count, default=2, metavar="N", help="number of batches (%(default)s)")
    parser.add_argument("--n_rows", type=int_in_range(0), default=0, metavar="N", help="images in a row of the grid "
                        "(default: as --n_samples)")
    for flag, default, meaning in (("H", 512, "height in pixels"), ("W", 512, "width in pixels"),
                                   ("C", 4, "channels of the latents"), ("f", 8, "downsampling of the latents")):
        parser.add_argument(f"--{flag}", type=count, default=default, metavar="N", help=f"{meaning} (%(default)s)")
    parser.add_argument("--seed", type=int_in_range(0, SEED_LIMIT), default=42, metavar="N", help="seed of the run")
    parser.add_argument("--fixed_code", action="store_true", help="start all batches from the same noise")
    parser.add_argument("--skip_grid", action="store_true", help="write no grid")
    parser.add_argument("--skip_save", action="store_true", help="write no single images")
    parser.add_argument("--laion400m", action="store_true", help="use LDM's text-to-image model")
    parser.add_argument("--config", default="configs/stable-diffusion/v1-inference.yaml", metavar="FILE")
    parser.add_argument("--ckpt", default="models/ldm/stable-diffusion-v1/model.ckpt", metavar="FILE")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: the fastest there is)")
    parser.add_argument("--precision", choices=("full", "autocast"), default="autocast", help="16 bits on cuda, or 32")
    parser.add_argument("--outdir", default="outputs/txt2img-samples", metavar="FOLDER")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> PromptSampling:
    """Read the command line."""
    options = build_parser().parse_args(arguments)
    from ldm.inference.ldm_sampling import PromptSampling  # loads torch, which --help need not wait for

    if options.laion400m:
        options.config, options.ckpt, options.outdir = LAION_400M
    size = options.n_samples
    batches = [(options.prompt,) * size]
    if options.from_file is not None:
        lines = read_prompts([], options.from_file)
        batches = [tuple(lines[first:first + size]) for first in range(0, len(lines), size)]
    return PromptSampling(
        batches=tuple(batches), outdir=options.outdir, embedding_path=options.embedding_path,
        model=ModelSettings(options.config, options.ckpt, options.device, options.precision),
        n_iter=options.n_iter, ddim_steps=options.ddim_steps, ddim_eta=options.ddim_eta, scale=options.scale,
        plms=options.plms, shape=(options.C, options.H // options.f, options.W // options.f), seed=options.seed,
        fixed_code=options.fixed_code, columns=options.n_rows or size, save_images=not options.skip_save,
        save_grid=not options.skip_grid)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.inference.ldm_sampling import sample_prompts

    sample_prompts(options)
    print(f"Your samples are in {options.outdir}")


if __name__ == "__main__":
    main()
