"""Measure with a CLIP how well images of a concept follow their prompts, and how similar they are to its photos."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.metrics.settings import NO_SEGMENTER, ReferenceSettings  # noqa: E402
from evaluation.sweeps.settings import ClipEvalOptions, FolderSettings, SampleSettings  # noqa: E402
from ldm.cli import generation as flags  # noqa: E402
from ldm.cli.parser import Parser, int_in_range  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.lazy_imports import forward_names  # noqa: E402
from ldm.common.paths import expand_home, resolve_path  # noqa: E402
from ldm.common.words import super_category_words  # noqa: E402

# The classes that Textual Inversion's public file of this name has.
__getattr__ = forward_names(__name__, dict.fromkeys(
    ("CLIPEvaluator", "ImageDirEvaluator", "LDMCLIPEvaluator"), "evaluation.metrics.clip_evaluators"))

DESCRIPTION = f"""{__doc__}

Text similarity is the cosine of image and prompt, with the super-category in place of the concept's word. Image
similarity is the mean cosine of image and photos. Object similarity is the same after a segmenter has cut away
everything but the object. All are multiplied by 100. The central square of each image is measured. Means have 95 %
bootstrap intervals.
"""
EXAMPLES = """examples:
  python evaluation/clip_eval.py --concept logs/.../concept.safetensors --photos models/mini/examples/teddy --save
  python evaluation/clip_eval.py --concept teddy.safetensors --photos my_photos --prompts my_prompts.txt --bias 0.6
  python evaluation/clip_eval.py --images outputs/txt2img-samples/samples --photos my_photos
  python evaluation/clip_eval.py --images my_images --captions my_images.csv --photos my_photos \\
      --super_category "teddy bear" --clip ViT-B-32/openai --segmenter CIDAS/clipseg-rd64-refined

Images that this project generates hold their prompts. A list of prompts has one per line, with {} for the concept:
evaluation/prompts/mini.txt is for the bundled model, evaluation/prompts/photos.txt for Stable Diffusion.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> ClipEvalOptions:
    """Read the command line.

    Raises:
        UserError: flags contradict each other or name something that does not exist.
    """
    parser = Parser(DESCRIPTION, EXAMPLES)
    existing = parser.add_argument_group("existing images")
    existing.add_argument("--images", type=expand_home, metavar="FOLDER", help="measure the images in this folder")
    existing.add_argument("--captions", type=expand_home, metavar="FILE",
                          help="CSV file with the columns file and prompt, and "
                          "optionally category and seed (default: the metadata of the images)")
    existing.add_argument("--prompt", metavar="TEXT", help="the prompt of all images")
    generated = parser.add_argument_group("or images that are generated of a concept")
    add_sample_flags(generated)
    generated.add_argument("--save", action="store_true", help="save the images, and contact sheets of them, to OUTDIR")
    flags.add_concept_flags(parser)
    flags.add_sampling_flags(parser)
    add_reference_flags(parser)
    flags.add_model_flags(parser, outdir="outputs/clip_eval")
    parser.set_defaults(negative_prompt=[])
    options = parser.parse_args(arguments)
    _check_source(options)
    check_references(options)
    flags.check_flags(options)
    folder = FolderSettings(options.images, options.captions, options.prompt) if options.images else None
    return ClipEvalOptions(reference_settings(options), flags.model_settings(options), options.outdir, folder,
                           tuple(options.concept), sample_settings(options), flags.generation_settings(options),
                           options.save)


