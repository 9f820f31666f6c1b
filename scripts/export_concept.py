"""Write the word of a concept as an embedding for another tool. It is the word alone, without the edit."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.checkpoints.early_checks import check_concept  # noqa: E402
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder, expand_home, user_path  # noqa: E402

if TYPE_CHECKING:
    from ldm.concepts.finetuned_concept import AnyConcept

TOOLS = ("a1111", "diffusers", "comfyui")
DESCRIPTION = f"""{__doc__}

Perfusion's edit of keys and values is what makes a subject look like its photos, so expect less of the word alone. In
diffusers and ComfyUI the whole concept can be used: see docs/diffusers.md and docs/comfyui.md.
"""
EXAMPLES = """example:
  python scripts/export_concept.py --to a1111 teddy.safetensors
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(DESCRIPTION, EXAMPLES)
    parser.add_argument("concept", nargs="+", type=expand_home, metavar="FILE", help="concept files of any method")
    parser.add_argument("--to", choices=TOOLS, required=True, help="the tool that is to read the word: AUTOMATIC1111's "
                        "web UI (and its forks), diffusers or ComfyUI")
    parser.add_argument("--out", type=user_path, metavar="FOLDER",
                        help="folder to write to (default: outputs/embeddings/TOOL)")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("outputs/embeddings") / options.to
    check_folder("--out", options.out)
    for path in options.concept:
        check_concept(path)
    return options


def check_names(names: Sequence[str]) -> None:
    """Raise UserError if two words would get a file of the same name."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"several concepts would be called {name}; export them one by one to different folders")


def how_to_use(tool: str, concept: AnyConcept, paths: Sequence[Path]) -> str:
    """Return how the files of a word are used in a tool, in one line."""
    name = paths[0].stem
    if tool == "a1111":
        return f"copy it to the web UI's folder embeddings, and write {name} in prompts"
    if tool == "comfyui":
        return f"copy it to ComfyUI/models/embeddings, and write embedding:{name} in prompts"
    calls = [f'pipe.load_textual_inversion("{paths[0]}")']
    calls += [f'pipe.load_textual_inversion("{path}", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)'
              for path in paths[1:]]
    return f"{'; '.join(calls)}; and {concept.placeholder} in prompts"


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # Imported only now, since torch takes long to load and --help does not need it.
    from ldm.concepts.storage import load_concepts
    from ldm.concepts.word_export import export_word, word_name

    concepts = [concept for path in options.concept for concept in load_concepts(path)]
    check_names([word_name(concept) for concept in concepts])
    for concept in concepts:
        paths = export_word(concept, options.to, options.out)
        count, widths = len(concept.word_vectors), " and ".join(map(str, concept.word_parts.values()))
        print(f"{' and '.join(map(str, paths))}: the word {concept.placeholder} alone, without the edit that makes it "
              f"look like its photos; {count} vector{'s' if count > 1 else ''} of {widths} numbers")
        print(f"Use it: {how_to_use(options.to, concept, paths)}")


if __name__ == "__main__":
    main()
