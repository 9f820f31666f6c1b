"""The losses of the public first stages against their formulas, and LPIPS against torchvision's VGG16."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lpips_files import write_lpips
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.losses.adversarial import AdversarialLoss, adaptive_weight, hinge_loss, vanilla_loss
from ldm.modules.losses.perceptual import LPIPS
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, codebook_use

SMALL = {"disc_ndf": 8, "perceptual_weight": 0.0}


def random_images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_lpips_is_the_distance_between_features_of_vgg(tmp_path: Path) -> None:
    layers, ours = write_lpips(tmp_path), LPIPS.from_folder(tmp_path)
    linear = torch.load(tmp_path / "vgg.pth")
    features: list[Tensor] = []
    for index in (3, 8, 15, 22, 29):  # the last ReLU of each block
        layers[index].register_forward_hook(lambda _, __, output: features.append(output.clone()))
    x, y = random_images(), random_images(seed=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for images in (x, y):  # ImageNet's statistics are for pixels in [0, 1]
        layers(((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    expected = 0
    for block in range(5):
        one, other = (torch.nn.functional.normalize(features[block + 5 * which], dim=1) for which in range(2))
        weighted = (one - other) ** 2 * linear[f"lin{block}.model.1.weight"]
        expected = expected + weighted.sum(1, keepdim=True).mean((2, 3), keepdim=True)
    assert ours(x, y).shape == (2, 1, 1, 1) and torch.allclose(ours(x, y), expected, rtol=1e-4)
    assert torch.equal(ours(x, x), torch.zeros(2, 1, 1, 1))


def test_lpips_has_no_parameters_and_is_not_saved(tmp_path: Path) -> None:
    write_lpips(tmp_path)
    network, y = LPIPS.from_folder(tmp_path), random_images(seed=1).requires_grad_()
    network(random_images(), y).sum().backward()
    assert y.grad.abs().sum() > 0 and y.grad.isfinite().all()
    assert not list(network.parameters()) and not network.state_dict()


@pytest.mark.parametrize("missing", ["vgg16-397923af.pth", "vgg.pth"])
def test_missing_files_are_named_when_training_starts(tmp_path: Path, missing: str) -> None:
    write_lpips(tmp_path)
    (tmp_path / missing).unlink()
    loss = LPIPSWithDiscriminator(disc_start=0, perceptual_root=str(tmp_path))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / missing))}: .*put it there"):
        loss.load_perceptual()
    LPIPSWithDiscriminator(disc_start=0, perceptual_root=str(tmp_path), perceptual_weight=0.0).load_perceptual()


def test_files_with_other_weights_are_refused(tmp_path: Path) -> None:
    write_lpips(tmp_path)
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "vgg16-397923af.pth")
    with pytest.raises(UserError, match="features.0.bias"):
        LPIPS.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (hinge_loss, lambda real, fake: ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2),
        (vanilla_loss,
         lambda real, fake: -(torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()) / 2),
    ],
)
def test_discriminator_losses(
    loss: Callable[[Tensor, Tensor], Tensor], expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    real, fake = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(loss(real, fake), expected(real, fake), atol=1e-5)


@pytest.mark.parametrize(("slope", "expected"), [(0.5, 4.0), (2.0, 1.0), (0.0, 1e4)])
def test_adaptive_weight_is_the_ratio_of_gradients(slope: float, expected: float) -> None:
    """The ratio is |d(2 w.1)/dw| / |d(slope w.1)/dw|, at most 10,000 (2 sqrt(3) / 1e-4 is more)."""
    last = torch.randn(3, requires_grad=True)
    weight = adaptive_weight((2 * last).sum(), (slope * last).sum(), last)
    assert weight.item() == pytest.approx(expected, rel=1e-3) and not weight.requires_grad


class MeanDiscriminator(nn.Module):
    """A discriminator with one parameter: it scales the mean of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((1, 2, 3))


def simple(kind: type[AdversarialLoss], **params: Any) -> AdversarialLoss:
    loss = kind(**{"disc_start": 3, "disc_weight": 0.5, **SMALL, **params})
    loss.discriminator = MeanDiscriminator()
    return loss


