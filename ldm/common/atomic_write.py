"""Write files atomically: an interruption leaves the old file or the new one, and nothing finished is lost.

A file is written under a temporary name in the same folder and then renamed. Folders differ in what they allow (network
drives, memory cards, folders that a program synchronizes), so each step has something to fall back on.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ldm.common.errors import FileNotWritten
from ldm.common.paths import user_path

log = logging.getLogger(__name__)

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
NEW_FILE_MODE = 0o666  # less the umask
LONGEST_KEPT_SUFFIX = 16  # bytes of the end of a name that its temporary name keeps

Writer = Callable[[Path], object]


def write_atomically(path: str | Path, write: Writer) -> Path:
    """Call `write` with a temporary path in the same folder, then rename the result to `path`, and return `path`.

    A symbolic link stays: the file that it names is replaced. A file that exists keeps its permissions. If the folder
    disappears meanwhile, it is created again, and `write` is called again.

    Raises:
        FileNotWritten: (a UserError) the folder cannot be created or written to, the disk is full, or the file is
            read-only. If only the last step failed, the message names the temporary file, which stays.
    """
    path = user_path(path)
    with _reported(path):
        target = _follow_links(path)
        _check_replaceable(path, target)
        if target.exists() and not target.is_file():
            return _write_into_device(path, write)
    with _write_temporary(path, target, write) as temporary:
        _copy_permissions(target, temporary)
        _move(temporary, target, path)
    return path


def write_new(paths: Iterable[Path], write: Writer) -> Path:
    """Write a file as `write_atomically` does, under the first of `paths` that does not exist yet; return that path.

    Other processes may write to the same folder with the same names: each name is taken in one step that only one of
    them can succeed in.

    Args:
        paths: candidates in one folder, of which there must be enough. No more are taken than are needed.
        write: called once, with a temporary path.

    Raises:
        FileNotWritten: as `write_atomically`.
    """
    candidates = iter(paths)
    path = next(candidates)
    with _write_temporary(path, path, write) as temporary:
        while not _take_name(temporary, path):
            path = next(candidates)
    return path


# Before writing


def _follow_links(path: Path) -> Path:
    """Return the file that a symbolic link names, whether it exists or not; any other path as it is."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # part of a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _check_replaceable(path: Path, target: Path) -> None:
    """Raise FileNotWritten if the target is a folder, or is a file that nobody may write to.

    A rename would replace a read-only file, too.
    """
    if target.is_dir():
        raise FileNotWritten(f"{path}: is a folder; choose another name")
    if target.is_file() and not stat.S_IMODE(target.stat().st_mode) & 0o222:
        raise FileNotWritten(f"{path}: is read-only; choose another name, or allow writing to it")


def _write_into_device(path: Path, write: Writer) -> Path:
    """Write to a device or a pipe, such as /dev/null, which a rename would destroy."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "content"
        write(temporary)
        with temporary.open("rb") as source, path.open("wb") as device:
            shutil.copyfileobj(source, device)
    return path


# The temporary file


@contextlib.contextmanager
def _write_temporary(path: Path, target: Path, write: Writer) -> Iterator[Path]:
    """Create a temporary file beside `target` and let `write` fill it; remove it in the end unless it was moved.

    It stays if a finished file can neither be renamed nor copied.
    """
    temporary = _fill_temporary(path, target, write)
    try:
        yield temporary
    except FileNotWritten:
        raise
    except BaseException:
        _remove(temporary)
        raise
    _remove(temporary)


def _fill_temporary(path: Path, target: Path, write: Writer) -> Path:
    """Return a temporary file that `write` has filled. If its folder disappears meanwhile, try once more."""
    try:
        return _try_to_fill(path, target, write)
    except FileNotWritten:
        if target.parent.is_dir():
            raise
    return _try_to_fill(path, target, write)


def _try_to_fill(path: Path, target: Path, write: Writer) -> Path:
    with _reported(path):
        temporary = _create_beside(target)
        try:
            write(temporary)
            os.stat(temporary)  # raises if the folder was removed
        except BaseException:
            _remove(temporary)
            raise
    return temporary


def _create_beside(target: Path) -> Path:
    """Create an empty file beside `target` with the permissions that new files have (by the umask).

    `tempfile.mkstemp` makes files that only their owner may read. To mend that, one would have to know the umask, which
    no thread can read without changing it for all others.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary = target.with_name(_temporary_name(target.name))
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, NEW_FILE, NEW_FILE_MODE))
            return temporary


def _temporary_name(name: str) -> str:
    """Return a hidden, random name with the suffix of `name` that is not longer, if `name` has more than 25 bytes."""
    stem, suffix = os.path.splitext(name)
    if len(os.fsencode(suffix)) > LONGEST_KEPT_SUFFIX:
        suffix = ""
    token = secrets.token_hex(4)
    room = len(os.fsencode(name)) - len(os.fsencode(f"..{token}{suffix}"))
    while len(os.fsencode(stem)) > max(0, room):  # whole characters, of up to four bytes each
        stem = stem[:-1]
    return f".{stem}.{token}{suffix}" if stem else f".{token}{suffix}"


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _copy_permissions(source: Path, destination: Path) -> None:
    """Give `destination` the permissions of `source`, if that exists and the folder knows permissions."""
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(source.stat().st_mode)
        if mode != stat.S_IMODE(destination.stat().st_mode):
            os.chmod(destination, mode)


# The final name


def _move(temporary: Path, target: Path, path: Path) -> None:
    """Rename the temporary file to its target, or copy it where renaming is refused.

    Raises:
        FileNotWritten: neither is possible; names both files.
    """
    try:
        os.replace(temporary, target)
        return
    except OSError as error:
        refusal = error
    log.debug("%s: cannot be renamed to (%s); copying", target, refusal.strerror)
    existed = target.exists()
    try:
        shutil.copyfile(temporary, target)
    except OSError:
        if not temporary.exists():
            raise FileNotWritten(f"{path}: its folder was removed while the file was written; write it again") from None
        if not existed:
            _remove(target)  # a part of the copy
        raise FileNotWritten(f"{path}: cannot be given its name ({refusal.strerror}); the finished file is {temporary}"
                             ) from None


def _take_name(temporary: Path, path: Path) -> bool:
    """Give the temporary file a name that no file has; return False if one has it.

    A hard link does this in one step. Where there are none, an empty file takes the name and is then replaced.
    """
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        log.debug("%s: no hard links here", path)
    try:
        os.close(os.open(path, NEW_FILE, NEW_FILE_MODE))
    except FileExistsError:
        return False
    except OSError as error:
        raise FileNotWritten(f"{path}: cannot be given its name ({error.strerror}); the finished file is {temporary}"
                             ) from None
    _move(temporary, path, path)
    return True


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn a failure to write into a FileNotWritten that names the file and the system's reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileNotWritten(f"{path}: cannot be written ({reason}); free some space or choose another folder"
                             ) from None