def add_sample_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of which images are generated; None stands for the defaults of `SampleSettings`."""
    default = SampleSettings()
    group.add_argument("--prompts", type=expand_home, metavar="FILE",
                       help="one prompt per line, with {} for the concept (default: "
                       "evaluation/prompts/mini.txt)")
    group.add_argument("--seeds", type=int_in_range(1), metavar="N",
                       help=f"images per prompt, with seeds from --seed on (default: {default.num_seeds})")
    group.add_argument("--batch_size", type=int_in_range(1), default=default.batch_size, metavar="N",
                       help="images generated at a time (default: %(default)s)")


def sample_settings(options: argparse.Namespace) -> SampleSettings:
    """Return what the flags of `add_sample_flags` say."""
    default = SampleSettings()
    prompts = default.prompts if options.prompts is None else str(resolve_path(options.prompts))
    return SampleSettings(prompts, options.seed, options.seeds or default.num_seeds, options.batch_size)


def add_reference_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what images are compared with."""
    group = parser.add_argument_group("what the images are compared with")
    group.add_argument("--photos", required=True, type=expand_home, metavar="FOLDER", help="the concept's photos")
    group.add_argument("--masks", type=expand_home, metavar="FOLDER",
                       help="a mask for each photo, with the photo's name, white where "
                       "the concept is (default: the segmenter finds it)")
    group.add_argument("--super_category", "--init_word", dest="super_category", metavar="TEXT", help="what kind of "
                       'object it is, such as "teddy bear" (default: what the concept or the images say)')
    group.add_argument("--clip", type=expand_home, metavar="NAME",
                       help="folder with a CLIP of transformers or open_clip, or a name such "
                       "as ViT-B-32/openai: ARCHITECTURE/WEIGHTS of open_clip (default: the model's, or else "
                       "models/mini/evaluation_clip)")
    group.add_argument("--segmenter", type=expand_home, metavar="NAME",
                       help="folder or hub name of a CLIPSeg, or none (default: the "
                       "model's, or else CIDAS/clipseg-rd64-refined)")


def check_references(options: argparse.Namespace) -> None:
    """Raise UserError if the flags of `add_reference_flags` contradict each other or name missing folders."""
    if options.masks and options.segmenter == NO_SEGMENTER:
        raise UserError("--masks serve object similarity, which --segmenter none leaves out; drop one of them")
    if getattr(options, "prompts", None) is not None and not resolve_path(options.prompts).is_file():
        raise UserError(f"--prompts {options.prompts}: no such file; give a text file with one prompt per line")
    for flag in ("photos", "masks"):
        _check_exists(f"--{flag}", getattr(options, flag))


def reference_settings(options: argparse.Namespace) -> ReferenceSettings:
    """Return what the flags of `add_reference_flags` say."""
    masks = None if options.masks is None else str(resolve_path(options.masks))
    words = None if options.super_category is None else super_category_words(options.super_category)
    return ReferenceSettings(str(resolve_path(options.photos)), masks, words, options.clip,
                             options.segmenter)


def _check_source(options: argparse.Namespace) -> None:
    """Raise UserError unless the images come either from a folder or from a concept."""
    if bool(options.images) == bool(options.concept):
        raise UserError("give either --images FOLDER, to measure existing images, or --concept FILE, to generate "
                        "images and measure them")
    for_images = {"--captions": options.captions, "--prompt": options.prompt}
    for_concept = {"--prompts": options.prompts, "--seeds": options.seeds, "--save": options.save}
    unused = for_concept if options.images else for_images
    for flag, value in unused.items():
        if value:
            mode = "--concept" if options.images else "--images"
            raise UserError(f"{flag} requires {mode}; leave it out, or give the images by {mode}")
    if options.captions and options.prompt:
        raise UserError("--captions and --prompt both say what the images were generated from; give one of them")
    _check_exists("--images", options.images)


def _check_exists(flag: str, folder: str | None) -> None:
    if folder and not resolve_path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the one that holds the images")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from evaluation.sweeps import clip_evaluation  # loads torch, which --help need not wait for

    evaluate = clip_evaluation.evaluate_folder if options.folder else clip_evaluation.evaluate_concept
    evaluation = evaluate(options)
    for line in evaluation.lines():
        print(line)
    scores, means = evaluation.write(Path(options.outdir))
    print(f"every image: {scores}\nmeans: {means}")


if __name__ == "__main__":
    main()
