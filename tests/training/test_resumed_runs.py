"""A resumed run is compared with the one that it goes on from: configs, flags, and the content of its files."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.training_setup import QUICK, ROOT, resume_run, train_main
from omegaconf import OmegaConf
from PIL import Image

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.training.input_files import INPUTS, describe_inputs, digest_file, restore_paths
from ldm.training.plan import RunPlan, plan_run

TEDDY, TEAPOT = (ROOT / "models" / "mini" / "examples" / name for name in ("teddy", "teapot"))
CONFIG = ROOT / "configs" / "perfusion.yaml"
BASELINE = ROOT / "configs" / "baselines" / "textual-inversion.yaml"
MORE = ("--max_steps", "400")


def plan(*arguments: object) -> RunPlan:
    return plan_run(parse_training_options(list(map(str, arguments))))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A working directory with a folder of photos."""
    folder = tmp_path / "home"
    shutil.copytree(TEDDY, folder / "photos")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture
def run(home: Path) -> Path:
    """The log folder of a run that was stopped at step 7, as `SetupCallback` and the checkpoint callback leave it."""
    return write_run(home / "logs" / "run", "--data_root", "photos")


def write_run(folder: Path, *arguments: object) -> Path:
    config = plan("--base", CONFIG, "-l", folder.parent, *arguments).config
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    parts = {"project": OmegaConf.masked_copy(config, ["model", "data"]),
             "lightning": OmegaConf.masked_copy(config, ["lightning"])}
    for name, part in parts.items():
        OmegaConf.save(part, folder / "configs" / f"2026-01-01T00-00-00.0-{name}.yaml")
    (folder / "configs" / f"2026-01-01T00-00-00.0-{INPUTS}").write_text(json.dumps(describe_inputs(config)))
    state = {"state_dict": {}, "optimizer_states": [], "global_step": 7, "pytorch-lightning_version": "2"}
    torch.save(state, folder / "checkpoints" / "last.ckpt")
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(run: Path, *arguments: object) -> str:
    before = content(run)
    with pytest.raises(UserError, match=f"^--resume {re.escape(str(run))}: differs from the run") as error:
        plan("--resume", run, *arguments)
    assert content(run) == before
    text = str(error.value)
    assert "\n" not in text and "--resume_anyway" in text
    assert plan("--resume", run, *arguments, "--resume_anyway").differs
    return text


