"""Find, quote and check paths that users and configs name."""
from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from ldm.common.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def resolve_path(path: str | Path) -> Path:
    """Return the path to open for one that a user or a config names.

    A relative path counts from the working directory. If nothing is there, it counts from the project's root, so that
    `models/mini` in a bundled config is found from anywhere. A path that exists in neither is returned as it is.
    """
    given = Path(path)
    if given.is_absolute() or given.exists():
        return given
    bundled = PROJECT_ROOT / given
    return bundled if bundled.exists() else given


def quote_command(*words: object) -> str:
    """Join words into a command line that the user's shell understands."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def check_folder(flag: str, folder: Path) -> None:
    """Raise UserError if `folder` is not a directory or cannot be created and written to. Creates nothing."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is not a folder; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} cannot be written to; choose another path")


def check_file(flag: str, file: Path) -> None:
    """Raise UserError if `file` could not be written. Creates nothing."""
    if file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; name a file in it, such as {file / 'result.safetensors'}")
    check_folder(flag, file.parent)
