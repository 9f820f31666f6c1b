"""Files that are written atomically, in folders that allow more and less."""
from __future__ import annotations

import errno
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors import SafetensorError

from ldm.common.atomic_write import write_atomically, write_new
from ldm.common.errors import UserError

MULTIBYTE = {2: "é", 3: "猫", 4: "🐈"}


def write_text(text: str = "new") -> Any:
    return lambda temporary: temporary.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(monkeypatch: pytest.MonkeyPatch, *functions: str, code: int = errno.EPERM) -> None:
    """Let functions of `os` fail, as in the folders of some network drives, memory cards and synchronizing programs."""
    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    for name in functions:
        monkeypatch.setattr(os, name, refused)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("halfway", [b"", b"half of the new content"])
def test_an_interruption_leaves_the_old_file(tmp_path: Path, halfway: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(halfway)
        raise Interrupted

    with pytest.raises(Interrupted):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_old_file_exists_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent and temporary.suffix == path.suffix

    assert write_atomically(path, write) == path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "file.txt", lambda temporary: temporary.write_text("x"))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_umask_of_other_threads_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(mask: int) -> int:
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", forbidden)
    assert write_atomically(tmp_path / "file.txt", lambda temporary: temporary.write_text("x")).read_text() == "x"


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "below.txt", lambda temporary: temporary.write_text("x"))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"),
                                     SafetensorError("I/O error: 28")])
def test_a_full_disk_gives_one_line_and_keeps_the_old_file(tmp_path: Path, failure: Exception) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("a part")
        raise failure

    with pytest.raises(UserError, match=r"file.txt: cannot be written \((No space left on device|I/O error: 28)\)"):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Folders that allow less


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EXDEV, errno.EBUSY, errno.EEXIST])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_copied_where_renaming_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int,
                                                    old: str | None) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    refuse(monkeypatch, "replace", "rename", code=code)
    write_atomically(path, write_text())
    assert path.read_text() == "new" and names(tmp_path) == ["file.txt"]


def test_a_finished_file_stays_under_its_temporary_name_if_nothing_else_is_allowed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "replace", "link")
    monkeypatch.setattr("shutil.copyfile", os.replace)  # refused, too
    with pytest.raises(UserError, match="file.txt: cannot be given its name .Operation not permitted.") as refused:
        write_atomically(tmp_path / "file.txt", write_text())
    left, = tmp_path.iterdir()
    assert left.read_text() == "new" and str(left) in str(refused.value)


def test_permissions_of_the_old_file_are_kept_where_that_is_allowed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "private.txt"
    path.write_text("old")
    path.chmod(0o600)
    write_atomically(path, write_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "new"
    refuse(monkeypatch, "chmod", "fchmod")
    write_atomically(path, write_text("newer"))
    assert path.read_text() == "newer" and names(tmp_path) == ["private.txt"]


def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(UserError, match="file.txt: is read-only"):
        write_atomically(path, write_text())
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_atomically(tmp_path, write_text())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["", ".png", ".safetensors", ".a-suffix-that-is-longer-than-all-the-usual-ones"])
def test_the_longest_name_that_the_disk_takes_can_be_written(tmp_path: Path, size: int, suffix: str) -> None:
    stem = MULTIBYTE.get(size, "a") * ((255 - len(suffix)) // size)
    for path in (tmp_path / f"{stem}{suffix}", tmp_path / f"new-{stem}{suffix}"[:-1 - len(suffix)]):
        if len(os.fsencode(path.name)) <= 255:
            write_atomically(path, write_text())
            write_new([path.with_name(f"1{path.name}"[:-1]), tmp_path / "other"], write_text())
            assert path.read_text() == "new"
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="longer than the name of a file may be"):
        write_atomically(tmp_path / ("a" * 256), write_text())


# Links and devices


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_a_symbolic_link_is_written_through(tmp_path: Path, exists: bool, relative: bool) -> None:
    target, first, link = tmp_path / "disk" / "real.txt", tmp_path / "first.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    first.symlink_to("disk/real.txt" if relative else target)
    link.symlink_to(first)
    assert write_atomically(link, write_text()) == link
    assert link.is_symlink() and first.is_symlink() and target.read_text() == link.read_text() == "new"
    assert names(target.parent) == ["real.txt"]


def test_a_link_to_itself_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "a", write_text())
    assert (tmp_path / "a").is_symlink()


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    write_atomically("/dev/null", write_text())
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write_atomically(tmp_path / "null", write_text())
    assert (tmp_path / "null").is_symlink() and names(tmp_path) == ["null"]


# Folders that change meanwhile


def test_a_folder_that_is_removed_meanwhile_is_created_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "run" / "images" / "file.txt", []

    def write(temporary: Path) -> None:
        calls.append(temporary)
        temporary.write_text("new")
        if len(calls) == 1:
            temporary.unlink()
            temporary.parent.rmdir()

    write_atomically(path, write)
    assert path.read_text() == "new" and len(calls) == 2


def test_a_folder_that_is_removed_again_and_again_gives_one_line(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("new")
        temporary.unlink()
        temporary.parent.rmdir()

    for write_file in (write_atomically, lambda path, write: write_new([path], write)):
        with pytest.raises(UserError, match="file.txt: cannot be written .No such file or directory."):
            write_file(tmp_path / "run" / "file.txt", write)


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_atomically("~/deep/file.txt", write_text()) == tmp_path / "deep" / "file.txt"
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"


# New names


def numbered(folder: Path) -> Iterator[Path]:
    return (folder / f"{number:05}.txt" for number in itertools.count())


@pytest.mark.parametrize("refused", [(), ("link",), ("link", "replace")])
def test_a_new_file_takes_the_first_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              refused: tuple[str, ...]) -> None:
    (tmp_path / "00000.txt").write_text("old")
    (tmp_path / "00001.txt").symlink_to(tmp_path / "nowhere")
    refuse(monkeypatch, *refused)
    assert write_new(numbered(tmp_path), write_text("a")).name == "00002.txt"

    def write(temporary: Path) -> None:  # another process is faster
        temporary.write_text("b")
        (tmp_path / "00003.txt").write_text("c")

    assert write_new(numbered(tmp_path), write).name == "00004.txt"
    assert names(tmp_path) == [f"0000{number}.txt" for number in range(5)]
    contents = {path.name: path.read_text() for path in tmp_path.iterdir() if not path.is_symlink()}
    assert contents == {"00000.txt": "old", "00002.txt": "a", "00003.txt": "c", "00004.txt": "b"}


def test_a_failure_leaves_no_new_file(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="00000.txt: cannot be written .No space left on device."):
        write_new(numbered(tmp_path), write)
    assert names(tmp_path) == []


RACE = """
import itertools, os, sys
from pathlib import Path
from ldm.common.atomic_write import write_new
folder, who, has_links = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
if not has_links:
    def link(*_): raise PermissionError(1, "Operation not permitted")
    os.link = link
for number in range(60):
    paths = (folder / f"{index:05}.txt" for index in itertools.count())
    write_new(paths, lambda temporary: temporary.write_text(f"{who} {number}"))
"""


@pytest.mark.parametrize("has_links", [True, False])
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, has_links: bool) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), who, str(has_links)]) for who in "ABC"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    contents = sorted(path.read_text() for path in tmp_path.iterdir())
    assert contents == sorted(f"{who} {number}" for who in "ABC" for number in range(60))
