"""Initial weights are loaded after the whole chain of constructors, also for subclasses from outside this project."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_latent_diffusion import Line, latent_model, locate, pixel_model
from test_vq import NO_LOSS, SETTINGS
from torch import nn

from ldm.common.errors import UserError
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import instantiate_from_config, known_params


class ControlledDiffusion(LatentDiffusion):
    """Adds a part in its constructor, as ControlNet's class does."""

    def __init__(self, control_width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.control_model = nn.Linear(control_width, control_width)


class TwiceDerived(ControlledDiffusion):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(control_width=2, **kwargs)
        self.adapter = nn.Linear(1, 1)


class WithoutConstructor(LatentDiffusion):
    """Overrides methods only."""


class LoadsEarly(LatentDiffusion):
    """Needs the weights in its constructor."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.load_initial_weights()
        self.slope_at_construction = float(self.model.diffusion_model.slope.detach())
        with torch.no_grad():
            self.model.diffusion_model.slope.fill_(5.0)


class PixelDiffusion(DDPM):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.adapter = nn.Linear(1, 1)


def write_weights(model: nn.Module, path: Path) -> Path:
    """Write other weights than the model's."""
    state = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, path)
    return path


def assert_loaded(model: nn.Module, path: Path, schedule: tuple[str, ...] = ()) -> None:
    stored = torch.load(path)["state_dict"]
    for key, value in model.state_dict().items():
        assert key in schedule or torch.equal(value, stored[key]), key


def params(**changes: Any) -> dict[str, Any]:
    return {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}, "timesteps": 50,
            "cond_stage_config": "__is_unconditional__", "image_size": 4, "channels": 3, "use_ema": False,
            "unet_config": locate(Line), **changes}


@pytest.mark.parametrize(("cls", "own"), [(ControlledDiffusion, {"control_width": 3}), (TwiceDerived, {}),
                                          (WithoutConstructor, {})])
def test_subclasses_load_all_their_weights(cls: type, own: dict[str, Any], tmp_path: Path) -> None:
    path = write_weights(cls(**params(**own)), tmp_path / "x.ckpt")
    direct = cls(**params(**own, ckpt_path=str(path)))
    by_config = instantiate_from_config({"target": f"{__name__}.{cls.__name__}",
                                         "params": params(**own, ckpt_path=str(path))})
    for model in (direct, by_config):
        assert_loaded(model, path, model.schedule_names)


def test_subclasses_of_ddpm_load_their_weights(tmp_path: Path) -> None:
    given = {"unet_config": locate(Line), "timesteps": 50, "use_ema": False}
    path = write_weights(PixelDiffusion(**given), tmp_path / "x.ckpt")
    model = PixelDiffusion(**given, ckpt_path=str(path))
    assert_loaded(model, path, model.schedule_names)


def test_weights_that_a_subclass_adds_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Public code loads a checkpoint before a subclass has added its parts."""
    base = latent_model(cond_stage_config="__is_unconditional__", conditioning_key=None)
    path = write_weights(base, tmp_path / "base.ckpt")
    model = ControlledDiffusion(**params(control_width=3, ckpt_path=str(path)))
    assert float(model.model.diffusion_model.slope.detach()) == pytest.approx(1.7)
    assert "2 keys missing (control_model" in caplog.text and model.restarted_from_ckpt


def test_weights_of_the_model_itself_are_required(tmp_path: Path) -> None:
    torch.save({"state_dict": {"control_model.weight": torch.zeros(3, 3)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="1 keys missing \\(model.diffusion_model.slope"):
        ControlledDiffusion(**params(control_width=3, ckpt_path=str(tmp_path / "x.ckpt")))


def test_init_from_ckpt_takes_what_fits_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": {"control_model.bias": torch.ones(3)}}, tmp_path / "x.ckpt")
    model = ControlledDiffusion(**params(control_width=3))
    assert not model.has_initial_weights
    model.init_from_ckpt(tmp_path / "x.ckpt")
    assert model.control_model.bias.tolist() == [1, 1, 1] and "2 keys missing" in caplog.text
    assert model.has_initial_weights and float(model.model.diffusion_model.slope.detach()) == pytest.approx(0.7)


def test_an_overridden_init_from_ckpt_is_called(tmp_path: Path) -> None:
    class Own(LatentDiffusion):
        def init_from_ckpt(self, path: str, ignore_keys: tuple[str, ...] = (), only_model: bool = False) -> None:
            self.asked = (path, tuple(ignore_keys), only_model)

    model = Own(**params(ckpt_path="some/file.ckpt", ignore_keys=["a."], load_only_unet=True))
    assert model.asked == ("some/file.ckpt", ("a.",), True)


def test_weights_of_controlnet_hold_logvar() -> None:
    model = latent_model()
    model.load_state_dict({**model.state_dict(), "logvar": torch.zeros(50)})


def test_a_constructor_may_load_the_weights_itself(tmp_path: Path) -> None:
    path = write_weights(LoadsEarly(**params()), tmp_path / "x.ckpt")
    stored = float(torch.load(path)["state_dict"]["model.diffusion_model.slope"])
    model = LoadsEarly(**params(ckpt_path=str(path)))
    assert model.slope_at_construction == stored
    assert float(model.model.diffusion_model.slope.detach()) == 5.0  # not loaded a second time


def test_params_of_wrapped_constructors_are_still_known() -> None:
    assert {"control_width", "first_stage_config", "unet_config", "ckpt_path"} <= known_params(ControlledDiffusion)
    assert {"unet_config", "timesteps"} <= known_params(DDPM)


def test_first_stages_load_the_weights_of_subclasses(tmp_path: Path) -> None:
    class WithHead(AutoencoderKL):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.head = nn.Linear(2, 2)

    class WithCodeHead(VQModel):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.head = nn.Linear(2, 2)

    for cls, own in ((WithHead, {"ddconfig": {**SETTINGS, "double_z": True}, "embed_dim": 4}),
                     (WithCodeHead, {"ddconfig": SETTINGS, "embed_dim": 3, "n_embed": 8})):
        path = write_weights(cls(lossconfig=NO_LOSS, **own), tmp_path / f"{cls.__name__}.ckpt")
        assert_loaded(cls(lossconfig=NO_LOSS, **own, ckpt_path=str(path)), path)


def test_a_constructor_that_fails_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="timestep_shift"):
        pixel_model(timestep_shift=-1.0, ckpt_path=str(tmp_path / "missing.ckpt"))
