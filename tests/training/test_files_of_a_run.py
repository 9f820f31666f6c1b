"""What --resume cannot go on from is named in one line, whatever the file is called and holds."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.training.early_checks import check_files
from ldm.training.log_folder import find_resume_point
from ldm.training.options import TrainingOptions

STATE = {"state_dict": {"concepts.0.embedding": torch.zeros(1)}, "optimizer_states": [],
         "pytorch-lightning_version": "2"}
RUN = "no state of a training run; to start from weights use --actual_resume"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "state_dict" in content:
        torch.save(content, path)
    else:
        save_file(content, path)
    return path


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "x"])
@pytest.mark.parametrize(("content", "message"), [
    ({"state_dict": {"a": torch.zeros(1)}}, RUN), ({**STATE}, RUN),
    *(({**STATE, "global_step": step}, "its global_step is no number of steps") for step in (
        torch.tensor(5), "five", None, -1, 2.5, True)),
    ({"a": torch.zeros(1)}, f"a file of weights, {RUN}"),
    ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, f"is a LoRA, {RUN}"),
    ({"0.target_input": torch.zeros(1), "0.super_input": torch.zeros(1)}, f"is a concept of this project, {RUN}"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    (b"<html>404</html>" * 9, "a web page")])
def test_files_that_are_no_run(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / "checkpoints" / name, content)
    for refuse in (find_resume_point, lambda given: check_files(TrainingOptions(resume=given))):
        with pytest.raises(UserError, match="--resume ") as error:
            refuse(str(path))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_runs_are_found_by_content(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints" / "x", {**STATE, "global_step": 5})
    check_files(TrainingOptions(resume=str(path)))
    assert find_resume_point(str(path)).steps == 5
    with pytest.raises(UserError, match="under a wrong name; rename it to x.ckpt"):
        find_resume_point(str(path.rename(path.with_suffix(".safetensors"))))


def test_the_base_model_is_checked_against_the_merged_configs(tmp_path: Path) -> None:
    config = str(PROJECT_ROOT / "configs" / "perfusion.yaml")
    check_files(TrainingOptions(configs=(config,)))
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.ckpt")
    later = tmp_path / "later.yaml"
    later.write_text(f"model: {{params: {{ckpt_path: {tmp_path / 'lora.ckpt'}}}}}")
    for options in (TrainingOptions(configs=(config, str(later))), TrainingOptions(
            configs=(config,), checkpoint=str(tmp_path / "lora.ckpt"))):
        with pytest.raises(UserError, match="lora.ckpt: is a LoRA, not a base model"):
            check_files(options)
