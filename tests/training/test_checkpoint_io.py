"""Checkpoints on disks that are full, beside a system folder for temporary files that is small."""
from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_setup import FEW_IMAGES, load_state, resume_run, train_main

import ldm.training.checkpoint_io
from ldm.common.errors import FileNotWritten, UserError
from ldm.concepts.storage import load_concepts
from ldm.training.checkpoint_io import AtomicCheckpointIO

STATE = {"global_step": 7, "state_dict": {"weight": torch.arange(50_000.0)}}
ONE_A_STEP = (*FEW_IMAGES, "--masks", "none", "--max_steps", 3, "lightning.modelcheckpoint.every_n_train_steps=1",
              "lightning.callbacks.previews=null", "data.params.batch_size=2")


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse files of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))


def test_checkpoints_are_as_torch_writes_them(tmp_path: Path, no_temporary_folder: None) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == 7 and torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("room", [0, 1000, 100_000, 200_000])
def test_an_older_checkpoint_stays_if_there_is_no_room(tmp_path: Path, room: int) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 6}, path)
    with largest_file(room), pytest.raises(FileNotWritten, match="last.ckpt: cannot be written .File too large."):
        AtomicCheckpointIO().save_checkpoint(STATE, path)
    assert torch.load(path, weights_only=True) == {"global_step": 6} and list(tmp_path.iterdir()) == [path]


def test_a_link_to_another_checkpoint_does_not_overwrite_that(tmp_path: Path) -> None:
    torch.save({"global_step": 6}, tmp_path / "000006.ckpt")
    (tmp_path / "last.ckpt").symlink_to("000006.ckpt")
    AtomicCheckpointIO().save_checkpoint({"global_step": 7}, tmp_path / "last.ckpt")
    steps = [torch.load(tmp_path / name, weights_only=True)["global_step"] for name in ("000006.ckpt", "last.ckpt")]
    assert steps == [6, 7]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_full_disk_leaves_a_checkpoint_and_the_concept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
                                                         ) -> None:
    """Each step writes two checkpoints, the one with its number first."""
    save, written = ldm.training.checkpoint_io._save, []

    def save_some(checkpoint: dict[str, Any], path: Path) -> None:
        if len(written) == writes:
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, path)
        written.append(checkpoint["global_step"])

    monkeypatch.setattr(ldm.training.checkpoint_io, "_save", save_some)
    with pytest.raises(UserError, match="No space left on device.*continue with: python main.py --resume") as refused:
        train_main(tmp_path, *ONE_A_STEP)
    (logdir,) = tmp_path.iterdir()
    (concept,) = load_concepts(logdir / "concept.safetensors")
    assert concept.steps == 1 + writes // 2
    checkpoints = {path.name: torch.load(path, weights_only=True)["global_step"]
                   for path in (logdir / "checkpoints").iterdir()}
    assert max(checkpoints.values()) == written[-1]

    # The command in the message continues the run.
    monkeypatch.undo()
    command = str(refused.value).partition("--resume ")[2]
    assert Path(command).exists() and str(logdir) in command
    resume_run(Path(command))
    assert load_state(logdir)["global_step"] == 3


@pytest.mark.slow
def test_a_run_needs_no_temporary_folder(tmp_path: Path, no_temporary_folder: None) -> None:
    assert load_state(train_main(tmp_path, *ONE_A_STEP))["global_step"] == 3
