"""DDPM and LatentDiffusion: objective, averages, frozen parts, conditions, and the names of weights."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import tiny_models
from torch import Tensor, nn

from ldm.checkpoints.load import load_model
from ldm.common.errors import UserError
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.objectives import resize_mask_to_latents
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.sampling.schedule import q_sample
from ldm.util import instantiate_from_config

SCHEDULE = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
}


class Line(nn.Module):
    """A linear network: 0.7 x + t / 2000, plus the mean of its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        offset = sum(condition.flatten(1).mean(1) for condition in (context, y) if condition is not None)
        return self.slope * x + (t / 2000 + offset).view(-1, 1, 1, 1)


class Words(nn.Module):
    """Encodes a text as its length, by one of three methods."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, texts: list[str]) -> Tensor:
        return self.scale * torch.tensor([[float(len(text))] for text in texts])[..., None]

    def shout(self, texts: list[str]) -> Tensor:
        return 2 * self(texts)

    def guess(self, texts: list[str]) -> DiagonalGaussianDistribution:
        lengths = self(texts)[..., None]
        return DiagonalGaussianDistribution(torch.cat([lengths, torch.zeros_like(lengths)], dim=1))


class Lengths(Words):
    def encode(self, texts: list[str]) -> Tensor:
        return -self(texts)


def locate(cls: type) -> dict[str, str]:
    return {"target": f"{cls.__module__}.{cls.__name__}"}


def pixel_model(**params: Any) -> DDPM:
    return DDPM(locate(Line), **{"timesteps": 50, "image_size": 4, "channels": 2, "use_ema": False, **params})


def latent_model(cls: type[LatentDiffusion] = LatentDiffusion, **params: Any) -> LatentDiffusion:
    given = {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}, "timesteps": 50,
             "cond_stage_config": locate(Words), "cond_stage_key": "caption", "conditioning_key": "crossattn",
             "image_size": 4, "channels": 3, "use_ema": False, "unet_config": locate(Line)}
    return cls(**{**given, **params})


def unconditional_model(**params: Any) -> LatentDiffusion:
    return latent_model(**{"cond_stage_config": "__is_unconditional__", **params})


def random_pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def images(count: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(6)) * 2 - 1


# Objective


def expected_errors(parameterization: str, x: Tensor, noise: Tensor, t: Tensor, power: int, weight: Tensor | None
                    ) -> np.ndarray:
    """Return the errors (B,) in float64, from the definition of latent diffusion's schedule alone."""
    betas = np.linspace(math.sqrt(1e-4), math.sqrt(2e-2), 50) ** 2
    alpha_bar = np.cumprod(1 - betas)[t.numpy()].reshape(-1, 1, 1, 1)
    x, noise = x.double().numpy(), noise.double().numpy()
    noisy = np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * noise
    output = 0.7 * noisy + t.numpy().reshape(-1, 1, 1, 1) / 2000
    target = {"eps": noise, "x0": x, "v": np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x}[parameterization]
    weights = 1.0 if weight is None else weight.double().numpy()
    return (weights * np.abs(output - target) ** power).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_objective(parameterization: str, loss_type: str, weighted: bool) -> None:
    x, noise = random_pair(3, 2, 4, 4)
    t = torch.tensor([0, 20, 49])
    weight = torch.rand(3, 1, 4, 4) if weighted else None
    model = unconditional_model(parameterization=parameterization, loss_type=loss_type, l_simple_weight=3.0)
    loss, numbers = model.p_losses(x, None, t, noise, weight)
    errors = expected_errors(parameterization, x, noise, t, int(loss_type[1]), weight)
    assert loss.item() == pytest.approx(3 * errors.mean(), rel=1e-4)
    assert set(numbers) == {"train/loss_simple", "train/loss_vlb", "train/loss"}
    assert float(numbers["train/loss_simple"]) == pytest.approx(errors.mean(), rel=1e-4)
    assert float(numbers["train/loss"]) == loss.item() and not any(n.requires_grad for n in numbers.values())
    assert set(model.eval().p_losses(x, None, t, noise)[1]) == {"val/loss_simple", "val/loss_vlb", "val/loss"}
    loss.backward()
    assert model.model.diffusion_model.slope.grad.abs() > 0


def test_weight_one_changes_nothing_and_weight_zero_hides_a_position() -> None:
    x, noise = random_pair(2, 2, 4, 4)
    t = torch.tensor([7, 30])
    model = unconditional_model()
    plain = model.p_losses(x, None, t, noise)[0]
    assert torch.equal(plain, model.p_losses(x, None, t, noise, torch.ones(2, 1, 4, 4))[0])
    half = torch.ones(2, 1, 4, 4)
    half[..., :2] = 0
    masked = model.p_losses(x, None, t, noise, half)[0]
    x[..., :2] += 5
    assert torch.equal(masked, model.p_losses(x, None, t, noise, half)[0])


