"""Say what concept files hold: words, base model, settings, size, and whether they need anything else.

    python scripts/describe_concept.py teddy.safetensors
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.parser import Parser  # noqa: E402
from ldm.common.atomic_write import write_atomically  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_file, user_path  # noqa: E402

if TYPE_CHECKING:
    from ldm.concepts.concept import Concept
    from ldm.concepts.finetuned_concept import AnyConcept


@dataclass(frozen=True)
class DescribeOptions:
    """Options of the script.

    Attributes:
        files: concept files.
        thumbnail: where to write the thumbnail of the only file; None: nowhere.
    """

    files: Sequence[Path]
    thumbnail: Path | None = None


def parse_arguments(arguments: Sequence[str] | None = None) -> DescribeOptions:
    """Read the command line.

    Raises:
        UserError: a flag is wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=user_path, metavar="FILE", help="concept files of any method")
    parser.add_argument("--thumbnail", type=user_path, metavar="FILE",
                        help="write the small JPEG image that the file holds to this file, such as thumbnail.jpg")
    options = parser.parse_args(arguments)
    if options.thumbnail is not None:
        check_file("--thumbnail", options.thumbnail)
        if len(options.files) > 1:
            raise UserError(f"--thumbnail: {len(options.files)} files; give one")
    return DescribeOptions(options.files, options.thumbnail)


def describe_file(path: Path, concepts: Sequence[AnyConcept]) -> str:
    """Return the description of a file in a few lines."""
    from ldm.concepts.concept import Concept

    size = path.stat().st_size / 1000
    lines = [f"{path}: {concepts[0].method_label}, {len(concepts)} concept{'s' * (len(concepts) > 1)}, {size:.1f} KB"]
    for concept in concepts:
        lines.append(f"  {concept.placeholder}")
        facts = describe_edit(concept) if isinstance(concept, Concept) else {}
        for name, value in {**describe_any(concept), **facts}.items():
            if value:
                lines.append(f"    {name:<16} {value}")
    return "\n".join(lines)


def describe_any(concept: AnyConcept) -> dict[str, str]:
    """Return what is known of a concept of any method, by name."""
    from ldm.concepts.fingerprint import base_label

    return {
        "super-category": concept.super_category,
        "base model": base_label(concept),
        "steps": f"{concept.steps:,}" if concept.steps else "",
    }


def describe_edit(concept: Concept) -> dict[str, str]:
    """Return what else is known of Perfusion's concepts, by name."""
    parts = [f"{name} ({width} numbers)" for name, width in concept.word_parts.items()]
    layers = f"{len(concept.target_outputs_v)} layers" + (", keys trained" if concept.target_outputs_k else "")
    stored = "yes: nothing else is needed" if concept.dual is not None else (
        "no, from an older version: it needs the covariance of its text encoder")
    return {
        "learned on": concept.date,
        "photos of": concept.resolution,
        "predicts": concept.prediction_type,
        "gate": concept.summary,
        "word": " and ".join(parts),
        "values of": layers,
        "pooled vector of": concept.pooled.replace("_", "-") if len(concept.word_parts) > 1 else "",
        "dual vector": stored,
        "thumbnail": f"{len(concept.thumbnail):,} bytes" if concept.thumbnail else "",
    }


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # Imported only now, since torch takes long to load and --help does not need it.
    from ldm.concepts.storage import load_concepts
    from ldm.concepts.thumbnail import jpeg_of, stored_thumbnail

    for path in options.files:
        print(describe_file(path, load_concepts(path)))
    if options.thumbnail is not None:
        thumbnail = stored_thumbnail(options.files[0])
        if not thumbnail:
            raise UserError(f"{options.files[0]}: holds no thumbnail")
        write_atomically(options.thumbnail, lambda temporary: temporary.write_bytes(jpeg_of(thumbnail)))


if __name__ == "__main__":
    main()
