"""The order in which everything is rebuilt, what is passed over, and a very small rebuild that is interrupted."""
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
from ldm.modules.encoders.modules import TOKENIZER
from ldm.training.run_record import record_run, trained_steps
from scripts.mini import export as export_mini
from scripts.mini import rebuild as rebuild_mini
from scripts.mini.rebuild import PARTS, TRAINED, Plan, config_of, newest_run, rebuild

MODEL = {"target": "some.Model", "params": {}}


class Recorder:
    """Stands for the scripts: notes what is started, and leaves what training and exporting leave."""

    def __init__(self, plan: Plan, steps: int | None = None) -> None:
        self.plan, self.steps = plan, steps
        self.calls: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> None:
        self.calls.append(list(command))
        script, *rest = command
        if script == "main.py":
            part = Path(rest[1]).stem if rest[0] == "--base" else rest[1].rpartition("T00-00-00_")[2]
            run = self.plan.logdir / f"2026-01-01T00-00-00_{part}"
            write_log_folder(run, MODEL, steps=self.steps or self.plan.steps(part))
        elif script == "scripts/mini/export.py" and rest[0] in TRAINED:
            record_run(self.plan.folder / "training.json", rest[0], rest[1])

    def told(self) -> list[str]:
        """What was started, in few words."""
        words = {"main.py": lambda rest: f"{rest[0][2:]} {Path(rest[1]).stem.rpartition('_00_')[2]}",
                 "scripts/mini/export.py": lambda rest: f"export {rest[0]}"}
        return [words.get(script, lambda rest, script=script: Path(script).stem)(rest)
                for script, *rest in self.calls]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path / "models", tmp_path / "logs")


def test_parts_come_in_the_order_in_which_they_need_each_other(plan: Plan) -> None:
    run = Recorder(plan)
    rebuild(plan, PARTS, run)
    assert run.told() == [
        "base autoencoder", "export autoencoder", "base decoder", "export decoder", "base clip", "export clip",
        "base evaluation_clip",
        "export evaluation_clip", "base text2img", "export text2img", "export covariance", "base segmenter",
        "export segmenter", "make_example_concepts", "base_model"]
    (text2img,) = [call for call in run.calls if call[0] == "main.py" and "text2img" in call]
    assert f"model.params.first_stage_config.params.ckpt_path={plan.folder}/parts/autoencoder.safetensors" in text2img
    assert f"model.params.cond_stage_config.params.version={plan.folder}/parts/text_encoder" in text2img


def test_every_config_has_what_is_set_in_it() -> None:
    for part in TRAINED:
        config = OmegaConf.load(config_of(part))
        settings = Plan(Path("m"), Path("l"), times_steps=2, times_batch=4).settings(part)
        assert all(OmegaConf.select(config, setting.partition("=")[0]) is not None for setting in settings)


def test_what_is_done_is_passed_over(plan: Plan) -> None:
    rebuild(plan, PARTS, Recorder(plan))
    again = Recorder(plan)
    rebuild(plan, PARTS, again)
    assert again.told() == ["export covariance", "make_example_concepts", "base_model"]


def test_a_run_that_was_cut_off_goes_on_and_one_that_was_not_exported_is(plan: Plan) -> None:
    rebuild(plan, ["autoencoder"], Recorder(plan, steps=5))  # as if it had been stopped after five steps
    write_log_folder(plan.logdir / "2026-01-01T00-00-00_clip", MODEL, steps=plan.steps("clip"))
    run = Recorder(plan)
    rebuild(plan, ["autoencoder", "clip"], run)
    assert [call[:2] for call in run.calls] == [
        ["main.py", "--resume"], ["scripts/mini/export.py", "autoencoder"], ["scripts/mini/export.py", "clip"]]


def test_a_run_without_a_checkpoint_does_not_count_and_names_are_whole(plan: Plan) -> None:
    write_log_folder(plan.logdir / "2026-01-01T00-00-00_evaluation_clip", MODEL)
    assert newest_run(plan.logdir, "clip") is None
    newer = write_log_folder(plan.logdir / "2026-01-02T00-00-00_clip", MODEL)
    write_log_folder(plan.logdir / "2026-01-03T00-00-00_clip", MODEL)
    (plan.logdir / "2026-01-03T00-00-00_clip" / "checkpoints" / "last.ckpt").unlink()
    assert newest_run(plan.logdir, "clip") == newer


def test_more_steps_and_larger_batches(tmp_path: Path) -> None:
    plan = Plan(tmp_path, tmp_path, times_steps=3, times_batch=4, workers=6)
    config, own = OmegaConf.load(config_of("clip")), OmegaConf.from_dotlist(plan.settings("clip"))
    assert plan.steps("clip") == 3 * config.lightning.trainer.max_steps == own.lightning.trainer.max_steps
    assert own.data.params == {"num_workers": 6, "batch_size": 4 * config.data.params.batch_size}
    rate, before = (c.model.base_learning_rate * c.data.params.batch_size for c in (own, config))
    assert rate == pytest.approx(2 * before)  # as the root of the batch


def test_overrides_go_to_their_part_and_have_the_last_word(tmp_path: Path) -> None:
    plan = Plan(tmp_path, tmp_path, times_steps=3, overrides=[("clip", "lightning.trainer.max_steps=7")])
    assert plan.steps("clip") == 7 and plan.steps("segmenter") > 7


def test_fresh_keeps_earlier_runs_aside(tmp_path: Path) -> None:
    (tmp_path / "logs" / "run").mkdir(parents=True)
    rebuild_mini.set_aside(tmp_path / "logs")
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("logs-until-") and (kept / "run").is_dir()


def test_training_that_leaves_nothing_is_named(plan: Plan) -> None:
    with pytest.raises(UserError, match="clip: training left no checkpoint"):
        rebuild(plan, ["clip"], lambda command: None)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--parts", "unet"], "invalid choice"), (["clip.max_steps=3"], "PART:KEY=VALUE"),
    (["--times_batch", "0"], "above 0"), (["--device", "tpu"], "invalid choice")])
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rebuild_mini.main(arguments, run=lambda command: None)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_script_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="scripts/nothing.py failed"):
        rebuild_mini.start(["scripts/nothing.py"])


def test_a_very_small_rebuild_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rebuild_mini.ROOT)
    monkeypatch.setattr(export_mini, "captions_of_the_world", lambda: ("a cat", "a dog in the snow"))
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
        rebuild_mini.main([*flags, *tiny, f"evaluation_clip:lightning.trainer.max_steps={steps}"], run=run)
        (folder,) = (tmp_path / "logs").iterdir()
        assert trained_steps(folder) == steps
        entry = json.loads((tmp_path / "models" / "training.json").read_text())["evaluation_clip"]
        assert (entry["steps"], entry["seed"], entry["run"]) == (steps, 71, folder.name)
    assert len(list((folder / "configs").glob("*-machine.json"))) == 2
    assert torch.isfinite(torch.tensor(entry["learning_rate"]))
    assert (tmp_path / "models" / "evaluation_clip" / "model.safetensors").is_file()
