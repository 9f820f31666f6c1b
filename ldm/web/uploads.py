"""Check uploaded files as photos, by content, size and number, and copy them into a run."""
from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from ldm.common.errors import UserError
from ldm.web.model_imports import import_models
from ldm.web.run_folder import RunFolder

MOST_PHOTOS = 40
MOST_BYTES = 60_000_000  # of one photo's file
SAFE = re.compile(r"[^A-Za-z0-9._-]+")
LONGEST_NAME = 80


def add_photos(run: RunFolder, files: Sequence[str | Path]) -> list[str]:
    """Copy the photos among uploaded files into a run. Their names keep only safe characters.

    Args:
        run: the run; it may have photos already.
        files: paths of the uploaded files.

    Returns:
        One line for each file that is no usable photo.

    Raises:
        UserError: there are too many files.
    """
    present = list(run.photos.iterdir())
    if len(present) + len(files) > MOST_PHOTOS:
        raise UserError(f"{len(present) + len(files)} photos: a concept needs 1 to 20, and at most {MOST_PHOTOS} fit; "
                        "choose the best ones")
    refused = []
    for file in map(Path, files):
        try:
            _check_photo(file)
        except UserError as error:
            refused.append(str(error).replace(str(file), file.name))
            continue
        target = free_path(run.photos, safe_name(file.name))
        shutil.copyfile(file, target)
    return refused


def safe_name(name: str) -> str:
    """Return a file name without folders, hidden beginnings and unusual characters."""
    plain = unicodedata.normalize("NFKD", name.replace("\\", "/").rpartition("/")[2])
    cleaned = SAFE.sub("_", plain.encode("ascii", "ignore").decode()).lstrip("._-")
    stem, dot, suffix = cleaned.rpartition(".")
    stem, suffix = (stem, suffix) if dot else (cleaned, "")
    return f"{stem[:LONGEST_NAME] or 'photo'}{dot and '.'}{suffix[:8].lower()}"


def _check_photo(file: Path) -> None:
    """Raise UserError if the file is no photo that can be read."""
    if not file.is_file() or file.is_symlink():
        raise UserError(f"{file}: no such file; upload it again")
    if file.stat().st_size > MOST_BYTES:
        raise UserError(f"{file}: {file.stat().st_size / 1e6:.0f} MB is more than a photo needs "
                        f"({MOST_BYTES // 10**6} MB); save it smaller")
    import_models()
    from ldm.data.images import read_image

    read_image(file)


def free_path(folder: Path, name: str) -> Path:
    """Return a path in the folder that no file has yet."""
    stem, dot, suffix = name.rpartition(".")
    path, number = folder / name, 2
    while path.exists():
        path = folder / f"{stem if dot else name}-{number}{dot}{suffix if dot else ''}"
        number += 1
    return path