def test_the_same_run_needs_no_flag(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    planned = plan("--resume", run)
    assert not planned.differs and planned.resumed.steps == 7 and planned.folder == run
    assert planned.config.data.params.train.params.data_root == "photos"
    # What is given is what the run has, by its content.
    assert not plan("--resume", run, "--base", CONFIG).differs
    assert not plan("--resume", run, "--placeholder", "<my-teddy>", "-s", 23, "data.params.batch_size=16").differs
    assert not caplog.records


@pytest.mark.parametrize(("arguments", "named"), [
    (("--placeholder", "<zz>"), "--placeholder <zz> (the run: <my-teddy>)"),
    (("--init_word", "teapot"), "--init_word teapot (the run: teddy bear)"),
    (("--data_root", TEAPOT), f"--data_root {TEAPOT} (the run: photos)"),
    (("--masks", TEAPOT), "--masks"), (("--masks", "none"), "model.params.segmenter nothing"),
    (("-s", 99), "--seed 99 (the run: 23)"),
    (("model.params.bias=0.2",), "model.params.bias 0.2 (the run: 0.75)"),
    (("data.params.batch_size=8",), "data.params.batch_size 8 (the run: 16)"),
    (("lightning.trainer.accumulate_grad_batches=2",), "accumulate_grad_batches 2 (the run: nothing)"),
    (("--actual_resume", ROOT / "models/mini/segmenter/model.safetensors"), "--actual_resume"),
    (("data.params.train.params.flip_p=0.5",), "flip_p 0.5 (the run: 0.0)"),
    (("--base", BASELINE), "model.target ldm.personalization.textual_inversion")])
def test_what_decides_what_a_run_learns(run: Path, arguments: tuple[object, ...], named: str) -> None:
    text = refusal(run, *arguments, *MORE)
    assert named in text
    assert ("without --base" in text) == ("--base" in arguments)
    if BASELINE in arguments:
        assert "model.params" not in text


def test_another_config_does_not_teach_its_photos_into_the_run(home: Path) -> None:
    pot = write_run(home / "logs" / "pot", "--data_root", TEAPOT, "--init_word", "teapot", "--placeholder", "<pot>")
    text = refusal(pot, "--base", CONFIG, *MORE)
    for named in ("--data_root models/mini/examples/teddy", "--init_word teddy bear", "--placeholder <my-teddy>"):
        assert named in text


@pytest.mark.parametrize("arguments", [
    MORE, ("--accelerator", "cpu"), ("data.params.num_workers=2",), ("lightning.callbacks.previews=null",),
    ("lightning.modelcheckpoint.every_n_train_steps=5",), ("model.params.unet_config.params.use_checkpoint=true",)])
def test_what_may_differ(run: Path, arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not plan("--resume", run, *arguments).differs
    assert "changed since the run began: " in caplog.text


def test_photos_that_changed_are_named(run: Path) -> None:
    photos = run.parents[1] / "photos"
    times = os.stat(photos / "0.png")
    Image.open(photos / "0.png").convert("L").convert("RGB").save(photos / "0.png")
    os.utime(photos / "0.png", (times.st_atime, times.st_mtime))
    (photos / "1.png").unlink()
    shutil.copy(TEAPOT / "0.png", photos / "8.png")
    shutil.copy(TEAPOT / "1.png", photos / "9.png")
    (photos / ".DS_Store").write_text("of the system")
    text = refusal(run, *MORE)
    assert "--data_root photos: 0.png is changed, 8.png, 9.png are new, 1.png is gone; leave" in text


def test_a_moved_base_model_and_moved_photos(run: Path, home: Path) -> None:
    shutil.move(home / "photos", home / "elsewhere")
    shutil.copy(ROOT / "models" / "mini" / "model.safetensors", home / "model.safetensors")
    assert not plan("--resume", run, "--data_root", "elsewhere", "--actual_resume", "model.safetensors").differs


def test_another_base_model_under_the_same_name(home: Path) -> None:
    model = home / "model.safetensors"
    shutil.copy(ROOT / "models" / "mini" / "model.safetensors", model)
    run = write_run(home / "logs" / "own", "--actual_resume", model)
    with model.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert "model.safetensors is changed" in refusal(run, *MORE)


def test_from_anywhere_and_after_a_move(run: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "photos").mkdir(parents=True)  # not those that the run means
    shutil.copy(TEAPOT / "0.png", tmp_path / "other" / "photos")
    (home / "link").symlink_to(run)
    moved = Path(shutil.move(run, tmp_path / "moved"))
    (home / "link").unlink()
    (home / "link").symlink_to(moved)
    for given in (moved, home / "link", moved / "checkpoints" / "last.ckpt"):
        with contextlib.chdir(tmp_path / "other"):
            planned = plan("--resume", given)
        assert not planned.differs and planned.config.data.params.train.params.data_root == str(home / "photos")
    with contextlib.chdir(tmp_path):
        assert not plan("--resume", "moved").differs
    # Run and photos together on another machine.
    shutil.move(home / "photos", tmp_path / "photos")
    with contextlib.chdir(tmp_path):
        assert not plan("--resume", "moved").differs


def test_paths_that_cannot_be_restored_stay(tmp_path: Path) -> None:
    (tmp_path / "photo").mkdir()
    plain = {"data": {"templates": "photo", "data_root": ["photo", "${x}", "gone"], "x": "y"},
             "lightning": {"a_path": "photo"}}
    with contextlib.chdir(ROOT):
        restored = restore_paths(OmegaConf.create(plain), str(tmp_path))
    assert OmegaConf.to_container(restored) == {
        **plain, "data": {**plain["data"], "data_root": [str(tmp_path / "photo"), "${x}", "gone"]}}
    assert restore_paths(OmegaConf.create(plain), None) == plain


def test_folder_names_do_not_apply(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan("--resume", run, "-l", "elsewhere", "-n", "mine", *MORE)
    assert f"--logdir and --name: not used with --resume, which goes on in {run}" in caplog.text


def test_a_finished_run_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert plan("--resume", run, "--max_steps", 7).is_finished
    assert f"--resume {run}: is finished, it has taken 7 steps of 7; to continue, give more" in caplog.text
    assert not plan("--resume", run, "--max_steps", 8).is_finished


def test_runs_of_earlier_versions_are_compared_by_their_configs(run: Path) -> None:
    (record,) = (run / "configs").glob(f"*{INPUTS}")
    for text in ("[1]", "{", "{}", None):
        record.write_text(text) if text else record.unlink()
        assert not plan("--resume", run).differs
    assert "--seed 1" in refusal(run, "-s", 1, *MORE)


def test_large_files_are_told_by_size_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.input_files.WHOLE_FILE", 100)
    monkeypatch.setattr("ldm.training.input_files.END", 10)
    contents = [b"a" * 200, b"a" * 201, b"b" + b"a" * 199, b"a" * 199 + b"b"]
    for index, data in enumerate(contents):
        (tmp_path / str(index)).write_bytes(data)
    assert len({digest_file(tmp_path / str(index)) for index in range(4)}) == 4


@pytest.mark.slow
def test_a_session_that_differs_keeps_the_run_as_it_was(tmp_path: Path) -> None:
    logdir = train_main(tmp_path, *QUICK)
    before = {path.relative_to(logdir): data for path, data in content(logdir).items()}
    with pytest.raises(UserError, match="differs from the run"):
        resume_run(logdir, "--max_steps", 3, "--placeholder", "<zz>")
    assert {path.relative_to(logdir): data for path, data in content(logdir).items()} == before
    resume_run(logdir, "--max_steps", 3, "--placeholder", "<zz>", "--resume_anyway")
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    assert (concept.placeholder, concept.steps) == ("<zz>", 3)
    (kept,) = (logdir / "earlier").iterdir()
    after = {path.relative_to(kept): data for path, data in content(kept).items()}
    assert after == {path: data for path, data in before.items() if path.parts[0] != "tensorboard"}
    # From now on the run is what it has become, and what it was goes on by itself.
    resume_run(logdir, "--max_steps", 4)
    resume_run(kept, "--max_steps", 3)
    (concept,) = load_perfusion_concepts(kept / "concept.safetensors")
    assert (concept.placeholder, concept.steps) == ("<my-teddy>", 3)
