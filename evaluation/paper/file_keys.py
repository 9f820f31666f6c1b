"""Keys for result files: short names for everything that a result depends on."""
from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.common.paths import PROJECT_ROOT, resolve_path

KEY_LENGTH = 10
MAX_PATH_LENGTH = 256


def short_key(value: Any) -> str:
    """Return a short name for plain data. Paths in the project give the same name wherever the project is."""
    text = json.dumps(value, sort_keys=True, default=str)
    root = json.dumps(f"{PROJECT_ROOT}{os.sep}")[1:-1]  # as it stands in JSON
    return hashlib.blake2b(text.replace(root, "").encode()).hexdigest()[:KEY_LENGTH]


def content_digests(value: Any, *paths: str | Path | None) -> dict[str, str]:
    """Return a digest of the contents of each file and folder that plain data names, by its path.

    Args:
        value: texts in it count as paths if they contain a separator; others may be words that happen to be the name of
            a folder.
        paths: further paths, with or without a separator. A name of something to download is ignored.
    """
    texts = {*_possible_paths(value), *(str(path) for path in paths if path is not None)}
    return {text: content_digest(text) for text in sorted(texts) if resolve_path(text).exists()}


@functools.cache
def content_digest(path: str | Path) -> str:
    """Return a digest of a file, or of all files in a folder; relative paths may start at the project's root."""
    found, state = resolve_path(path), hashlib.blake2b()
    for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
        if file.is_file():
            state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()[:KEY_LENGTH]


def _possible_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _possible_paths(inner)
    elif isinstance(value, str) and len(value) < MAX_PATH_LENGTH and ("/" in value or os.sep in value):
        yield value
