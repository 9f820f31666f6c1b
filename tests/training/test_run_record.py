"""Records of training runs, read from log folders made by hand."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.mini_runs import write_log_folder, write_scalars

from ldm.common.errors import UserError
from ldm.training.run_record import describe_machine, describe_run, read_records, record_run

MODEL = {"target": "ldm.models.mini.openclip.OpenCLIPTrainer", "base_learning_rate": 1e-5, "params": {}}


def test_a_run_is_described_from_its_log_folder(tmp_path: Path) -> None:
    run = write_log_folder(tmp_path / "2026-01-01T00-00-00_clip", MODEL, steps=120)
    write_scalars(run, "train/loss", [100.0, *range(10)], start=1e9)
    write_scalars(run, "val/top1", [0.25, 0.5, 0.75], start=2e9)
    write_scalars(run, "lr-AdamW", [1.0, 2.0], start=3e9)
    record = describe_run(run)
    assert (record["run"], record["steps"], record["batch"], record["seed"]) == (run.name, 120, 4, 5)
    assert record["final"] == {"train/loss": 4.5, "val/top1": 0.75}  # the mean of the last ten, and the last
    assert record["validation"] == {"val/top1": [[10, 0.25], [20, 0.5], [30, 0.75]]}
    assert record["machines"] == [describe_machine()]
    assert record["data"] == {"seed": 2} and record["learning_rate"] == 1e-5


def test_pauses_between_sessions_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_log_folder(tmp_path / "run", MODEL)
    now = 0.0
    monkeypatch.setattr("time.time", lambda: now)  # when a TensorBoard file is created
    for now, values in ((1e9, [1.0] * 6), (1.5e9, [1.0] * 11)):
        write_scalars(run, "train/loss", values, start=now)
    assert describe_run(run)["seconds"] == 10 + 20


def test_machines_are_those_of_all_sessions(tmp_path: Path) -> None:
    run = write_log_folder(tmp_path / "run", MODEL)
    for number, machine in enumerate(({"device": "cpu"}, {"device": "cpu"}, {"device": "a GPU"})):
        (run / "configs" / f"{number}-machine.json").write_text(json.dumps(machine))
    assert describe_run(run)["machines"] == [{"device": "cpu"}, {"device": "a GPU"}]


def test_one_file_records_several_parts(tmp_path: Path) -> None:
    file = tmp_path / "models" / "training.json"
    assert read_records(file) == {}
    record_run(file, "clip", write_log_folder(tmp_path / "a", MODEL, steps=1))
    record_run(file, "segmenter", write_log_folder(tmp_path / "b", MODEL))
    latest = record_run(file, "clip", write_log_folder(tmp_path / "c", MODEL, steps=9))
    records = read_records(file)
    assert records["clip"] == latest and latest["steps"] == 9 and records["segmenter"]["run"] == "b"


def test_a_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["device"] == "cpu" and machine["torch"] == torch.__version__ and machine["processor"]


@pytest.mark.parametrize(("missing", "message"), [("checkpoints/last.ckpt", "holds no checkpoint"),
                                               ("configs/now-project.yaml", "no log folder of a training run")])
def test_incomplete_log_folders_raise_a_user_error(tmp_path: Path, missing: str, message: str) -> None:
    run = write_log_folder(tmp_path / "run", MODEL)
    (run / missing).unlink()
    with pytest.raises(UserError, match=message):
        describe_run(run)


def test_a_broken_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(UserError, match="delete it"):
        record_run(tmp_path / "training.json", "clip", write_log_folder(tmp_path / "run", MODEL))
