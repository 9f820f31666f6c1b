"""Draws pictures from prompts, with learned concepts in them or without."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm import sampling_options as flags  # noqa: E402
from ldm.command_line import Parser  # noqa: E402
from ldm.errors import one_line_errors  # noqa: E402

DESCRIPTION = f"""{__doc__}

Pictures go to OUTDIR/samples, a sheet of them with their prompts to OUTDIR; earlier ones stay.
The i-th picture of a prompt, from 0, has the seed SEED + i and depends on nothing else of the run.
"""
EXAMPLES = """examples:
  python scripts/txt2img.py --prompt "a photo of a dog on the beach"
  python scripts/txt2img.py --concept teddy.safetensors --prompt "a photo of a <my-teddy> on the beach" --bias 0.7
  python scripts/txt2img.py --concept teddy.safetensors mug.safetensors --bias 0.7 0.65 \\
      --prompt "a <my-teddy> next to a <my-mug>" "a <my-mug> in the snow"

Which word stands for which concept is printed; of equal words the second becomes <word-2>.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(DESCRIPTION, EXAMPLES)
    flags.add_prompt_options(parser)
    flags.add_concept_options(parser)
    flags.add_sampling_options(parser)
    flags.add_amount_options(parser)
    flags.add_model_options(parser, outdir="outputs/txt2img-samples")
    options = parser.parse_args(arguments)
    flags.check_together(options)
    return options


def note(options: argparse.Namespace, concepts: Sequence[Any], size: Sequence[int]) -> dict[str, Any]:
    """What the pictures of this run have in common, to be kept in their files."""
    settings = {name: getattr(options, name) for name in
                ("negative_prompt", "ddim_steps", "ddim_eta", "scale", "global_locking", "config", "ckpt")}
    kept = ("placeholder", "super_category", "source", "bias", "temperature")
    return {**settings, "sampler": "plms" if options.plms else "ddim", "latent_size": list(size),
            "concepts": [{name: getattr(concept, name) for name in kept} for concept in concepts]}


def draw(options: argparse.Namespace, prompts: Sequence[str]) -> Mapping[str, Sequence[Path]]:
    """Draws everything and returns the files written, "pictures" and "sheets"."""
    from ldm import album, inference  # here, as torch takes its time and --help should not
    from ldm.models.diffusion.prompts import check_placeholders
    from ldm.util import pick_device

    config = inference.read_model_config(options.config)
    size = inference.latent_size(config, options.H, options.W)
    inference.check_steps(config, options.ddim_steps)
    device = pick_device(options.device)
    concepts = inference.ready_concepts(options.concept, options.bias, options.temperature)
    texts = [*prompts, options.negative_prompt or ""]
    check_placeholders(texts, [concept.placeholder for concept in concepts])

    model = inference.load_base(config, options.ckpt, device)
    encoder = inference.prompt_encoder(model, concepts)
    encoded = inference.encode_once(encoder, prompts, options.negative_prompt, global_locking=options.global_locking)
    inference.say_what_is_drawn(encoder, texts)
    sampling = inference.Sampling(
        size, options.ddim_steps, options.scale, options.ddim_eta, options.plms,
        batch_size=options.batch_size or options.n_samples,
        autocast=options.precision == "autocast" or (options.precision is None and device.type == "cuda"))
    jobs = [inference.Job(prompt, options.seed + i)
            for prompt in prompts for i in range(options.n_iter * options.n_samples)]
    pages, common = album.Album(options.outdir, columns=options.n_samples), note(options, concepts, size)
    drawn = inference.draw_pictures(model, encoded, jobs, sampling, verbose=sys.stderr.isatty())
    for job, picture in zip(jobs, drawn, strict=True):
        pages.add(picture, job.prompt, {**job._asdict(), **common})
    pages.finish_sheet()
    return {"pictures": pages.pictures, "sheets": pages.sheets}


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    written = draw(options, flags.read_prompts(options.prompt, options.from_file))
    first, last = written["pictures"][0], written["pictures"][-1]
    print(f"{len(written['pictures'])} pictures: {first}" + (f" to {last.name}" if last != first else ""))
    print(f"with their prompts: {', '.join(map(str, written['sheets']))}")


if __name__ == "__main__":
    main()
