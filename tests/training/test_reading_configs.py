"""How YAML files, flags and overrides become the config of a run."""
from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.training.config import read_config

ROOT = Path(__file__).resolve().parents[2]


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
def test_files_that_are_not_configs_raise_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.yaml: ") as error:
        read("--base", str(path))
    assert "\n" not in str(error.value)


def test_configs_of_generative_models_are_refused_with_ours(tmp_path: Path) -> None:
    path = tmp_path / "sd_xl_base.yaml"
    path.write_text("model: {target: sgm.models.diffusion.DiffusionEngine, params: {}}")
    with pytest.raises(UserError, match="--base .*sd_xl_base.yaml: .*use configs/perfusion-sd-xl.yaml"):
        read("--base", str(path))


@pytest.mark.parametrize(("second", "override"), [
    ("{}", "model.params.used_layers.0=x"), ("{}", "data.params.train.params.templates.0=a"),
    ("{lightning: [1]}", "a=1"), ("{1: 2}", "a=1")])
def test_what_does_not_fit_the_earlier_config_raises_a_user_error(tmp_path: Path, second: str, override: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(second)
    with pytest.raises(UserError):
        read("--base", "configs/perfusion.yaml", str(path), override)


def test_no_masks_overrides_the_mask_folder_of_the_config() -> None:
    config = read("--base", "configs/perfusion.yaml", "--masks", "none")
    own = read("--base", "configs/perfusion.yaml", "--masks", "none", "data.params.train.params.mask_root=mine")
    assert config.model.params.segmenter is config.data.params.train.params.mask_root is None
    assert own.data.params.train.params.mask_root == "mine"  # the last one counts


def test_a_bug_is_not_reported_as_a_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> None:
        raise TypeError("a bug")

    (tmp_path / "x.yaml").write_text("model: {}")
    monkeypatch.setattr("ldm.training.config.OmegaConf.load", broken)
    with pytest.raises(TypeError):
        read("--base", str(tmp_path / "x.yaml"))


# Values that a config leaves to the user

SD = ("--base", "configs/perfusion-sd-v1.yaml")


@pytest.mark.parametrize(("arguments", "named"), [
    ((), ("--data_root", "--init_word")), (("--data_root", "photos"), ("--init_word",)),
    (("--init_word", "teddy bear"), ("--data_root",)),
])
@pytest.mark.parametrize("model", ["sd-v1", "sd-v2", "ldm"])
def test_required_values_are_requested_by_name(model: str, arguments: tuple[str, ...], named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        read("--base", f"configs/perfusion-{model}.yaml", *arguments)
    message = str(error.value)
    assert "\n" not in message
    assert [flag for flag in ("--data_root", "--init_word") if flag in message] == list(named)


def test_required_values_may_be_given_as_flags_or_overrides() -> None:
    by_flags = read(*SD, "--data_root", "photos", "--init_word", "cat")
    by_overrides = read(*SD, "data.params.train.params.data_root=photos", "model.params.super_category=cat")
    assert by_flags == by_overrides and by_flags.model.params.super_category == "cat"


def test_any_other_required_value_is_requested_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: {params: {inference_bias: '???'}}")
    key = "model.params.inference_bias"
    with pytest.raises(UserError, match=f"{key} is required: give {key}=VALUE"):
        read("--base", "configs/perfusion.yaml", str(tmp_path / "x.yaml"))


# Sections and spellings


def test_the_section_inference_is_read_and_checked() -> None:
    config = read("--base", "configs/perfusion.yaml", "inference.guidance_scale=2.5")
    assert config.inference.guidance_scale == 2.5
    with pytest.raises(UserError, match="unknown key guidance"):
        read("--base", "configs/perfusion.yaml", "inference.guidance=2.5")


def test_spellings_of_earlier_versions_still_override(tmp_path: Path) -> None:
    config = read("--base", "configs/perfusion.yaml", "lightning.callbacks.pictures.params.steps=3",
                  "lightning.callbacks.pictures.params.scale=5.0")
    params = config.lightning.callbacks.previews.params
    assert (params.num_inference_steps, params.guidance_scale) == (3, 5.0) and len(config.lightning.callbacks) == 1
    assert read("--base", "configs/perfusion.yaml", "lightning.callbacks.pictures=null").lightning.callbacks == {
        "previews": None}
    (tmp_path / "old.yaml").write_text("lightning: {callbacks: {pictures: null}}")
    config = read("--base", "configs/perfusion.yaml", str(tmp_path / "old.yaml"))
    assert config.lightning.callbacks == {"previews": None}


def test_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read("--base", "configs/perfusion.yaml")
    monkeypatch.chdir(tmp_path)
    assert read("--base", "configs/perfusion.yaml") == expected


def test_embedders_have_keys_of_their_own(tmp_path: Path) -> None:
    config = OmegaConf.load(ROOT / "configs" / "perfusion-sd-xl.yaml")
    config.model.params.cond_stage_config.params.emb_models[0].input_keyy = "txt"
    OmegaConf.save(config, tmp_path / "wrong.yaml")
    subject = ("--data_root", "photos", "--init_word", "teddy bear")
    assert read_config(parse_training_options(["--base", str(ROOT / "configs" / "perfusion-sd-xl.yaml"), *subject]))
    with pytest.raises(UserError, match=r"unknown key input_keyy; it has target, params, input_key, input_keys"):
        read_config(parse_training_options(["--base", str(tmp_path / "wrong.yaml"), *subject]))
