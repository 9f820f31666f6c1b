"""Checks on the paths that users name, and the quoting of paths in commands that are shown to them."""
from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from ldm.common.errors import UserError


def quoted(*words: object) -> str:
    """Words of a command as the user's shell takes them: Windows knows no single quotes."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def check_folder(flag: str, folder: Path) -> None:
    """Raises a UserError where the `folder` of `flag` is none, or could not be made or written to; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {folder}: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {there} cannot be written to; choose another place")


def check_file(flag: str, file: Path) -> None:
    """Raises a UserError where the `file` of `flag` could not be written; makes nothing."""
    if file.is_dir():
        raise UserError(f"{flag} {file}: is a folder; name a file in it, such as {file / 'result.safetensors'}")
    check_folder(flag, file.parent)
