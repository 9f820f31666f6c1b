"""Find, quote and check paths that users and configs name."""
from __future__ import annotations

import errno
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ldm.common.errors import UserError

_CHECKOUT = Path(__file__).resolve().parents[2]
_INSTALLED = _CHECKOUT / "ldm" / "bundled"  # where setup.py puts models and configs if pip copies the package
LONGEST_SHOWN = 80  # characters of a name in a message
PROJECT_ROOT = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def expand_home(path: str | Path) -> str:
    """Return a path that a user or a config names with a leading `~` or `~user` replaced by that home folder.

    This is the type of the flags for files, folders and names of models, which may be folders. A shell expands `~` only
    at the start of a word: not in `--outdir=~/images`, in quotes or in YAML. As in a shell, a user that does not exist
    is left as it is, and `./~` is a file called `~`. Environment variables and `file://` addresses are not expanded.

    Raises:
        UserError: no file can have this name, such as a prompt in the place of its file.
    """
    text = os.fspath(path)
    # Path drops a leading "./", so that a later call would expand what this one must not.
    expanded = os.path.abspath(text) if text.startswith("./~") else os.path.expanduser(text)
    _check_name(expanded)
    return expanded


def _check_name(path: str) -> None:
    """Raise UserError if no file can have this name. Afterwards, pathlib can be asked about it without errors."""
    try:
        os.lstat(path)
    except ValueError:  # a null character
        raise UserError(f"{path!r}: not the name of a file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{path[:LONGEST_SHOWN]}...: longer than the name of a file may be; give a path") from None


def user_path(path: str | Path) -> Path:
    """Return what `expand_home` returns as a `Path`; the type of flags that can only be paths."""
    return Path(expand_home(path))


def resolve_path(path: str | Path) -> Path:
    """Return the path to open for one that a user or a config names. A leading `~` is expanded.

    A relative path counts from the working directory. If nothing is there, it counts from the project's root, so that
    `models/mini` in a bundled config is found from anywhere. A path that exists in neither is returned as it is.
    """
    given = user_path(path)
    if given.is_absolute() or os.path.exists(given):
        return given
    bundled = PROJECT_ROOT / given
    return bundled if os.path.exists(bundled) else given


def listed_paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths to open for one path, several, or a text that lists several, separated by commas."""
    if not isinstance(paths, str | Path):
        return [resolve_path(path) for path in paths]
    whole = resolve_path(paths)
    if isinstance(paths, Path) or os.path.exists(whole) or "," not in paths:
        return [whole]
    return [resolve_path(path.strip()) for path in paths.split(",") if path.strip()]


def quote_command(*words: object) -> str:
    """Join words into a command line that the user's shell understands."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def check_folder(flag: str, folder: Path) -> None:
    """Raise UserError if `folder` is not a directory or cannot be created and written to. Creates nothing."""
    folder = user_path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is not a folder; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {existing} cannot be written to; choose another path")


def check_file(flag: str, file: Path) -> None:
    """Raise UserError if `file` could not be written. Creates nothing."""
    file = user_path(file)
    if os.path.isdir(file):
        raise UserError(f"{flag} {file}: is a folder; name a file in it, such as {file / 'result.safetensors'}")
    check_folder(flag, file.parent)
