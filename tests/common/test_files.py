from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors, write_atomically

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.float16), "n": torch.tensor(7)}


def test_tensors_and_metadata_survive(tmp_path: Path) -> None:
    notes = {"words": ["<my-teddy>", "ünïcode"], "steps": 400, "name": "text", "none": None}
    path = save_tensors(tmp_path / "deep" / "er" / "x.safetensors", TENSORS, notes)
    tensors, metadata = load_tensors(path)
    assert metadata == notes and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items())


def test_views_and_shared_memory_are_stored_completely(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    views = {"table": table, "row": table[1], "turned": table.T, "every": table[:, ::2].requires_grad_()}
    stored, _ = load_tensors(save_tensors(tmp_path / "x.safetensors", views, {}))
    assert all(torch.equal(stored[key], value) for key, value in views.items())


def test_metadata_that_is_not_json_stays_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "count": "3"})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"format": "pt", "count": 3}


def test_deeply_nested_metadata_stays_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    deep = "[" * 100_000
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"perfusion": deep})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"perfusion": deep}


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


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    content = save_tensors(tmp_path / "whole.safetensors", TENSORS, {"steps": 400}).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"cut.safetensors: not a complete safetensors file"):
        load_tensors(tmp_path / "cut.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="other.safetensors"):
        load_tensors(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["none.safetensors", "."])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_tensors(tmp_path / name)
