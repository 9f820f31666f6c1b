"""The files that a run trains on: which ones a config names, what they hold, and where they were. Imports no torch."""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.common.paths import resolve_path

# Keys whose values may be files or folders; other words of a config may be the names of files by chance.
PATH_KEY = re.compile(r"(root|path|dir|folder|file|ckpt|covariance|segmenter|version)$")
SECTIONS = ("model", "data")
MOST_FILES = 2000  # of a folder that is recorded; data sets are larger
WHOLE_FILE = 2**26  # bytes; of a larger file only its size and both ends are read
END = 2**20  # bytes
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # Windows adds them to folders of photos

Files = dict[str, str]  # name -> digest of each file of a folder, or of a single file
INPUTS = "inputs.json"  # in the run's configs/, after date and time


def describe_inputs(config: DictConfig) -> dict[str, Any]:
    """Return the working directory and the content of all files that a run's config names.

    Returns:
        working_directory: what relative paths count from.
        files: key of the config -> one dict of digests for each path, None for one that is not recorded.
    """
    files: dict[str, list[Files | None]] = {}
    for key, value in _named_paths(_plain_values(config)):
        found = resolve_path(value)
        files.setdefault(key, []).append(digest_files(found) if os.path.exists(found) else None)
    return {"working_directory": os.getcwd(), "files": files}


def newest_inputs(folder: Path) -> dict[str, Any]:
    """Return what `describe_inputs` returned in the last session of a run; empty for runs of earlier versions."""
    records = sorted((folder / "configs").glob(f"*-{INPUTS}"))
    try:
        found = json.loads(records[-1].read_text(encoding="utf-8")) if records else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("files", {}), dict) else {}


def digest_files(path: Path) -> Files | None:
    """Return a digest of a file, or of each file in a folder and its folders; None if there are too many."""
    if path.is_file():
        return {path.name: digest_file(path)}
    found = (entry for entry in path.rglob("*") if not _is_ignored(entry.relative_to(path)) and entry.is_file())
    files = list(itertools.islice(found, MOST_FILES + 1))
    if len(files) > MOST_FILES:
        return None
    return {str(file.relative_to(path)): digest_file(file) for file in sorted(files)}


def digest_file(path: Path) -> str:
    """Return a digest of a file's content; of a large file, of its size and both ends."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= WHOLE_FILE:
                digest.update(file.read())
            else:
                digest.update(f"{size} ".encode() + file.read(END))
                file.seek(-END, os.SEEK_END)
                digest.update(file.read(END))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return digest.hexdigest()


def describe_changes(before: Files, after: Files) -> str:
    """Say which files of a folder changed, came or went; "" if none."""
    names = {"changed": [name for name in before if name in after and before[name] != after[name]],
             "new": [name for name in after if name not in before],
             "gone": [name for name in before if name not in after]}
    return ", ".join(f"{_listed(several)} {'is' if len(several) == 1 else 'are'} {what}"
                     for what, several in names.items() if several)


def restore_paths(config: DictConfig, working_directory: str | None) -> DictConfig:
    """Return a config in which relative paths are those that they were in the run's own working directory.

    A path is left as it is if it names the same file from here, or if the file is no longer there.
    """
    if not working_directory:
        return config
    folder = Path(working_directory)

    def restore(value: str) -> str:
        there = folder / value
        is_elsewhere = "${" not in value and not value.startswith("~") and not os.path.isabs(value) and there.exists()
        here = resolve_path(value) if is_elsewhere else there
        return str(there) if is_elsewhere and not (here.exists() and here.samefile(there)) else value

    plain = OmegaConf.to_container(config, resolve=False)
    for section in SECTIONS:
        if section in plain:
            plain[section] = _map_paths(plain[section], restore)
    return OmegaConf.create(plain)


def _plain_values(config: DictConfig) -> Any:
    """Return the sections that name inputs, as plain values. A part of a config may refer to what it lacks."""
    sections = OmegaConf.masked_copy(config, [name for name in SECTIONS if name in config])
    try:
        return OmegaConf.to_container(sections, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(sections, resolve=False)


def _named_paths(section: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of each leaf that may be a path. The values of a list share its key."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            yield from _named_paths(value, f"{key}.{name}" if key else str(name))
    elif isinstance(section, list):
        for value in section:
            yield from _named_paths(value, key)
    elif isinstance(section, str) and section and PATH_KEY.search(key):
        yield key, section


def _map_paths(section: Any, change: Callable[[str], str], key: str = "") -> Any:
    """Return a copy of plain values with each leaf that may be a path changed."""
    if isinstance(section, dict):
        return {name: _map_paths(value, change, str(name)) for name, value in section.items()}
    if isinstance(section, list):
        return [_map_paths(value, change, key) for value in section]
    return change(section) if isinstance(section, str) and section and PATH_KEY.search(key) else section


def _is_ignored(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts) or path.name.lower() in SYSTEM_FILES


def _listed(names: list[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
