"""Combines concept files into one, so that several learned concepts can stand in the same prompt."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser
from ldm.common.errors import UserError, one_line_errors
from ldm.common.paths import quote_command

if TYPE_CHECKING:
    from ldm.concepts.finetuned_concept import AnyConcept

EXAMPLE = """example:
  python merge_embeddings.py --manager_ckpts teddy.safetensors mug.safetensors --output_path both.safetensors

Then use both in one picture:
  python scripts/txt2img.py --concept both.safetensors --prompt "a photo of a <teddy> next to a <mug>"
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(f"{__doc__}\nThe files must come from the same base model and the same method (Perfusion, Textual\n"
                    "Inversion or Custom Diffusion). Nothing is trained or changed.", EXAMPLE)
    parser.add_argument(
        "--manager_ckpts", "--concepts", nargs="+", required=True, metavar="FILE",
        help="concept files to combine, each made by training or by this script",
    )
    parser.add_argument("--output_path", required=True, metavar="FILE", help="where to write the combined file")
    parser.add_argument(
        "--placeholders", nargs="+", metavar="WORD",
        help='the word that stands for each concept in prompts, in the order of the files, such as "<teddy>" "<mug>"; '
        "without this flag concepts keep theirs, and where two have the same the second becomes <name-2>",
    )
    return parser.parse_args(arguments)


def describe(before: Sequence[AnyConcept], after: Sequence[AnyConcept]) -> str:
    """One line per concept: its placeholder, what it is, where it is from, and what it was called before."""
    lines = []
    for old, new in zip(before, after, strict=True):
        renamed = f", was {old.placeholder}" if old.placeholder != new.placeholder else ""
        lines.append(f"  {new.placeholder}: {new.super_category}, from {old.source}{renamed}")
    return "\n".join(lines)


def write(path: Path, concepts: Sequence[AnyConcept]) -> None:
    """Writes the combined file without changing a number; a UserError where that is not possible."""
    if path.is_dir():
        raise UserError(f"--output_path {path}: is a folder; name a file, such as {path / 'concepts.safetensors'}")
    from ldm.concepts.finetuned_concept import save_concepts

    save_concepts(path, concepts, precision=None)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    from ldm.concepts.finetuned_concept import load_concepts, merge_concepts  # here, as torch takes its time

    before = [concept for path in options.manager_ckpts for concept in load_concepts(path)]
    after = merge_concepts(before, options.placeholders)
    path = Path(options.output_path)
    replaced = " (replaced)" if path.exists() else ""
    write(path, after)
    print(f"{path}: {len(after)} concepts, {path.stat().st_size / 1000:.1f} KB{replaced}")
    print(describe(before, after))
    prompt = " next to ".join(f"a {concept.placeholder}" for concept in after)
    print(f'Use it: python scripts/txt2img.py --concept {quote_command(path)} --prompt "a photo of {prompt}"')


if __name__ == "__main__":
    main()
