"""Which of a public checkpoint's two sets of weights a diffusion model gets, the last ones or the averages."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor

from ldm.checkpoints.load import load_model
from ldm.concepts.fingerprint import base_fingerprint
from ldm.modules.attention import name_text_layers
from ldm.util import instantiate_from_config

KEY, AVERAGE = "model.diffusion_model.out.2.weight", "model_ema.diffusion_modelout2weight"
EMA_STATE = ("model_ema.decay", "model_ema.num_updates")  # the only entries of the averages in "emaonly" files
Public = tuple[Path, dict[str, Tensor]]


@pytest.fixture
def public(tmp_path: Path) -> Public:
    """Return a folder with checkpoints, and the content of the one with both sets."""
    model = tiny_models.build_model(tmp_path, use_ema=True)
    state = model.state_dict()
    for key in [key for key in state if key.startswith("model_ema.diffusion")]:
        state[key] = torch.randn_like(state[key])
    state["model_ema.num_updates"] = torch.tensor(840_000)
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    torch.save({"state_dict": {key: value for key, value in state.items()
                               if not key.startswith("model_ema.") or key in EMA_STATE}}, tmp_path / "emaonly.ckpt")
    return tmp_path, state


def model_config(folder: Path, **params: Any) -> dict[str, Any]:
    return {"model": tiny_models.latent_diffusion_config(folder, **params)}


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"use_ema": True}, {"use_ema": False}])
def test_images_are_generated_with_the_averages(public: Public, params: dict[str, bool]) -> None:
    folder, state = public
    model = load_model(model_config(folder, **params), folder / "both.ckpt")
    assert torch.equal(model.state_dict()[KEY], state[AVERAGE])
    assert not any(key.startswith("model_ema.") for key in model.state_dict())


@pytest.mark.slow
def test_concepts_are_trained_and_generated_with_the_same_weights(public: Public) -> None:
    folder, _ = public
    trained = instantiate_from_config(tiny_models.latent_diffusion_config(
        folder, "perfusion.Perfusion", ckpt_path=str(folder / "both.ckpt"), super_category="cat"))
    sampled = load_model(model_config(folder, use_ema=True), folder / "both.ckpt")
    fingerprints = {base_fingerprint(name_text_layers(model.model.diffusion_model)) for model in (trained, sampled)}
    assert len(fingerprints) == 1


@pytest.mark.slow
def test_training_continues_from_weights_and_averages(public: Public) -> None:
    folder, state = public
    model = tiny_models.latent_diffusion_config(folder, use_ema=True, ckpt_path=str(folder / "both.ckpt"))
    loaded = instantiate_from_config(model).state_dict()
    assert torch.equal(loaded[KEY], state[KEY]) and torch.equal(loaded[AVERAGE], state[AVERAGE])
    assert loaded["model_ema.num_updates"] == 840_000


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), [
    ("emaonly.ckpt", {}), ("both.ckpt", {"ignore_keys": ["model_ema."]}), ("both.ckpt", {"load_only_unet": True})])
def test_averages_start_at_the_weights_if_the_file_has_none(public: Public, name: str, params: Any) -> None:
    folder, state = public
    config = tiny_models.latent_diffusion_config(folder, use_ema=True, ckpt_path=str(folder / name), **params)
    loaded = instantiate_from_config(config).state_dict()
    expected = state[AVERAGE if "load_only_unet" in params else KEY]
    assert torch.equal(loaded[KEY], expected) and torch.equal(loaded[AVERAGE], expected)
    assert loaded["model_ema.num_updates"] == 0


@pytest.mark.slow
def test_the_averages_can_be_ignored(public: Public) -> None:
    folder, state = public
    model = load_model(model_config(folder, ignore_keys=["model_ema."]), folder / "both.ckpt")
    assert torch.equal(model.state_dict()[KEY], state[KEY])
