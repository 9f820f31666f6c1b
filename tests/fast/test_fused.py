"""Fused kernels against torch's operations. Without a GPU, Triton's interpreter runs the kernels."""
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
TOLERANCE = 2e-5  # relative and absolute


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off TF32, in which convolutions on a GPU round their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_gradient(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output for x, and the gradient of x for random gradients of the output."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(random_tensor(*y.shape, seed=1).to(y.dtype))
    return y.detach(), x.grad


def frozen_norm(channels: int, groups: int, epsilon: float = 1e-5) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, epsilon).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(random_tensor(channels, seed=2))
    norm.bias.copy_(random_tensor(channels, seed=3))
    return norm


class FusedNorm(nn.Module):
    """The fused norm of residual blocks: x plus a value per channel, group norm, SiLU."""

    def __init__(self, norm: nn.GroupNorm, silu: bool, added: Tensor | None = None, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.silu, self.added, self.residual = norm, silu, added, residual

    def forward(self, x: Tensor) -> Tensor:
        from ldm.modules.fast.kernels.group_norm import GroupNormSiLU

        norm = self.norm
        x, y = GroupNormSiLU.apply(x, self.added, norm.weight, norm.bias, norm.num_groups, norm.eps, self.silu)
        return torch.stack([x, y]) if self.residual else y


class PlainNorm(FusedNorm):
    """The same by torch's operations."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x if self.added is None else x + self.added[..., None, None])
        y = F.silu(y) if self.silu else y
        return torch.stack([x, y]) if self.residual else y


@pytest.mark.slow
@given(images=st.integers(1, 3), groups=st.sampled_from([1, 2, 32]), size=st.integers(1, 5), height=st.integers(1, 20),
       width=st.integers(1, 20), silu=st.booleans(), adds=st.booleans(), residual=st.booleans(),
       last=st.booleans())
@settings(max_examples=25)
def test_norms_equal_torch(images: int, groups: int, size: int, height: int, width: int, silu: bool, adds: bool,
                           residual: bool, last: bool) -> None:
    assume(size * height * width > 1)  # the norm of a single value is rounding error
    norm = frozen_norm(groups * size, groups, 1e-3)
    added = random_tensor(images, groups * size, seed=4) if adds else None
    x = 3 * random_tensor(images, groups * size, height, width) + 2
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    actual = with_gradient(FusedNorm(norm, silu, added, residual), x)
    exact_added = None if added is None else added.double()
    expected = with_gradient(PlainNorm(norm.double(), silu, exact_added, residual), x.double())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_norms_of_many_rows_and_channels() -> None:
    """The map takes several programs in each direction, and a group several iterations over its chunks."""
    norm = frozen_norm(160, 2)
    x = random_tensor(1, 160, 33, 65)
    actual, expected = with_gradient(FusedNorm(norm, True), x), with_gradient(PlainNorm(norm, True), x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def test_norms_of_maps_far_from_zero_are_accurate() -> None:
    norm = frozen_norm(4, 2)
    x = random_tensor(1, 4, 16, 16) + 1000
    exact = norm.double()(x.double())
    assert relative_error(FusedNorm(norm.float(), False)(x), exact) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    norm = frozen_norm(64, 32)
    x = random_tensor(2, 64, 8, 8).to(dtype)
    expected = with_gradient(PlainNorm(norm.float(), True), x.float())
    actual = with_gradient(FusedNorm(norm.to(dtype), True), x)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype and relative_error(one, other) < torch.finfo(dtype).eps


@pytest.mark.slow
@given(rows=st.integers(1, 9), channels=st.sampled_from([1, 5, 320, 5000]), adds=st.booleans())
@settings(max_examples=15)
def test_sums_with_layer_norm_equal_torch(rows: int, channels: int, adds: bool) -> None:
    from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

    norm = nn.LayerNorm(channels).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(random_tensor(channels, seed=2))
    norm.bias.copy_(random_tensor(channels, seed=3))

    def fused_sum_norm(both: Tensor) -> Tensor:
        x, added = both.unbind()
        return torch.stack(SumLayerNorm.apply(x, added if adds else None, norm.weight, norm.bias, norm.eps))

    def plain_sum_norm(both: Tensor) -> Tensor:
        total = both.sum(0) if adds else both[0]
        return torch.stack([total, norm(total)])

    both = random_tensor(2, 2, rows, channels, seed=rows) + 1
    for one, other in zip(with_gradient(fused_sum_norm, both), with_gradient(plain_sum_norm, both), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), width=st.sampled_from([1, 7, 1024, 1300]),
       seed=st.integers(0, 9))
@settings(max_examples=15)
def test_gated_gelu_equals_torch(shape: list[int], width: int, seed: int) -> None:
    from ldm.modules.fast.kernels.geglu import GatedGELU

    def plain(both: Tensor) -> Tensor:
        value, gate = both.chunk(2, -1)
        return value * F.gelu(gate)

    both = 2 * random_tensor(*shape, 2 * width, seed=seed)
    for one, other in zip(with_gradient(GatedGELU.apply, both), with_gradient(plain, both), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
def test_a_fused_unet_gives_the_same_results_and_keeps_its_keys() -> None:
    unet, prompts = frozen_unet().to(DEVICE), unet_inputs(with_concept=True, device=DEVICE)

    def results() -> list[Tensor]:
        output = unet(prompts.x, prompts.timesteps, context=prompts.context())
        output.square().mean().backward()
        return [output.detach(), *prompts.take_gradients()]

    expected, keys = results(), list(unet.state_dict())
    fuse(unet)
    actual = results()
    fuse(unet)  # a second call changes nothing
    assert list(unet.state_dict()) == keys
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-4
    classes = collections.Counter(type(module) for module in unet.modules())
    assert not any(classes[cls] for cls in (ResBlock, GEGLU, BasicTransformerBlock, SpatialTransformer))
    assert classes[FusedResBlock] and classes[FusedGroupNorm] == 1
    assert classes[FusedTransformerBlock] == classes[FusedGEGLU] == classes[FusedSpatialTransformer] > 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 64])
def test_residual_blocks_with_random_biases(width: int) -> None:
    block = ResBlock(32, 8, 0.0, width).to(DEVICE).requires_grad_(False)
    for seed, parameter in enumerate(block.parameters()):
        parameter.copy_(random_tensor(*parameter.shape, seed=seed) / 4)
    x, emb = random_tensor(2, 32, 6, 5), random_tensor(2, 8)
    expected = with_gradient(lambda maps: block(maps, emb), x)
    fuse(block)
    assert type(block) is FusedResBlock
    for one, other in zip(with_gradient(lambda maps: block(maps, emb), x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"use_scale_shift_norm": True}, {"up": True}, {"dims": 1}])
def test_other_residual_blocks_are_not_fused(options: dict[str, object]) -> None:
    block = ResBlock(32, 8, 0.0, **options)
    fuse(block)
    assert type(block) is ResBlock


def run_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `can_fuse` of CUDA run the kernels on the test's device."""
    run_kernels = fused._run_kernels
    monkeypatch.setattr(fused, "_run_kernels", lambda device, dtype: run_kernels(torch.device(DEVICE), dtype))


@pytest.mark.slow
def test_can_fuse_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.modules.fast import kernels

    names = [one.name for one in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    functions = [value for module in modules for value in vars(module).values()
                 if isinstance(value, type) and issubclass(value, torch.autograd.Function)]
    called = set()
    for function in functions:
        for way in ("forward", "backward"):
            plain = getattr(function, way)

            def record(*inputs: object, plain: Callable[..., object] = plain, name: tuple[object, str] = (function, way)
                       ) -> object:
                called.add(name)
                return plain(*inputs)

            monkeypatch.setattr(function, way, staticmethod(record))
    run_on_this_device(monkeypatch)
    assert can_fuse.__wrapped__(torch.device("cuda"), torch.float32)
    assert len(functions) == 4 and called == {(one, way) for one in functions for way in ("forward", "backward")}


@pytest.mark.slow
@pytest.mark.parametrize("failure", [RuntimeError("Failed to find C compiler\nand more"), RuntimeError("")])
def test_one_warning_if_kernels_cannot_be_compiled(failure: Exception, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    from ldm.modules.fast.kernels.layer_norm import SumLayerNorm

    def fail(*_: object) -> Tensor:
        raise failure

    monkeypatch.setattr(SumLayerNorm, "backward", fail)
    run_on_this_device(monkeypatch)
    assert not can_fuse.__wrapped__(torch.device("cuda"), torch.float32)
    message, = caplog.messages
    assert "norms are not fused" in message and "and more" not in message


def test_cpus_have_no_kernels() -> None:
    assert not can_fuse(torch.device("cpu"), torch.bfloat16)