def test_kl_loss_against_the_formula() -> None:
    """Every pixel of the reconstructions is w, below all pixels of the images, so that all gradients are known."""
    inputs, last = random_images().abs() + 1, torch.tensor(0.5, requires_grad=True)
    reconstructions = last * torch.ones_like(inputs)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 2, 2))
    loss = simple(LPIPSWithDiscriminator, kl_weight=0.1, logvar_init=0.3, pixelloss_weight=2.0, disc_factor=0.25)
    total, log = loss(inputs, reconstructions, posterior, step=3, last_layer=last)
    numbers = inputs[0].numel()
    nll = numbers * ((inputs - 0.5).mean() * 2 / torch.tensor(0.3).exp() + 0.3)
    weight = 0.5 * (2 * numbers / torch.tensor(0.3).exp()) / (1.5 + 1e-4)  # d generator_loss / d w = -1.5
    generator_loss = -1.5 * 0.5
    autoencoder_loss = nll + 0.1 * posterior.kl().mean() + 0.25 * weight * generator_loss
    discriminator_loss = 0.25 * 0.5 * ((1 - 1.5 * inputs.mean((1, 2, 3))).clamp(min=0).mean() + 1 + 1.5 * 0.5)
    for name, value in {"nll_loss": nll, "d_weight": weight, "g_loss": torch.tensor(generator_loss),
                        "disc_loss": discriminator_loss, "total_loss": autoencoder_loss,
                        "logvar": torch.tensor(0.3)}.items():
        assert torch.allclose(log[f"train/{name}"], value, rtol=1e-4), name
    assert torch.allclose(total, autoencoder_loss + discriminator_loss, rtol=1e-5)
    assert not any(value.requires_grad for value in log.values())


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
def test_vq_loss_against_the_formula(pixel_loss: str) -> None:
    inputs, last = random_images().abs() + 1, torch.tensor(0.5, requires_grad=True)
    loss = simple(VQLPIPSWithDiscriminator, codebook_weight=2.0, n_classes=4, pixel_loss=pixel_loss)
    codes = torch.tensor([0, 0, 1, 1])
    _, log = loss(inputs, last * torch.ones_like(inputs), torch.tensor(0.7), codes, split="val", step=3,
                  last_layer=last)
    difference = inputs - 0.5
    nll, slope = ((difference.mean(), 1.0) if pixel_loss == "l1" else
                  (difference.square().mean(), 2 * difference.mean()))
    weight = torch.as_tensor(0.5 * slope / (1.5 + 1e-4))
    assert torch.allclose(log["val/d_weight"], weight, rtol=1e-4)
    assert torch.allclose(log["val/total_loss"], nll + 2 * 0.7 - weight * 1.5 * 0.5, rtol=1e-4)
    assert log["val/perplexity"].item() == pytest.approx(2) and log["val/cluster_usage"] == 2


def test_codebook_use() -> None:
    perplexity, used = codebook_use(torch.arange(8).view(2, 4).repeat(1, 3), 16)
    assert perplexity.item() == pytest.approx(8) and used == 8


def test_each_network_gets_the_gradient_of_its_own_loss() -> None:
    """One backward pass gives the gradients of two separate ones."""
    loss = VQLPIPSWithDiscriminator(disc_start=0, **SMALL)
    decoder, inputs, latents = nn.Conv2d(4, 3, 3, padding=1), random_images(), torch.randn(2, 4, 32, 32)
    total, log = loss(inputs, decoder(latents), torch.zeros(()), torch.zeros(1), step=0, last_layer=decoder.weight)
    total.backward()
    both = [p.grad for p in (*decoder.parameters(), *loss.discriminator.parameters())]

    nn.ModuleList([decoder, loss.discriminator]).zero_grad()
    reconstructions = decoder(latents)
    generator_loss = -loss.discriminator(reconstructions).mean()
    (nn.functional.l1_loss(reconstructions, inputs) + log["train/d_weight"] * generator_loss).backward()
    expected = [p.grad for p in decoder.parameters()]
    loss.discriminator.zero_grad(set_to_none=True)
    hinge_loss(loss.discriminator(inputs), loss.discriminator(decoder(latents).detach())).backward()
    expected += [p.grad for p in loss.discriminator.parameters()]
    assert log["train/d_weight"] > 0
    for actual, separate in zip(both, expected, strict=True):
        assert torch.allclose(actual, separate, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("step", "gradients", "active"), [(2, True, False), (3, True, True), (3, False, False)])
def test_adversarial_losses_start_late_and_validation_has_no_adaptive_weight(step: int, gradients: bool, active: bool
                                                                             ) -> None:
    loss, last = simple(LPIPSWithDiscriminator), torch.tensor(0.5, requires_grad=True)
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 2, 2))
    with torch.set_grad_enabled(gradients):
        _, log = loss(random_images(), last * torch.ones(2, 3, 32, 32), posterior, step=step, last_layer=last)
    assert (log["train/d_weight"] > 0) == active
    assert (log["train/disc_loss"] > 0) == (step >= 3) and log["train/disc_factor"] == float(step >= 3)


def test_public_keys() -> None:
    loss = LPIPSWithDiscriminator(disc_start=50001, kl_weight=1e-6, disc_weight=0.5)
    keys = loss.state_dict()
    assert keys["logvar"].shape == () and keys["discriminator.main.0.weight"].shape == (64, 3, 4, 4)
    assert keys["discriminator.main.11.weight"].shape == (1, 512, 4, 4)
    assert {key.split(".")[0] for key in keys} == {"logvar", "discriminator"}


def test_conditional_discriminators_are_refused() -> None:
    with pytest.raises(UserError, match="disc_conditional"):
        VQLPIPSWithDiscriminator(disc_start=0, disc_conditional=True)


def test_act_norm_replaces_batch_norm() -> None:
    loss, last = LPIPSWithDiscriminator(0, use_actnorm=True, **SMALL), torch.tensor(0.5, requires_grad=True)
    posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 2, 2))
    total, _ = loss(random_images(), last * random_images(seed=1), posterior, step=0, last_layer=last)
    total.backward()
    assert total.isfinite() and loss.discriminator.main[3].initialized == 1
