"""A frozen U-Net in 16 bits: results close to those in 32 bits, with and without concepts."""
from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from helpers.graphed_unets import UNetInputs, frozen_unet, relative_error, unet_inputs
from torch import Tensor, nn

from ldm.concepts.fingerprint import base_fingerprint
from ldm.modules.attention import name_text_layers
from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.modules.fast.sixteen_bits import to_sixteen_bits

ROUNDING = 0.1  # relative error of bfloat16 through all layers, forward and backward


def results(unet: nn.Module, given: UNetInputs) -> Iterable[Tensor]:
    """Return the output and the gradients of the trained tensors."""
    output = unet(given.x, given.timesteps, context=given.context())
    output.square().mean().backward()
    return [output.detach(), *given.take_gradients()]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("with_concept", [False, True])
def test_errors_are_those_of_autocast(with_concept: bool, checkpointing: bool) -> None:
    unet, given = frozen_unet(checkpointing), unet_inputs(with_concept)
    exact = results(unet, given)
    with torch.autocast("cpu", torch.bfloat16):
        usual = results(unet, given)
    to_sixteen_bits(unet, torch.bfloat16)
    found = results(unet, given)
    assert len(found) == (1 + (3 if with_concept else 1))
    for one, cast, other in zip(found, usual, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < relative_error(one, other) < min(ROUNDING, 2.5 * relative_error(cast, other))


def test_autocast_does_not_change_the_result() -> None:
    unet, given = frozen_unet(), unet_inputs(with_concept=True)
    to_sixteen_bits(unet, torch.bfloat16)
    plain = unet(given.x, given.timesteps, context=given.context())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, unet(given.x, given.timesteps, context=given.context()))


def test_fingerprint_of_the_base_model_stays() -> None:
    unet = frozen_unet()
    before = base_fingerprint(name_text_layers(unet))
    to_sixteen_bits(unet, torch.bfloat16)
    assert base_fingerprint(name_text_layers(unet)) == before
    assert unet.dtype == torch.bfloat16


def test_trained_weights_are_refused() -> None:
    unet = frozen_unet()
    unet.out[-1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        to_sixteen_bits(unet, torch.bfloat16)
    assert unet.dtype == torch.float32


def test_norms_of_16_bits_compute_statistics_in_32() -> None:
    """If values are far from 0, the rounding of a 16-bit mean would dominate the result."""
    norm = GroupNorm32(1, 2)
    x = (torch.randn(1, 2, 64, 64) + 50).bfloat16()
    torch.testing.assert_close(norm.bfloat16()(x).float(), norm.float()(x.float()), rtol=0, atol=0.02)