def test_the_variational_bound() -> None:
    """DDPM eq. 12: beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) before the squared error."""
    x, noise = random_pair(3, 2, 4, 4)
    t = torch.tensor([1, 20, 49])
    loss, numbers = pixel_model(original_elbo_weight=0.5).p_losses(x, t, noise)
    betas = np.linspace(math.sqrt(1e-4), math.sqrt(2e-2), 50) ** 2
    alpha_bar = np.cumprod(1 - betas)
    variance = betas * (1 - np.append(1, alpha_bar[:-1])) / (1 - alpha_bar)
    weights = (betas**2 / np.maximum(2 * variance * (1 - betas) * (1 - alpha_bar), 1e-30))[t.numpy()]
    errors = expected_errors("eps", x, noise, t, 2, None)
    assert float(numbers["train/loss_vlb"]) == pytest.approx((weights * errors).mean(), rel=1e-3)
    assert loss.item() == pytest.approx(errors.mean() + 0.5 * (weights * errors).mean(), rel=1e-3)


def test_a_learned_variance() -> None:
    x, noise = random_pair(2, 2, 4, 4)
    t = torch.tensor([3, 3])
    model = unconditional_model(learn_logvar=True, logvar_init=0.4)
    loss, numbers = model.p_losses(x, None, t, noise)
    error = expected_errors("eps", x, noise, t, 2, None).mean()
    assert loss.item() == pytest.approx(error / math.exp(0.4) + 0.4, rel=1e-4)
    assert float(numbers["train/loss_gamma"]) == loss.item() and float(numbers["logvar"]) == pytest.approx(0.4)
    loss.backward()
    assert model.logvar.grad.nonzero().flatten().tolist() == [3]
    assert any(parameter is model.logvar for parameter in model.trained_parameters())


def test_noise_is_added_with_the_models_buffers() -> None:
    x, noise = random_pair(2, 2, 4, 4)
    model, inputs = pixel_model(), []
    model.apply_model = lambda x, t, cond: inputs.append(x) or torch.zeros_like(x)
    model.p_losses(x, torch.tensor([0, 49]), noise)
    assert torch.equal(inputs[0], q_sample(model, x, torch.tensor([0, 49]), noise))
    assert torch.allclose(inputs[0][0], x[0], atol=0.1)


def test_masks_on_the_latent_grid() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4] = 0.5
    mask[0, :, :2, :2] = 0.25
    small = resize_mask_to_latents(mask, (4, 4))
    assert small.shape == (2, 1, 4, 4)
    assert small[0].max() == 1 and small[0, 0, 0, 0] == 0.5 and not small[0, :, 2:].any()
    assert not small[1].any()


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_training_timesteps_are_shifted_by_the_formula(shift: float) -> None:
    torch.manual_seed(0)
    t = pixel_model(timesteps=1000, timestep_shift=shift).sample_timesteps(20_000, torch.device("cpu"))
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    for quantile in (0.1, 0.5, 0.9):  # of uniform u, mapped by the formula of the docstring
        expected = 1000 * shift * quantile / (1 + (shift - 1) * quantile)
        assert t.float().quantile(quantile).item() == pytest.approx(expected, abs=12)


def test_object_weight_is_relative_to_the_background() -> None:
    batch = {"image": images(), "caption": ["a", "b"], "objects": torch.zeros(2, 1, 8, 8)}
    batch["objects"][0, :, :4] = 1
    batch["objects"][1, :, :1, :2] = 1  # half of one position
    assert latent_model().loss_weight(batch, torch.Size((4, 4))) is None
    weight = latent_model(object_weight=5.0).loss_weight(batch, torch.Size((4, 4)))
    assert weight.shape == (2, 1, 4, 4) and weight[0, 0].unique().tolist() == [1, 5]
    assert (weight[0, 0, :2] == 5).all() and weight[1].sum() == 16 + 2 and weight[1, 0, 0, 0] == 3


