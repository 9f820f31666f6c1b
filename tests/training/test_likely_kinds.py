"""A run without a super-category names the three likeliest kinds, if a CLIP is on this machine, and asks."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.training_setup import ROOT
from omegaconf import OmegaConf

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.data.kinds import EVERYDAY_KINDS
from ldm.data.mini.world import KIND_NAMES
from ldm.training.likely_kinds import clip_at_hand, kinds_known_to, likely_kinds
from ldm.training.plan import plan_run

CONFIG = ROOT / "configs" / "perfusion.yaml"
EXAMPLES = ROOT / "models" / "mini" / "examples"


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        plan_run(parse_training_options(list(map(str, arguments))))
    return str(error.value)


@pytest.mark.parametrize(("example", "first"), [("teddy", "teddy bear"), ("teapot", "teapot"), ("mug", "mug")])
def test_the_likeliest_kinds(example: str, first: str) -> None:
    text = refusal("--base", CONFIG, "--data_root", EXAMPLES / example, "--init_word", "")
    assert text.startswith(f"no super-category: the photos look like {first}, ")
    assert text.endswith(f'; give one, for example --init_word "{first}"')


@pytest.mark.parametrize("value", ["null", "' '"])
def test_no_value_in_the_config(value: str) -> None:
    assert "the photos look like teddy bear, " in refusal("--base", CONFIG, f"model.params.super_category={value}")


def test_a_value_that_the_config_requires(tmp_path: Path) -> None:
    text = CONFIG.read_text().replace("super_category: teddy bear", "super_category: ???")
    (tmp_path / "c.yaml").write_text(text)
    assert "the photos look like teddy bear, " in refusal("--base", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(text.replace("data_root: models/mini/examples/teddy", "data_root: ???"))
    assert "look like" not in refusal("--base", tmp_path / "c.yaml")


def test_without_a_clip_it_only_asks(tmp_path: Path) -> None:
    shutil.copy(ROOT / "models" / "mini" / "model.safetensors", tmp_path)
    text = refusal("--base", CONFIG, "--init_word", "", "--actual_resume", tmp_path / "model.safetensors")
    assert text == 'no super-category: say what kind of subject it is, for example --init_word "teddy bear"'
    config = OmegaConf.create({"model": {"params": {"ckpt_path": str(tmp_path / "model.safetensors")}},
                               "inference": {"evaluation_clip": "ViT-B-32/openai"}})
    assert clip_at_hand(config) is None and likely_kinds(EXAMPLES / "teddy", config) == []
    config.inference.evaluation_clip = "models/mini/evaluation_clip"
    assert len(likely_kinds(EXAMPLES / "teddy", config)) == 3


def test_which_kinds_there_are_to_choose_from(tmp_path: Path) -> None:
    assert kinds_known_to(ROOT / "models" / "mini" / "clip") is KIND_NAMES
    assert kinds_known_to(tmp_path) is EVERYDAY_KINDS
    assert len(set(EVERYDAY_KINDS)) == len(EVERYDAY_KINDS) > 300
    assert all(kind == " ".join(kind.split()) and kind for kind in EVERYDAY_KINDS)


def test_a_run_that_knows_its_kind_loads_no_clip() -> None:
    code = ("import sys; from ldm.cli.training import parse_training_options as parse; from ldm.training.plan import "
            "plan_run; plan_run(parse(['--base', 'configs/perfusion.yaml'])); "
            "print([name for name in ('torch', 'open_clip', 'ldm.training.likely_kinds') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"
