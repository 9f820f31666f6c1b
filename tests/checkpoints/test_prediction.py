"""What a checkpoint says about its network's prediction, and what becomes of it where the config says nothing."""
from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from helpers import tiny_models
from safetensors.torch import save_file

from ldm.checkpoints.load import load_model, params_of_checkpoint
from ldm.checkpoints.prediction import stated_params, stated_prediction

KNOWN = ("parameterization", "zero_terminal_snr")
ZERO_SNR = {"parameterization": "v", "zero_terminal_snr": True}


def marked(path: Path, *keys: str, **metadata: str) -> Path:
    """Write a file of weights with empty tensors of these names."""
    metadata = {key.replace("_type", ".prediction_type"): value for key, value in metadata.items()}
    save_file({"weight": torch.ones(2), **{key: torch.zeros(0) for key in keys}}, path, metadata)
    return path


@pytest.mark.parametrize(("keys", "metadata", "params", "added"), [
    (("v_pred",), {}, {}, {"parameterization": "v"}),
    (("v_pred", "ztsnr"), {}, {}, ZERO_SNR),
    (("ztsnr",), {}, {}, ZERO_SNR),
    (("ztsnr",), {"modelspec_type": "v"}, {}, ZERO_SNR),
    ((), {"modelspec_type": "v"}, {}, {"parameterization": "v"}),
    ((), {"modelspec_type": "epsilon"}, {}, {}),
    (("ztsnr",), {"modelspec_type": "epsilon"}, {}, {}),
    (("v_pred", "ztsnr"), {}, {"parameterization": "eps"}, {}),
    (("v_pred", "ztsnr"), {}, {"parameterization": "v"}, {"zero_terminal_snr": True}),
    (("v_pred", "ztsnr"), {}, {"zero_terminal_snr": False}, {"parameterization": "v"}),
    ((), {}, {}, {}),
])
def test_marks_fill_in_what_a_config_leaves_open(tmp_path: Path, caplog: Any, keys: tuple[str, ...],
                                                 metadata: dict[str, str], params: dict[str, Any],
                                                 added: dict[str, Any]) -> None:
    path = marked(tmp_path / "x.safetensors", *keys, **metadata)
    with caplog.at_level(logging.INFO):
        assert stated_params(params, KNOWN, path) == added
    assert len(caplog.records) == bool(added)
    assert all(key in caplog.text for key in added)


def test_a_model_without_the_setting_does_not_get_it(tmp_path: Path) -> None:
    assert stated_params({}, KNOWN[:1], marked(tmp_path / "x.safetensors", *("v_pred", "ztsnr"))) == {
        "parameterization": "v"}


@pytest.mark.parametrize(("scheduler", "added"), [
    (DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"), ZERO_SNR),
    (EulerDiscreteScheduler(prediction_type="v_prediction"), {"parameterization": "v"}),
    (EulerDiscreteScheduler(), {}),
])
def test_schedulers_of_folders_say_it_as_well(tmp_path: Path, scheduler: Any, added: dict[str, Any]) -> None:
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert stated_params({}, KNOWN, tmp_path) == added


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"prediction_type": 5, "rescale_betas_zero_snr": "yes"})])
def test_damaged_schedulers_say_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
    assert stated_prediction(tmp_path) is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return the config of a tiny model, and its weights with the marks of v and of zero terminal SNR."""
    folder = tmp_path_factory.mktemp("marked")
    state = dict(tiny_models.build_model(folder, use_ema=False).state_dict())
    save_file({**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, folder / "x.safetensors")
    return tiny_models.latent_diffusion_config(folder), folder / "x.safetensors"


def test_a_marked_model_is_built_for_what_it_predicts(weights: Any, caplog: Any) -> None:
    section, path = weights
    with caplog.at_level(logging.INFO):
        model = load_model({"model": section}, path)
    assert (model.parameterization, float(model.alphas_cumprod[-1])) == ("v", 0)
    assert [record.levelname for record in caplog.records if record.name.endswith("prediction")] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert params_of_checkpoint({**section, "params": {**section["params"], "ckpt_path": str(path)}}) == ZERO_SNR


def test_a_config_that_says_otherwise_is_kept_with_a_warning(weights: Any, caplog: Any) -> None:
    section, path = weights
    params = {**section["params"], "parameterization": "eps"}
    model = load_model({"model": {**section, "params": params}}, path)
    assert model.parameterization == "eps" and model.alphas_cumprod[-1] > 0
    assert "its key v_pred says that the model predicts v, the config (parameterization) eps" in caplog.text
