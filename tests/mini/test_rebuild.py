"""Rebuilding the mini model: order, skipped parts, and a very small rebuild that is interrupted."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.mini_runs import write_log_folder
from helpers.tiny_clips import OPEN_TOWERS
from helpers.training_setup import run_main
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.modules.encoders.modules import TOKENIZER
from ldm.training.run_record import record_run, trained_steps
from scripts.mini import export as export_mini
from scripts.mini import rebuild as rebuild_mini
from scripts.mini.rebuild import PARTS, TRAINED, RebuildSettings, config_path, newest_run, rebuild

MODEL = {"target": "some.Model", "params": {}}


class Recorder:
    """Stands in for the scripts: records the commands, and writes what training and exporting write."""

    def __init__(self, settings: RebuildSettings, steps: int | None = None) -> None:
        self.settings, self.steps = settings, steps
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> None:
        self.commands.append(list(command))
        script, *rest = command
        if script == "main.py":
            part = Path(rest[1]).stem if rest[0] == "--base" else rest[1].rpartition("T00-00-00_")[2]
            run = self.settings.logdir / f"2026-01-01T00-00-00_{part}"
            write_log_folder(run, MODEL, steps=self.steps or self.settings.steps(part))
        elif script == "scripts/mini/export.py" and rest[0] in TRAINED:
            record_run(self.settings.folder / "training.json", rest[0], rest[1])

    def summary(self) -> list[str]:
        """The commands in few words."""
        words = {"main.py": lambda rest: f"{rest[0][2:]} {Path(rest[1]).stem.rpartition('_00_')[2]}",
                 "scripts/mini/export.py": lambda rest: f"export {rest[0]}"}
        return [words.get(script, lambda rest, script=script: Path(script).stem)(rest)
                for script, *rest in self.commands]


@pytest.fixture
def settings(tmp_path: Path) -> RebuildSettings:
    return RebuildSettings(tmp_path / "models", tmp_path / "logs")


def test_parts_are_rebuilt_in_the_order_of_their_dependencies(settings: RebuildSettings) -> None:
    run = Recorder(settings)
    rebuild(settings, PARTS, run)
    assert run.summary() == [
        "base autoencoder", "export autoencoder", "base decoder", "export decoder", "base clip", "export clip",
        "base evaluation_clip",
        "export evaluation_clip", "base text2img", "export text2img", "export covariance", "base segmenter",
        "export segmenter", "base encoder", "export encoder", "make_example_concepts", "base_model"]
    (text2img,) = [call for call in run.commands if call[0] == "main.py" and "text2img" in call]
    parts = settings.folder / "parts"
    assert f"model.params.first_stage_config.params.ckpt_path={parts}/autoencoder.safetensors" in text2img
    assert f"model.params.cond_stage_config.params.version={parts}/text_encoder" in text2img


def test_every_config_has_the_keys_that_are_overridden() -> None:
    for part in TRAINED:
        config = OmegaConf.load(config_path(part))
        settings = RebuildSettings(Path("m"), Path("l"), steps_factor=2, batch_factor=4).config_overrides(part)
        assert all(OmegaConf.select(config, setting.partition("=")[0]) is not None for setting in settings)


@pytest.mark.slow
def test_parts_that_are_done_are_skipped(settings: RebuildSettings) -> None:
    rebuild(settings, PARTS, Recorder(settings))
    again = Recorder(settings)
    rebuild(settings, PARTS, again)
    assert again.summary() == ["export covariance", "make_example_concepts", "base_model"]


def test_an_interrupted_run_is_resumed_and_a_finished_one_is_exported(settings: RebuildSettings) -> None:
    rebuild(settings, ["autoencoder"], Recorder(settings, steps=5))  # interrupted after five steps
    write_log_folder(settings.logdir / "2026-01-01T00-00-00_clip", MODEL, steps=settings.steps("clip"))
    run = Recorder(settings)
    rebuild(settings, ["autoencoder", "clip"], run)
    assert [call[:2] for call in run.commands] == [
        ["main.py", "--resume"], ["scripts/mini/export.py", "autoencoder"], ["scripts/mini/export.py", "clip"]]


def test_the_newest_run_has_a_checkpoint_and_the_whole_name(settings: RebuildSettings) -> None:
    write_log_folder(settings.logdir / "2026-01-01T00-00-00_evaluation_clip", MODEL)
    assert newest_run(settings.logdir, "clip") is None
    newer = write_log_folder(settings.logdir / "2026-01-02T00-00-00_clip", MODEL)
    write_log_folder(settings.logdir / "2026-01-03T00-00-00_clip", MODEL)
    (settings.logdir / "2026-01-03T00-00-00_clip" / "checkpoints" / "last.ckpt").unlink()
    assert newest_run(settings.logdir, "clip") == newer


def test_factors_of_steps_and_batches(tmp_path: Path) -> None:
    settings = RebuildSettings(tmp_path, tmp_path, steps_factor=3, batch_factor=4, workers=6)
    config, own = OmegaConf.load(config_path("clip")), OmegaConf.from_dotlist(settings.config_overrides("clip"))
    assert settings.steps("clip") == 3 * config.lightning.trainer.max_steps == own.lightning.trainer.max_steps
    assert own.data.params == {"num_workers": 6, "batch_size": 4 * config.data.params.batch_size}
    rate, before = (c.model.base_learning_rate * c.data.params.batch_size for c in (own, config))
    assert rate == pytest.approx(2 * before)  # with the square root of the batch size


def test_overrides_apply_to_their_part_and_take_precedence(tmp_path: Path) -> None:
    overrides = [("clip", "lightning.trainer.max_steps=7")]
    settings = RebuildSettings(tmp_path, tmp_path, steps_factor=3, overrides=overrides)
    assert settings.steps("clip") == 7 and settings.steps("segmenter") > 7


def test_fresh_renames_earlier_runs(tmp_path: Path) -> None:
    (tmp_path / "logs" / "run").mkdir(parents=True)
    rebuild_mini.rename_earlier_runs(tmp_path / "logs")
    (renamed,) = tmp_path.iterdir()
    assert renamed.name.startswith("logs-until-") and (renamed / "run").is_dir()


def test_training_without_a_checkpoint_is_named(settings: RebuildSettings) -> None:
    with pytest.raises(UserError, match="clip: training left no checkpoint"):
        rebuild(settings, ["clip"], lambda command: None)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--parts", "unet"], "invalid choice"), (["clip.max_steps=3"], "PART:KEY=VALUE"),
    (["--times_batch", "0"], "above 0"), (["--device", "tpu"], "invalid choice")])
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rebuild_mini.main(arguments, run_script=lambda command: None)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_failed_script_is_named() -> None:
    with pytest.raises(UserError, match="scripts/nothing.py failed"):
        rebuild_mini.run_in_project(["scripts/nothing.py"])


@pytest.mark.slow
def test_a_very_small_rebuild_is_resumed_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setattr(export_mini, "world_captions", lambda: ("a cat", "a dog in the snow"))
    scenes = {"data.params.train.params.length": 64, "data.params.validation.params.length": 4,
              "data.params.batch_size": 4, "lightning.trainer.limit_val_batches": 0, "lightning.trainer.devices": 1,
              "data.params.train.params.size": 32, "lightning.trainer.val_check_interval": "null",
              "model.params.tokenizer": TOKENIZER, "model.params.embed_dim": OPEN_TOWERS["embed_dim"]}
    towers = {f"model.params.{tower}.{key}": value
              for tower in ("text_config", "vision_config") for key, value in OPEN_TOWERS[tower].items()}
    tiny = [f"evaluation_clip:{key}={value}" for key, value in {**scenes, **towers}.items()]
    flags = ["--parts", "evaluation_clip", "--device", "cpu", "--outdir", str(tmp_path / "models"), "--logdir",
             str(tmp_path / "logs")]

    def run(command: Sequence[str]) -> None:
        {"main.py": run_main, "scripts/mini/export.py": export_mini.main}[command[0]](list(command[1:]))

    for steps in (1, 2):
        rebuild_mini.main([*flags, *tiny, f"evaluation_clip:lightning.trainer.max_steps={steps}"], run_script=run)
        (folder,) = (tmp_path / "logs").iterdir()
        assert trained_steps(folder) == steps
        entry = json.loads((tmp_path / "models" / "training.json").read_text())["evaluation_clip"]
        assert (entry["steps"], entry["seed"], entry["run"]) == (steps, 71, folder.name)
    assert len(list((folder / "configs").glob("*-machine.json"))) == 2
    assert torch.isfinite(torch.tensor(entry["learning_rate"]))
    assert (tmp_path / "models" / "evaluation_clip" / "model.safetensors").is_file()
