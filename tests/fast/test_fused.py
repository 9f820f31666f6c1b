"""Fused norms and GEGLUs against torch's own, by Triton's interpreter or, where there is a GPU, compiled."""
from __future__ import annotations

import collections
import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.graphed_unets import frozen_unet, relative_error, unet_inputs
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.modules.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.fast import fused
from ldm.modules.fast.fused import (
    FusedGEGLU,
    FusedGroupNorm,
    FusedResBlock,
    FusedSpatialTransformer,
    FusedTransformerBlock,
    can_fuse,
    fuse,
)

pytest.importorskip("triton", reason="the kernels are written in Triton, which is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 2e-5


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions would otherwise round their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_gradient(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """What it makes of x, and the gradient of x for one that differs from number to number."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(drawn(*y.shape, seed=1).to(y.dtype))
    return y.detach(), x.grad


def frozen_norm(channels: int, groups: int, epsilon: float = 1e-5) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, epsilon).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(drawn(channels, seed=2))
    norm.bias.copy_(drawn(channels, seed=3))
    return norm


class Fused(nn.Module):
    """A norm as residual blocks have it."""

    def __init__(self, norm: nn.GroupNorm, silu: bool, added: Tensor | None = None, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.silu, self.added, self.residual = norm, silu, added, residual

    def forward(self, x: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.group_norm import GroupNormSiLU

        norm = self.norm
        x, y = GroupNormSiLU.apply(x, self.added, norm.weight, norm.bias, norm.num_groups, norm.eps, self.silu)
        return torch.stack([x, y]) if self.residual else y


class Plain(Fused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x if self.added is None else x + self.added[..., None, None])
        y = F.silu(y) if self.silu else y
        return torch.stack([x, y]) if self.residual else y


@given(images=st.integers(1, 3), groups=st.sampled_from([1, 2, 32]), size=st.integers(1, 5), height=st.integers(1, 20),
       width=st.integers(1, 20), silu=st.booleans(), adds=st.booleans(), residual=st.booleans(),
       last=st.booleans())
@settings(max_examples=25)
def test_norms_are_torchs(images: int, groups: int, size: int, height: int, width: int, silu: bool, adds: bool,
                          residual: bool, last: bool) -> None:
    assume(size * height * width > 1)  # of a single number nothing is left but rounding
    norm = frozen_norm(groups * size, groups, 1e-3)
    added = drawn(images, groups * size, seed=4) if adds else None
    x = 3 * drawn(images, groups * size, height, width) + 2
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = with_gradient(Fused(norm, silu, added, residual), x)
    exact = with_gradient(Plain(norm.double(), silu, added if added is None else added.double(), residual), x.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_norms_of_many_rows_and_channels() -> None:
    """More than one program's share in each direction, and the parts of a group in more than one loop."""
    norm = frozen_norm(160, 2)
    x = drawn(1, 160, 33, 65)
    for one, other in zip(with_gradient(Fused(norm, True), x), with_gradient(Plain(norm, True), x), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


def test_norms_far_from_nothing_keep_their_digits() -> None:
    norm = frozen_norm(4, 2)
    x = drawn(1, 4, 16, 16) + 1000
    exact = norm.double()(x.double())
    assert relative_error(Fused(norm.float(), False)(x), exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    norm = frozen_norm(64, 32)
    x = drawn(2, 64, 8, 8).to(dtype)
    exact = with_gradient(Plain(norm.float(), True), x.float())
    found = with_gradient(Fused(norm.to(dtype), True), x)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype and relative_error(one, other) < torch.finfo(dtype).eps


@given(rows=st.integers(1, 9), channels=st.sampled_from([1, 5, 320, 5000]), adds=st.booleans())
@settings(max_examples=15)
def test_sums_and_their_layer_norms_are_torchs(rows: int, channels: int, adds: bool) -> None:
    from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

    norm = nn.LayerNorm(channels).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(drawn(channels, seed=2))
    norm.bias.copy_(drawn(channels, seed=3))

    def found(both: Tensor) -> Tensor:
        x, added = both.unbind()
        return torch.stack(SumLayerNorm.apply(x, added if adds else None, norm.weight, norm.bias, norm.eps))

    def exact(both: Tensor) -> Tensor:
        total = both.sum(0) if adds else both[0]
        return torch.stack([total, norm(total)])

    both = drawn(2, 2, rows, channels, seed=rows) + 1
    for one, other in zip(with_gradient(found, both), with_gradient(exact, both), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), width=st.sampled_from([1, 7, 1024, 1300]),
       seed=st.integers(0, 9))
@settings(max_examples=15)
def test_gated_gelus_are_torchs(shape: list[int], width: int, seed: int) -> None:
    from ldm.modules.fast.kernels.geglu import GatedGELU

    def plain(both: Tensor) -> Tensor:
        value, gate = both.chunk(2, -1)
        return value * F.gelu(gate)

    both = 2 * drawn(*shape, 2 * width, seed=seed)
    for one, other in zip(with_gradient(GatedGELU.apply, both), with_gradient(plain, both), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


def test_a_fused_unet_says_the_same_and_stays_what_it_is() -> None:
    unet, prompts = frozen_unet().to(DEVICE), unet_inputs(edited=True, device=DEVICE)

    def results() -> list[Tensor]:
        output = unet(prompts.x, prompts.timesteps, context=prompts.context())
        output.square().mean().backward()
        return [output.detach(), *prompts.take_gradients()]

    exact, keys = results(), list(unet.state_dict())
    fuse(unet)
    found = results()
    fuse(unet)  # of what is fused nothing is left to do
    assert list(unet.state_dict()) == keys
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-4
    kinds = collections.Counter(type(module) for module in unet.modules())
    assert not any(kinds[kind] for kind in (ResBlock, GEGLU, BasicTransformerBlock, SpatialTransformer))
    assert kinds[FusedResBlock] and kinds[FusedGroupNorm] == 1
    assert kinds[FusedTransformerBlock] == kinds[FusedGEGLU] == kinds[FusedSpatialTransformer] > 0


@pytest.mark.parametrize("width", [32, 64])
def test_residual_blocks_with_all_their_biases(width: int) -> None:
    block = ResBlock(32, 8, 0.0, width).to(DEVICE).requires_grad_(False)
    for seed, parameter in enumerate(block.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=seed) / 4)
    x, emb = drawn(2, 32, 6, 5), drawn(2, 8)
    exact = with_gradient(lambda maps: block(maps, emb), x)
    fuse(block)
    assert type(block) is FusedResBlock
    for one, other in zip(with_gradient(lambda maps: block(maps, emb), x), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"use_scale_shift_norm": True}, {"up": True}, {"dims": 1}])
def test_residual_blocks_of_other_kinds_stay_as_they_are(how: dict[str, object]) -> None:
    block = ResBlock(32, 8, 0.0, **how)
    fuse(block)
    assert type(block) is ResBlock


def pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be tried out on CUDA is tried out here."""
    here = fused._try_out
    monkeypatch.setattr(fused, "_try_out", lambda device, dtype: here(torch.device(DEVICE), dtype))


def test_every_kernel_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.modules.fast import kernels

    names = [one.name for one in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    functions = [value for module in modules for value in vars(module).values()
                 if isinstance(value, type) and issubclass(value, torch.autograd.Function)]
    called = set()
    for function in functions:
        for way in ("forward", "backward"):
            plain = getattr(function, way)

            def noting(*given: object, plain: Callable[..., object] = plain, name: tuple[object, str] = (function, way)
                       ) -> object:
                called.add(name)
                return plain(*given)

            monkeypatch.setattr(function, way, staticmethod(noting))
    pretending(monkeypatch)
    assert can_fuse.__wrapped__(torch.device("cuda"), torch.float32)
    assert len(functions) == 4 and called == {(one, way) for one in functions for way in ("forward", "backward")}


@pytest.mark.parametrize("failure", [RuntimeError("Failed to find C compiler\nand more"), RuntimeError("")])
def test_where_kernels_cannot_be_compiled_one_line_says_so(failure: Exception, monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

    def fails(*_: object) -> Tensor:
        raise failure

    monkeypatch.setattr(SumLayerNorm, "backward", fails)
    pretending(monkeypatch)
    assert not can_fuse.__wrapped__(torch.device("cuda"), torch.float32)
    message, = caplog.messages
    assert "norms are not fused" in message and "and more" not in message


def test_processors_have_no_kernels() -> None:
    assert not can_fuse(torch.device("cpu"), torch.bfloat16)
