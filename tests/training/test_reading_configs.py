from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.training.config import read_config


def read(*arguments: str) -> object:
    return read_config(parse_training_options(arguments))


@pytest.mark.parametrize(
    "content",
    [
        b"model: [1",
        b"a: b: c",
        b"\tmodel: 1",
        b"- a\n- b",
        b"\xff\xfe\x00\x9a",
        b"a: ${b",
        b"a: 1\na: 2",
        b"!!python/object/apply:os.getcwd []",
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.yaml: ") as refused:
        read("--base", str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("second", "override"), [
    ("{}", "model.params.used_layers.0=x"), ("{}", "data.params.train.params.templates.0=a"),
    ("{lightning: [1]}", "a=1"), ("{1: 2}", "a=1")])
def test_what_does_not_fit_the_config_before_it(tmp_path: Path, second: str, override: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(second)
    with pytest.raises(UserError):
        read("--base", "configs/perfusion.yaml", str(path), override)


def test_without_masks_those_of_a_run_before_are_left_out_too() -> None:
    config = read("--base", "configs/perfusion.yaml", "--masks", "none")
    own = read("--base", "configs/perfusion.yaml", "--masks", "none", "data.params.train.params.mask_root=mine")
    assert config.model.params.segmenter is config.data.params.train.params.mask_root is None
    assert own.data.params.train.params.mask_root == "mine"  # what is said last counts


def test_a_mistake_of_ours_is_not_taken_for_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise TypeError("a bug")

    (tmp_path / "x.yaml").write_text("model: {}")
    monkeypatch.setattr("ldm.training.config.OmegaConf.load", broken)
    with pytest.raises(TypeError):
        read("--base", str(tmp_path / "x.yaml"))
