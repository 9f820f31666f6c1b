"""Combine concept files into one, to use several learned concepts in the same prompt."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser
from ldm.common.errors import UserError, one_line_errors
from ldm.common.paths import expand_home, quote_command

if TYPE_CHECKING:
    from ldm.concepts.concept import Concept
    from ldm.concepts.finetuned_concept import AnyConcept

EXAMPLE = """example:
  python merge_embeddings.py --manager_ckpts teddy.safetensors mug.safetensors --output_path both.safetensors

Then use both in one image:
  python scripts/txt2img.py --concept both.safetensors --prompt "a photo of a <teddy> next to a <mug>"

Embeddings of Textual Inversion go with concepts as words alone. With each other they also combine to a .pt file of
Textual Inversion's public code, here for Stable Diffusion:
  python merge_embeddings.py --manager_ckpts teddy.pt mug.pt --output_path both.pt -sd
"""
CONCEPT_FILE = ".safetensors"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(f"{__doc__}\nThe files must come from the same base model and the same method (Perfusion, Textual\n"
                    "Inversion, Custom Diffusion or another whose weights can be merged). Nothing is trained.", EXAMPLE)
    parser.add_argument(
        "--manager_ckpts", "--concepts", nargs="+", required=True, type=expand_home, metavar="FILE",
        help="concept files to combine, from training or from this script",
    )
    parser.add_argument("--output_path", required=True, type=expand_home, metavar="FILE",
                        help="path of the combined file")
    parser.add_argument(
        "--placeholders", nargs="+", metavar="WORD",
        help='the word that stands for each concept in prompts, in the order of the files, such as "<teddy>" "<mug>"; '
        "by default concepts keep theirs, and if two have the same, the second becomes <name-2>; for .pt files you are "
        "asked for another word",
    )
    parser.add_argument(
        "-sd", "--stable_diffusion", action="store_true",
        help="the .pt files are for Stable Diffusion (default: decided by the width of their vectors)",
    )
    parser.add_argument(
        "--covariance", type=expand_home, metavar="FILE",
        help="covariance that concepts of older files were trained with; the combined file then needs none any more "
        "(new concept files do not need this)",
    )
    parser.add_argument(
        "--thumbnail", nargs="?", const="", type=expand_home, metavar="IMAGE",
        help="store a small image for model browsers: this one, or by default those of the files side by side",
    )
    return parser.parse_args(arguments)


def describe_concepts(before: Sequence[AnyConcept], after: Sequence[AnyConcept]) -> str:
    """Return one line per concept: placeholder, super-category, file, and the old placeholder if it was renamed."""
    lines = []
    for old, new in zip(before, after, strict=True):
        renamed = f", was {old.placeholder}" if old.placeholder != new.placeholder else ""
        lines.append(f"  {new.placeholder}: {new.super_category}, from {old.source}{renamed}")
    return "\n".join(lines)


def save_combined(path: Path, concepts: Sequence[AnyConcept], image: str | None = None) -> None:
    """Write the combined file without changing a number.

    Args:
        path: the file.
        concepts: those that it will hold.
        image: what `--thumbnail` was given: an image file, or "" for the concepts' thumbnails, or None for no image.

    Raises:
        UserError: that is not possible.
    """
    if path.is_dir():
        raise UserError(f"--output_path {path}: is a folder; name a file, such as {path / 'concepts.safetensors'}")
    from ldm.concepts.concept import Concept
    from ldm.concepts.concept_file import save_perfusion_concepts
    from ldm.concepts.storage import save_concepts

    if image is None:
        save_concepts(path, concepts, precision=None)
    elif isinstance(concepts[0], Concept):
        save_perfusion_concepts(path, concepts, None, read_thumbnail_of(image, concepts))
    else:
        raise UserError(f"--thumbnail: only Perfusion's files hold one, and {concepts[0].label} was learned "
                        f"{concepts[0].summary}; leave it out")


def read_thumbnail_of(image: str, concepts: Sequence[Concept]) -> str:
    """Return the thumbnail for a file: of an image file, or those of the concepts, side by side, if `image` is "".

    Raises:
        UserError: the file is no image, or no concept has a thumbnail.
    """
    from ldm.concepts.thumbnail import join_thumbnails, make_thumbnail
    from ldm.data.images import read_image

    if image:
        return make_thumbnail(read_image(image))
    joined = join_thumbnails([concept.thumbnail for concept in concepts if concept.thumbnail])
    if not joined:
        raise UserError("--thumbnail: none of the files has one; name an image, or train with "
                        "model.params.thumbnail=true")
    return joined


def ask_for_word(word: str, fits: Callable[[str], bool]) -> str | None:
    """Ask for a word in place of one that is taken, until it fits; return None if nobody can answer."""
    question = f"Placeholder {word} is taken already. Another word for it: "
    while True:
        try:
            answer = input(question).strip()
        except (EOFError, OSError):
            return None
        if fits(answer):
            return answer
        question = f"{answer!r} is taken, or is not exactly one token. Another word: "


def merge_public_files(options: argparse.Namespace) -> None:
    """Combine files of Textual Inversion's public code, and print the placeholders with their files."""
    from ldm.concepts import word_merging

    loaded = word_merging.load_words(options.manager_ckpts)
    words = [word for word, _ in loaded]
    tokenizer = word_merging.tokenizer_for(words, options.stable_diffusion)
    words = word_merging.give_distinct_names(words, tokenizer, ask_for_word, options.placeholders)
    output = word_merging.save_words(options.output_path, words, tokenizer)
    print(f"{output}: {len(words)} placeholders")
    for word, (_, path) in zip(words, loaded, strict=True):
        print(f"  {word.word}: {len(word.vectors)} vectors, from {path}")


def is_concept_file(path: str) -> bool:
    """Return whether a file has this project's format, whatever it is called.

    Raises:
        UserError: it is missing, or is known to hold no concept.
    """
    from ldm.checkpoints.early_checks import check_concept, holds_own_concept

    check_concept(path)
    return holds_own_concept(path)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if not any(map(is_concept_file, options.manager_ckpts)) and Path(options.output_path).suffix != CONCEPT_FILE:
        merge_public_files(options)
        return
    # Imported only now, since torch takes long to load and --help does not need it.
    from ldm.concepts.concept import Concept
    from ldm.concepts.duals import add_duals_of
    from ldm.concepts.merging import check_one_base, merge_concepts
    from ldm.concepts.storage import load_concepts

    # Combine.
    before = []
    for path in options.manager_ckpts:
        before += load_concepts(path)
    after = merge_concepts(before, options.placeholders)
    check_one_base(after)
    if options.covariance and isinstance(after[0], Concept):
        after = add_duals_of(options.covariance, after)
    output = Path(options.output_path)
    replaced = " (replaced)" if output.exists() else ""
    save_combined(output, after, options.thumbnail)

    # Say what the file contains, and how to use it.
    print(f"{output}: {len(after)} concepts, {output.stat().st_size / 1000:.1f} KB{replaced}")
    print(describe_concepts(before, after))
    older = [concept.placeholder for concept in after if isinstance(concept, Concept) and concept.dual is None]
    if older:
        print(f"From older files, which lack what the edit needs of the covariance: {', '.join(older)}. Images are the "
              "same, but other programs cannot use them; give the covariance of their training with --covariance")
    prompt = " next to ".join(f"a {concept.placeholder}" for concept in after)
    print(f'Use it: python scripts/txt2img.py --concept {quote_command(output)} --prompt "a photo of {prompt}"')


if __name__ == "__main__":
    main()