@pytest.mark.parametrize(("params", "named"), [
    ({"timestep_shift": 0.0}, "timestep_shift 0.0 must be above 0"),
    ({"parameterization": "w"}, "eps, v, x0"), ({"loss_type": "l3"}, "l1, l2"), ({"conditioning_key": "text"}, "adm"),
    ({"use_positional_encodings": True}, "use_positional_encodings"), ({"beta_schedule": "steep"}, "cosine"),
])
def test_illegal_params_are_refused(params: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        pixel_model(**params)


def test_several_conditioning_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = latent_model(num_timesteps_cond=3)
    assert model.cond_ids.tolist() == [0, 24, 49, *[49] * 47]  # rounded to even: 24.5
    conditions: list[Tensor] = []
    monkeypatch.setattr(model, "p_losses", lambda x, c, t: conditions.append((t, c)))
    monkeypatch.setattr(model, "sample_timesteps", lambda *_: torch.tensor([0, 9]))
    clean = torch.ones(2, 1, 1)
    torch.manual_seed(0)
    model(images(), clean)
    torch.manual_seed(0)
    expected = q_sample(model, clean, torch.tensor([0, 49]), torch.randn_like(clean))
    assert torch.equal(conditions[0][1], expected)
    with pytest.raises(UserError, match="num_timesteps_cond 60"):
        latent_model(num_timesteps_cond=60)


# Conditions


@pytest.mark.parametrize(("encoder", "method", "expected"), [
    (Words, None, 5.0), (Words, "shout", 10.0), (Words, "guess", 5.0), (Lengths, None, -5.0), (Lengths, "shout", 10.0),
])
def test_how_conditions_are_encoded(encoder: type, method: str | None, expected: float) -> None:
    model = latent_model(cond_stage_config=locate(encoder), cond_stage_forward=method)
    assert float(model.get_learned_conditioning(["a cat"])) == expected


def test_a_batch_becomes_latents_and_condition() -> None:
    model = latent_model(scale_factor=0.25)
    z, condition = model.get_input({"image": images(), "caption": ("a", "abc")}, "image")
    assert torch.allclose(z, images() * 0.25) and condition.flatten().tolist() == [1.0, 3.0]
    assert not condition.requires_grad and z.is_contiguous()
    rows_last = model.get_input({"image": images().movedim(1, -1), "caption": ["a", "abc"]}, "image")[0]
    assert torch.equal(rows_last, z)
    assert torch.allclose(model.decode_first_stage(z), images())


@pytest.mark.parametrize(("key", "concat_mode", "expected"), [
    (None, True, "concat"), (None, False, "crossattn"), ("adm", True, "adm")])
def test_how_the_condition_enters(key: str | None, concat_mode: bool, expected: str) -> None:
    assert latent_model(conditioning_key=key, concat_mode=concat_mode).model.conditioning_key == expected


def test_without_condition() -> None:
    model = unconditional_model()
    z, condition = model.get_input({"image": images()}, "image")
    assert model.model.conditioning_key is None
    assert condition is None and model.apply_model(z, torch.tensor([1, 2]), condition).shape == z.shape
    assert model.log_images({"image": images()}, ddim_steps=2)["samples"].shape == (2, 3, 4, 4)


# What is trained


def gradients(model: LatentDiffusion, texts: list[str]) -> set[str]:
    model.train()
    model.shared_step({"image": torch.rand(2, 3, 16, 16), "caption": texts})[0].backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_frozen_stages_stay_in_evaluation_and_get_no_gradient(tmp_path: Path) -> None:
    model = tiny_models.build_model(tmp_path, use_ema=False)
    got = gradients(model, ["a cat", "a dog"])
    assert got == {name for name, _ in model.named_parameters() if name.startswith("model.")}
    assert model.model.training and not model.first_stage_model.training and not model.cond_stage_model.training
    assert not any(m.training for m in [*model.first_stage_model.modules(), *model.cond_stage_model.modules()])
    trained = set(map(id, model.trained_parameters()))
    assert trained == {id(parameter) for parameter in model.model.parameters()}


def test_a_trainable_condition_encoder(tmp_path: Path) -> None:
    tower = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
             "params": {"version": tiny_models.write_text_tower(tmp_path / "tower"), "max_length": 16, "freeze": False}}
    model = tiny_models.build_model(tmp_path, use_ema=False, cond_stage_config=tower, cond_stage_trainable=True)
    got = gradients(model, ["a cat", "a dog"])
    assert {name.split(".")[0] for name in got} == {"model", "cond_stage_model"}
    assert model.cond_stage_model.training and not model.first_stage_model.training
    assert set(map(id, model.cond_stage_model.parameters())) < set(map(id, model.trained_parameters()))


def test_the_scale_factor_is_measured_on_the_first_batch() -> None:
    batch = {"image": 3 * images(8), "caption": ["a"] * 8}
    model = latent_model(scale_by_std=True, scale_factor=2.0)
    model.on_train_batch_start(batch, 0)
    assert float(model.scale_factor) == pytest.approx(1 / float(batch["image"].std()))
    assert float(model.encode_images(batch["image"]).std()) == pytest.approx(1.0, rel=1e-5)
    measured = model.scale_factor.clone()
    model.on_train_batch_start({"image": images(8)}, 1)
    assert torch.equal(model.scale_factor, measured)
    given = latent_model(scale_factor=2.0)
    given.on_train_batch_start(batch, 0)
    assert given.scale_factor == 2.0


# Names and files


