"""Images with the prompts that they were generated from, as a folder has them."""
from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from evaluation.metrics.registry import METRICS, Scores
from evaluation.prompts.prompt_sets import UNCATEGORIZED
from ldm.common.errors import UserError
from ldm.common.prompt_file import SLOT
from ldm.common.text_files import read_text
from ldm.common.words import spell_out
from ldm.concepts.placeholders import PLACEHOLDER
from ldm.concepts.prompt_weights import plain_text
from ldm.data.images import crop_square, list_images, read_image
from ldm.inference.output_folder import read_metadata

log = logging.getLogger(__name__)

COLUMNS = ("file", "prompt")  # a list of captions must have these; it may also have "category" and "seed"
ALL = "all"  # the name of all categories together
T = TypeVar("T")


@dataclass(frozen=True)
class Caption:
    """The prompt of an image, and what else is known about it.

    Attributes:
        prompt: what it was generated from, with a placeholder or `{}` for each concept.
        super_categories: placeholder -> super-category, of the concepts that it was generated with.
        category: what the prompt asks of the concept, such as "style".
        seed: seed of the image's noise, if known.
        file: the image's file; None if it was not saved.
        prompt_weights: whether brackets in the prompt weight words; False: they are text.
    """

    prompt: str
    super_categories: Mapping[str, str] = field(default_factory=dict)
    category: str = UNCATEGORIZED
    seed: int | None = None
    file: Path | None = None
    prompt_weights: bool = True

    def text(self, super_category: str | None) -> str:
        """Return the prompt in plain words, without weights, with super-categories in place of concepts.

        Args:
            super_category: replaces that of the image's concept if there is only one; if there are several, it stands
                for those that are not known.

        Raises:
            UserError: nothing says what a placeholder stands for, or the prompt has syntax of other tools that has no
                plain words.
        """
        words = dict(self.super_categories)
        if len(words) == 1 and super_category:
            words = dict.fromkeys(words, super_category)
        prompt = plain_text(self.prompt, list(words)) if self.prompt_weights else self.prompt
        text = spell_out(words, prompt)
        unknown = [word for word in (SLOT, *re.findall(PLACEHOLDER, text)) if word in text]
        if unknown and super_category is None:
            raise UserError(f"--super_category: nothing says what {unknown[0]} is in the prompt {self.prompt!r}; give "
                            'words such as "teddy bear"')
        return spell_out(dict.fromkeys(unknown, super_category), text)


def read_captions(folder: str | Path, list_file: str | Path | None = None, prompt: str | None = None) -> list[Caption]:
    """Return the captions of the images in a folder, in the order of the list or of the file names.

    Args:
        folder: holds the images.
        list_file: CSV file with the columns "file" (relative to the folder) and "prompt", and optionally "category" and
            "seed". None: the captions come from `prompt` or from the images' own metadata.
        prompt: the prompt of all images. None: the images hold metadata, as those that this project generates.

    Raises:
        UserError: the folder or the list cannot be used, or the prompt of an image is not known.
    """
    if list_file is not None:
        return _read_list(Path(folder), Path(list_file))
    paths = list_images(folder)
    return [Caption(prompt, file=path) if prompt else _from_metadata(path) for path in paths]


def _from_metadata(path: Path) -> Caption:
    try:
        metadata = read_metadata(path)
    except (OSError, ValueError):  # not an image, or metadata of another program
        metadata = {}
    if not isinstance(metadata.get("prompt"), str):
        raise UserError(f"{path}: nothing says what it was generated from; give --captions FILE.csv, or --prompt for "
                        "all images")
    concepts = metadata.get("concepts", ())
    super_categories = {concept["placeholder"]: concept["super_category"] for concept in concepts}
    category, seed = metadata.get("category", UNCATEGORIZED), metadata.get("seed")
    return Caption(metadata["prompt"], super_categories, category, seed, path, metadata.get("prompt_weights", True))


def _read_list(folder: Path, list_file: Path) -> list[Caption]:
    captions = [_from_row(folder, list_file, number, row)
                for number, row in enumerate(_read_rows(list_file), start=2)]  # line 1 holds the column names
    present = {path.name for path in list_images(folder)}
    unlisted = len(present - {caption.file.name for caption in captions})
    if unlisted:
        log.warning("warning: %d images of %s are not in %s; left out", unlisted, folder, list_file)
    return captions


def _read_rows(list_file: Path) -> list[dict[str, str]]:
    text = read_text(list_file, f"--captions {list_file}", f"the columns {','.join(COLUMNS)}")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error:
        raise UserError(f"--captions {list_file}: not readable as CSV in UTF-8; give a file whose first line is "
                        f"{','.join(COLUMNS)}") from None
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"--captions {list_file}: its first line must be {','.join(COLUMNS)}, with a line for each "
                        "image below it")
    return rows


def _from_row(folder: Path, list_file: Path, number: int, row: Mapping[str, str | None]) -> Caption:
    name, prompt, category, seed = ((row.get(column) or "").strip() for column in (*COLUMNS, "category", "seed"))
    if not name:
        problem = "it lacks a file"
    elif not prompt:
        problem = "it lacks a prompt"
    elif not (folder / name).is_file():
        problem = f"there is no {folder / name}"
    else:
        return Caption(prompt, category=category or UNCATEGORIZED, seed=int(seed) if seed.isdigit() else None,
                       file=folder / name)
    raise UserError(f"--captions {list_file}, line {number}: {problem}; correct the line or leave it out")


def common_side(captions: Sequence[Caption], maximum: int) -> int:
    """Return the side in pixels of squares that all images can be cropped to without enlarging one, up to `maximum`.

    Raises:
        UserError: an image cannot be read.
    """
    return min(maximum, *(min(read_image(caption.file).size) for caption in captions))


def read_squares(captions: Iterable[Caption], side: int) -> Iterator[Image.Image]:
    """Yield the central square of each image, which is read only then."""
    return (crop_square(read_image(caption.file), side) for caption in captions)


def score_records(captions: Sequence[Caption], texts: Sequence[str], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """Return a record for each image, for a CSV file."""
    records = []
    for caption, text, score in zip(captions, texts, scores, strict=True):
        values = {metric.column: score[metric.name] for metric in METRICS}
        records.append({"category": caption.category, "prompt": caption.prompt, "seed": caption.seed, "text": text,
                        **values, "file": caption.file})
    return records


def group_by_category(captions: Sequence[Caption], values: Sequence[T]) -> dict[str, list[T]]:
    """Return the values of the images of each category, in the order of the prompts, and then those of all images."""
    groups: dict[str, list[T]] = {}
    for caption, value in zip(captions, values, strict=True):
        groups.setdefault(caption.category, []).append(value)
    return {**(groups if len(groups) > 1 else {}), ALL: list(values)}
