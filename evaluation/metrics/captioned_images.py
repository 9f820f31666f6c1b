"""Pictures with the prompts that they were drawn from: as a folder has them, and what is measured in them."""
from __future__ import annotations

import csv
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from evaluation.metrics.similarity import Similarity, SimilarityMeter
from evaluation.prompts.prompt_sets import UNCATEGORIZED
from evaluation.sweeps.samples import as_batch
from ldm.common.errors import UserError
from ldm.common.words import replace_words
from ldm.concepts.placeholders import PLACEHOLDER
from ldm.data.images import crop_square, list_images, read_image
from ldm.data.templates import SLOT
from ldm.inference.output_folder import read_note

log = logging.getLogger(__name__)

COLUMNS = ("file", "prompt")  # that a list of captions has to have; it may also have "category" and "seed"
AT_A_TIME = 64  # pictures in memory
ALL = "all"  # the row of all categories
T = TypeVar("T")


@dataclass(frozen=True)
class Caption:
    """What is known of a picture.

    Attributes:
        prompt: what it was drawn from; concepts stand in it by their placeholders, or as `{}`.
        words: placeholder -> super-category, of the concepts it was drawn with.
        file: where it is; None of one that was not kept.
    """

    prompt: str
    words: Mapping[str, str] = field(default_factory=dict)
    category: str = UNCATEGORIZED
    seed: int | None = None
    file: Path | None = None

    def text(self, super_category: str | None) -> str:
        """The prompt in plain words; `super_category` stands for its concept, of several for those not known.

        Raises:
            UserError: nothing says what a placeholder stands for.
        """
        only = super_category if len(self.words) == 1 else None
        text = replace_words({placeholder: only or words for placeholder, words in self.words.items()}, self.prompt)
        unknown = [word for word in (SLOT, *re.findall(PLACEHOLDER, text)) if word in text]
        if unknown and super_category is None:
            raise UserError(f"--super_category: nothing says what {unknown[0]} is in the prompt {self.prompt!r}; give "
                            'words such as "teddy bear"')
        return replace_words(dict.fromkeys(unknown, super_category), text)


def captions_of(folder: str | Path, listed: str | Path | None = None, prompt: str | None = None) -> list[Caption]:
    """The pictures of a folder with their prompts, in the order of the list or of the files' names.

    Args:
        listed: a CSV file with the columns "file", relative to the folder, and "prompt", and perhaps "category" and
            "seed". None: `prompt` is that of all of them, or else they have notes, as those that this project draws.

    Raises:
        UserError: the folder or the list cannot be used, or the prompt of a picture is not known.
    """
    if listed is not None:
        return _listed(Path(folder), Path(listed))
    paths = list_images(folder)
    return [Caption(prompt, file=path) if prompt else _noted(path) for path in paths]


def _noted(path: Path) -> Caption:
    try:
        note = read_note(path)
    except (OSError, ValueError):  # no picture, or a note of someone else's
        note = {}
    if not isinstance(note.get("prompt"), str):
        raise UserError(f"{path}: nothing says what it was drawn from; give --captions FILE.csv, or --prompt for all")
    words = {one["placeholder"]: one["super_category"] for one in note.get("concepts", ())}
    return Caption(note["prompt"], words, note.get("category", UNCATEGORIZED), note.get("seed"), path)


def _listed(folder: Path, listed: Path) -> list[Caption]:
    there = {path.name for path in list_images(folder)}
    captions = [_of_row(folder, listed, number, row) for number, row in enumerate(_rows(listed), start=2)]
    left_out = len(there - {caption.file.name for caption in captions})
    if left_out:
        log.warning("warning: %d pictures of %s are not in %s; left out", left_out, folder, listed)
    return captions


def _rows(listed: Path) -> list[dict[str, str]]:
    try:
        with listed.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(f"--captions {listed}: not readable as CSV in UTF-8; give a file whose first line is "
                        f"{','.join(COLUMNS)}") from None
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"--captions {listed}: its first line has to be {','.join(COLUMNS)}, with a line for each "
                        "picture below it")
    return rows


def _of_row(folder: Path, listed: Path, number: int, row: Mapping[str, str | None]) -> Caption:
    name, prompt, seed = ((row.get(column) or "").strip() for column in (*COLUMNS, "seed"))
    if not name or not prompt or not (folder / name).is_file():
        missing = f"there is no {folder / name}" if name and prompt else f"it lacks a {'prompt' if name else 'file'}"
        raise UserError(f"--captions {listed}, line {number}: {missing}; correct the line or leave it out")
    return Caption(prompt, category=(row.get("category") or "").strip() or UNCATEGORIZED,
                   seed=int(seed) if seed.isdigit() else None, file=folder / name)


def common_side(captions: Sequence[Caption], most: int) -> int:
    """The shortest side of all pictures, in pixels, or `most`: as large as all of them can be shown without blowing up.

    Raises:
        UserError: one of them cannot be read.
    """
    return min(most, *(min(read_image(caption.file).size) for caption in captions))


def squares(captions: Iterable[Caption], side: int) -> Iterator[Image.Image]:
    """The middle of each picture, read when it is its turn."""
    return (crop_square(read_image(caption.file), side) for caption in captions)


def measured(meter: SimilarityMeter, pictures: Iterable[Image.Image], texts: Sequence[str]) -> list[Similarity]:
    """How similar each picture is to its text and to the photos; `pictures` are all of one size."""
    found: list[Similarity] = []
    waiting = iter(tqdm(pictures, desc="measuring", total=len(texts), leave=False, disable=None))
    while some := list(itertools.islice(waiting, AT_A_TIME)):
        found += meter(as_batch(some), texts[len(found):len(found) + len(some)])
    return found


def records(captions: Sequence[Caption], texts: Sequence[str], found: Sequence[Similarity]) -> list[dict[str, Any]]:
    """A line for a CSV file for each picture."""
    return [{"category": caption.category, "prompt": caption.prompt, "seed": caption.seed, "text": text,
             "text_similarity": one.text, "image_similarity": one.image, "object_similarity": one.object,
             "file": caption.file} for caption, text, one in zip(captions, texts, found, strict=True)]


def by_category(captions: Sequence[Caption], found: Sequence[T]) -> dict[str, list[T]]:
    """What was found in the pictures of each category, in the order of the prompts, and at the end in all."""
    groups: dict[str, list[T]] = {}
    for caption, one in zip(captions, found, strict=True):
        groups.setdefault(caption.category, []).append(one)
    return {**(groups if len(groups) > 1 else {}), ALL: list(found)}