def test_state_dict_keys() -> None:
    keys = set(latent_model().state_dict())
    assert keys == SCHEDULE | {"model.diffusion_model.slope", "cond_stage_model.scale"}
    more = {"use_ema": {"model_ema.diffusion_modelslope", "model_ema.decay", "model_ema.num_updates"},
            "scale_by_std": {"scale_factor"}, "learn_logvar": {"logvar"}}
    for option, added in more.items():
        assert set(latent_model(**{option: True}).state_dict()) == keys | added
    assert "lvlb_weights" in dict(latent_model().named_buffers())


@pytest.mark.slow
def test_a_checkpoint_restores_the_same_model(tmp_path: Path) -> None:
    model = tiny_models.build_model(tmp_path, use_ema=True)
    model.on_train_batch_end(None, None, 0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    config = tiny_models.latent_diffusion_config(tmp_path)
    again = instantiate_from_config(config, ckpt_path=str(tmp_path / "x.ckpt"))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    network_only = instantiate_from_config(config, ckpt_path=str(_network_file(tmp_path, model)), load_only_unet=True)
    weight = model.model.diffusion_model.out[2].weight
    assert torch.equal(network_only.model.diffusion_model.out[2].weight, weight)
    assert torch.equal(network_only.model_ema.diffusion_modelout2weight, weight)  # averages start there


def _network_file(folder: Path, model: LatentDiffusion) -> Path:
    torch.save(model.model.state_dict(), folder / "network.ckpt")
    return folder / "network.ckpt"


def test_the_schedule_comes_from_the_config_and_not_from_a_half_precision_file(tmp_path: Path) -> None:
    model = latent_model()
    torch.save({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "half.ckpt")
    again = latent_model(ckpt_path=str(tmp_path / "half.ckpt"))
    assert all(torch.equal(getattr(again, name), getattr(model, name)) for name in SCHEDULE)


def test_loss_networks_of_the_first_stage_are_not_saved() -> None:
    state = {"first_stage_model.loss.discriminator": 1, "first_stage_model.encoder": 2, "betas": 3}
    checkpoint = {"state_dict": state}
    latent_model().on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"first_stage_model.encoder", "betas"}


# Training and sampling


def test_lightning_trains_and_resumes_it(tmp_path: Path) -> None:
    schedule = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
                "params": {"warm_up_steps": 1, "lr_start": 0.5, "lr_max": 1.0, "lr_min": 0.1, "max_decay_steps": 4}}
    batches = [{"image": images(), "caption": ["a", "abc"]}] * 8
    first, second = (latent_model(use_ema=True, scheduler_config=schedule) for _ in range(2))
    for model, steps, start in ((first, 2, None), (second, 4, tmp_path / "x.ckpt")):
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
        trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert int(first.model_ema.num_updates) == 2 and int(second.model_ema.num_updates) == 4
    slopes = [float(model.model.diffusion_model.slope) for model in (first, second)]
    assert len({0.7, *slopes}) == 3 and all(map(math.isfinite, slopes))
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-4 == trainer.optimizers[0].param_groups[0]["initial_lr"]
    assert not torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys() & {"lvlb_weights", "logvar"}


@pytest.mark.slow
def test_an_image_depends_only_on_its_own_seed(tmp_path: Path) -> None:
    weights = tiny_models.write_weights(tmp_path)
    model = load_model({"model": tiny_models.latent_diffusion_config(tmp_path)}, weights)

    def sample(texts: list[str], seeds: list[int]) -> Tensor:
        cond, empty = (model.get_learned_conditioning(given) for given in (texts, [""] * len(texts)))
        return model.sample_images(cond, len(texts), 3, 2.0, empty,
                                   generators=[torch.Generator().manual_seed(seed) for seed in seeds])

    both = sample(["a cat", "a dog"], [1, 2])
    assert both.shape == (2, 3, 16, 16) and both.abs().max() <= 1
    assert torch.allclose(sample(["a dog"], [2]), both[1:], atol=1e-4)
    assert not torch.allclose(sample(["a dog"], [3]), both[1:], atol=1e-2)
    assert not torch.allclose(sample(["a cat"], [2]), both[1:], atol=1e-3)


def test_images_for_the_log(tmp_path: Path) -> None:
    model = tiny_models.build_model(tmp_path, use_ema=True).eval()
    batch = {"image": torch.rand(3, 3, 16, 16), "caption": ["a cat", "a dog", "a cup"]}
    shown = model.log_images(batch, N=2, ddim_steps=2, plot_progressive_rows=False, unconditional_guidance_scale=2.0)
    names = ("inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_2.00", "samples_inpainting",
             "samples_outpainting")
    assert all(shown[name].shape == (2, 3, 16, 16) for name in names)
    assert set(shown) == {*names, "mask", "diffusion_row"} and shown["diffusion_row"].ndim == 3
