"""A frozen U-Net in 16 bits: that it says what it says in 32, edits included, and stays the model that it was."""
from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from helpers.graphed_unets import UNetInputs, frozen_unet, relative_error, unet_inputs
from torch import Tensor, nn

from ldm.concepts.concept import base_fingerprint
from ldm.modules.attention import name_text_layers
from ldm.modules.diffusionmodules.util import GroupNorm32
from ldm.modules.fast.sixteen_bits import to_sixteen_bits

ROUNDING = 0.1  # of bfloat16, which keeps 8 bits, through all layers and back


def results(unet: nn.Module, given: UNetInputs) -> Iterable[Tensor]:
    """The output and the gradients of what is learned."""
    output = unet(given.x, given.timesteps, context=given.context())
    output.square().mean().backward()
    return [output.detach(), *given.take_gradients()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_the_output_and_gradients_of_32_bits_as_nearly_as_autocast(edited: bool, checkpointing: bool) -> None:
    unet, given = frozen_unet(checkpointing), unet_inputs(edited)
    exact = results(unet, given)
    with torch.autocast("cpu", torch.bfloat16):
        usual = results(unet, given)
    to_sixteen_bits(unet, torch.bfloat16)
    found = results(unet, given)
    assert len(found) == (1 + (3 if edited else 1))
    for one, cast, other in zip(found, usual, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < relative_error(one, other) < min(ROUNDING, 2.5 * relative_error(cast, other))


def test_autocast_changes_nothing() -> None:
    unet, given = frozen_unet(), unet_inputs(edited=True)
    to_sixteen_bits(unet, torch.bfloat16)
    plain = unet(given.x, given.timesteps, context=given.context())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, unet(given.x, given.timesteps, context=given.context()))


def test_the_base_model_is_known_all_the_same() -> None:
    unet = frozen_unet()
    before = base_fingerprint(name_text_layers(unet))
    to_sixteen_bits(unet, torch.bfloat16)
    assert base_fingerprint(name_text_layers(unet)) == before
    assert unet.dtype == torch.bfloat16


def test_what_is_trained_stays() -> None:
    unet = frozen_unet()
    unet.out[-1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        to_sixteen_bits(unet, torch.bfloat16)
    assert unet.dtype == torch.float32


def test_norms_of_16_bits_have_statistics_of_32() -> None:
    """Of numbers far from 0 a mean in 16 bits would leave nothing but its own rounding."""
    norm = GroupNorm32(1, 2)
    x = (torch.randn(1, 2, 64, 64) + 50).bfloat16()
    torch.testing.assert_close(norm.bfloat16()(x).float(), norm.float()(x.float()), rtol=0, atol=0.02)
