"""Subclasses in the manner of Custom Diffusion and ControlNet train and sample on this package."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import randomize
from helpers.tiny_models import unet_config
from ldm_users import expectations
from ldm_users.loading import load_model
from ldm_users.user_configs import write_checkpoint, write_user_files

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CAPTIONS = ["a red ball", "two small boats on a lake"]


def photos() -> torch.Tensor:
    """Return photos (2, 16, 16, 3) in [-1, 1]."""
    return torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The config and the checkpoint of a base model."""
    config = write_user_files(tmp_path_factory.mktemp("base"))
    return config, write_checkpoint(config)


@pytest.fixture
def finetuned(base: tuple[Path, Path], tmp_path: Path) -> Any:
    """A model of a user's class that gets its weights by `ckpt_path`."""
    config = write_user_files(tmp_path, target="ldm_users.finetuning.KeyValueFinetuning", ckpt_path=str(base[1]))
    return load_model(config).train()


def test_checkpoint_of_a_users_class_is_loaded(base: tuple[Path, Path], finetuned: Any) -> None:
    weights = torch.load(base[1], weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in finetuned.state_dict().items())


def test_overridden_methods_of_finetuning_are_called(base: tuple[Path, Path], finetuned: Any) -> None:
    reference = load_model(*base)
    mask = torch.zeros(2, 16, 16)
    mask[:, :8, 4:] = 1
    torch.manual_seed(3)
    loss, terms = finetuned.shared_step({"image": photos(), "caption": CAPTIONS, "mask": mask})
    loss.backward()
    # the family's order of random numbers: posterior, timesteps, noise
    torch.manual_seed(3)
    with torch.no_grad():
        x0 = expectations.encoded(reference, photos().permute(0, 3, 1, 2))
        cond = reference.get_learned_conditioning(CAPTIONS)
    t, noise = torch.randint(0, 1000, (2,)), torch.randn_like(x0)
    eps = expectations.guided(reference, cond)(expectations.noised(reference, x0, t, noise), t)
    weight = F.interpolate(mask[:, None], (8, 8))
    expected = (((eps - noise) ** 2 * weight).sum([1, 2, 3]) / weight.sum([1, 2, 3])).mean()
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert set(terms) == {"train/loss_simple", "train/loss"}
    expected.backward()
    trained = {name for name, parameter in finetuned.named_parameters() if parameter.grad is not None}
    assert trained == {f"model.{name}" for name, _ in reference.model.named_parameters()
                       if "attn2.to_k" in name or "attn2.to_v" in name}
    for name in trained:
        torch.testing.assert_close(finetuned.get_parameter(name).grad, reference.get_parameter(name).grad, **CLOSE)


@pytest.fixture
def controlled(base: tuple[Path, Path], tmp_path: Path) -> Any:
    """A controlled model with a base model's weights; its branch adds nothing yet."""
    branch = {"target": "ldm_users.controlled.ControlBranch",
              "params": {key: value for key, value in unet_config()["params"].items() if key != "out_channels"}
              | {"hint_channels": 3}}
    unet = {**unet_config(), "target": "ldm_users.controlled.ControlledUNet"}
    config = write_user_files(tmp_path, target="ldm_users.controlled.ControlledDiffusion", unet_config=unet,
                              control_stage_config=branch, control_key="hint")
    model = load_model(config)
    model.load_state_dict(torch.load(base[1], weights_only=True)["state_dict"], strict=False)
    return model


def test_control_begins_at_the_base_model(base: tuple[Path, Path], controlled: Any) -> None:
    reference, x, t = load_model(*base), torch.randn(2, 4, 8, 8), torch.tensor([5, 800])
    cond = controlled.get_learned_conditioning(CAPTIONS)
    hint = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        found = controlled.apply_model(x, t, {"c_crossattn": [cond], "c_concat": [hint]})
        torch.testing.assert_close(found, expectations.guided(reference, cond)(x, t), **CLOSE)


def test_training_step_of_control(controlled: Any) -> None:
    randomize(controlled.control_model, 5)
    controlled.train()
    batch = {"image": photos(), "caption": CAPTIONS, "hint": (photos() + 1) / 2}
    torch.manual_seed(3)
    loss, terms = controlled.shared_step(batch)
    loss.backward()
    torch.manual_seed(3)
    with torch.no_grad():
        x0 = expectations.encoded(controlled, photos().permute(0, 3, 1, 2))
        t, noise = torch.randint(0, 1000, (2,)), torch.randn_like(x0)
        cond = {"c_crossattn": [controlled.get_learned_conditioning(CAPTIONS)],
                "c_concat": [batch["hint"].permute(0, 3, 1, 2)]}
        output = controlled.apply_model(expectations.noised(controlled, x0, t, noise), t, cond)
    torch.testing.assert_close(loss, F.mse_loss(output, noise), **CLOSE)
    assert {"train/loss_simple", "train/loss_vlb", "train/loss"} <= set(terms)
    assert all(parameter.grad is not None for parameter in controlled.control_model.zero_convs.parameters())
    before = controlled.control_model.zero_convs[0][0].weight.clone()
    controlled.learning_rate = 1e-3
    controlled.configure_optimizers().step()
    assert not torch.equal(controlled.control_model.zero_convs[0][0].weight, before)


@torch.no_grad()
def test_samples_with_conditions_in_dicts(controlled: Any) -> None:
    randomize(controlled.control_model, 5, scale=0.2)
    hint = torch.rand(2, 3, 16, 16)
    cond, uncond = ({"c_crossattn": [controlled.get_learned_conditioning(texts)], "c_concat": [hint]}
                    for texts in (CAPTIONS, ["", ""]))
    torch.manual_seed(3)
    found, _ = controlled.sample_log(cond, 2, True, 4, eta=0.5, unconditional_guidance_scale=3.0,
                                     unconditional_conditioning=uncond)
    torch.manual_seed(3)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without = controlled.apply_model(x, t, uncond)
        return without + 3.0 * (controlled.apply_model(x, t, cond) - without)

    expected = expectations.ddim(controlled, eps, torch.randn(2, 4, 8, 8), expectations.ddim_steps(4), 0.5)
    torch.testing.assert_close(found, expected.float(), **CLOSE)
