"""Deferred initialization: every tensor gets its values, loaded ones stay, and needless ones are never generated."""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.deferred_init import RANDOM_INITS, DeferredInit
from ldm.checkpoints.load import load_model, load_weights
from ldm.common.errors import UserError
from ldm.modules.diffusionmodules.util import zero_module
from ldm.util import instantiate_from_config

EMPTY = torch.empty
UNWRITTEN = 12345.0  # the value of memory that nothing has written


@pytest.fixture(autouse=True)
def marked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill empty memory with a value that no model has, so that tests notice uninitialized tensors."""
    def marked(*args: Any, **kwargs: Any) -> Tensor:
        tensor = EMPTY(*args, **kwargs)
        on_cpu = tensor.is_floating_point() and tensor.device.type == "cpu"
        return tensor.detach().fill_(UNWRITTEN) if on_cpu else tensor

    monkeypatch.setattr(torch, "empty", marked)


def plain_layers() -> nn.Module:
    return nn.ModuleDict({"linear": nn.Linear(40, 50), "convolution": nn.Conv2d(8, 9, 3), "words": nn.Embedding(90, 20),
                          "padded": nn.Embedding(9, 4, padding_idx=0), "norm": nn.GroupNorm(4, 8),
                          "zero": zero_module(nn.Conv2d(8, 8, 3)), "attention": nn.MultiheadAttention(8, 2)})


def clip_tower() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                        num_attention_heads=2, max_position_embeddings=16, projection_dim=16))


def open_clip_tower() -> nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(context_length=8, vocab_size=99, width=16, heads=2, layers=2, output_dim=16)


def unet() -> nn.Module:
    return instantiate_from_config(tiny_models.unet_config())


def first_stage() -> nn.Module:
    return instantiate_from_config(tiny_models.first_stage_config())


@pytest.mark.parametrize("build", [plain_layers, clip_tower, open_clip_tower, unet, first_stage])
def test_deferred_values_follow_the_same_distributions(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    usual = build().state_dict()
    with DeferredInit():
        late = build()
    deferred = late.state_dict()
    assert deferred.keys() == usual.keys()
    for name, tensor in deferred.items():
        assert not (tensor == UNWRITTEN).any(), name
        spread, expected = (float(values.double().std(correction=0)) for values in (tensor, usual[name]))
        if tensor.numel() > 30:
            assert spread == pytest.approx(expected, rel=8 / math.sqrt(tensor.numel()), abs=1e-9), name
        elif not expected:
            assert torch.equal(tensor, usual[name]), name


def test_the_same_seed_gives_the_same_numbers() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        with DeferredInit():
            states.append(unet().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_reading_a_tensor_initializes_it_first() -> None:
    with DeferredInit():
        layer = nn.Linear(300, 300)
        largest = layer.weight.abs().max().item()
        copy = layer.bias.clone()
        joined = torch.cat([nn.Linear(3, 3).weight, nn.Linear(3, 3).weight])
        viewed = nn.Linear(3, 3).weight.data.T
        half = nn.Linear(3, 3).weight.to(torch.float16)
    assert 0 < largest <= 1 / math.sqrt(300) and largest == layer.weight.abs().max().item()
    assert torch.equal(copy, layer.bias)
    assert all(bool(tensor.abs().max() <= 1 / math.sqrt(3)) for tensor in (joined, viewed, half))


def test_in_place_changes_count_as_reading() -> None:
    torch.manual_seed(0)
    with DeferredInit():
        scaled, sliced, source, target = (nn.Linear(20, 20).weight.detach() for _ in range(4))
        scaled.mul_(100)
        sliced[0].fill_(7)
        target.copy_(source.T)
    assert 3 < scaled.abs().max() <= 100 / math.sqrt(20)
    assert (sliced[0] == 7).all() and (sliced[1:].abs() <= 1 / math.sqrt(20)).all()
    assert torch.equal(target, source.T) and (source.abs() <= 1 / math.sqrt(20)).all()


def test_overwritten_values_are_kept() -> None:
    with DeferredInit():
        layer = nn.Linear(3, 3)
        layer.weight.detach().copy_(torch.eye(3))
        nn.init.constant_(layer.bias, 5.0)
        swapped = nn.Linear(3, 3)
        swapped.weight.data = torch.eye(3)
        again = nn.Linear(3, 3)
        nn.init.normal_(again.weight, mean=50.0, std=0.1)
    assert torch.equal(layer.weight, torch.eye(3)) and (layer.bias == 5).all()
    assert torch.equal(swapped.weight, torch.eye(3))
    assert ((again.weight - 50).abs() < 1).all()


def test_initialization_with_an_own_generator_is_not_deferred() -> None:
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = torch.zeros(4).normal_(generator=generators[0]), torch.zeros(4).uniform_(generator=generators[0])
    with DeferredInit():
        second = torch.zeros(4), torch.zeros(4)
        second[0].normal_(generator=generators[1])
        second[1].uniform_(generator=generators[1])
    assert all(map(torch.equal, expected, second))


def test_errors_pass_through_and_end_the_mode() -> None:
    with pytest.raises(ZeroDivisionError), DeferredInit():
        nn.Linear(2, 2)
        raise ZeroDivisionError
    assert not (nn.Linear(2, 2).weight == UNWRITTEN).any()


class Counting(DeferredInit):
    initialization_count = 0

    def _defer(self, target: Tensor, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            Counting.initialization_count += 1
            return function(*args, **kwargs)

        super()._defer(target, counted, args, kwargs)


@pytest.fixture
def initialization_count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that counts the tensors that `load_model` initialized at random."""
    monkeypatch.setattr("ldm.checkpoints.load.DeferredInit", Counting)
    monkeypatch.setattr(Counting, "initialization_count", 0)
    return lambda: Counting.initialization_count


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_a_loaded_model_equals_the_file_without_random_initialization(
    tmp_path: Path, initialization_count: Callable[[], int], precision: torch.dtype
) -> None:
    path = tiny_models.write_weights(tmp_path)
    state = {key: value.to(precision) for key, value in torch.load(path)["state_dict"].items()}
    torch.save({"state_dict": state}, path)
    config = tiny_models.latent_diffusion_config(tmp_path)
    usual = instantiate_from_config(config, ckpt_path=str(path), use_ema=False)
    model = load_model({"model": config}, path)
    assert initialization_count() == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, usual.state_dict()[name]), name
    own = dict(usual.named_buffers())
    assert all(torch.equal(buffer, own[name]) for name, buffer in model.named_buffers())
    context = model.get_learned_conditioning(["a photo"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    usual.to(memory_format=torch.channels_last).eval()
    assert torch.equal(model.apply_model(x, t, context), usual.apply_model(x, t, context))


@pytest.mark.slow
def test_missing_keys_are_still_refused(tmp_path: Path) -> None:
    path = tiny_models.write_weights(tmp_path)
    state = torch.load(path)["state_dict"]
    state.pop("model.diffusion_model.out.2.weight")
    torch.save(state, path)
    with pytest.raises(UserError, match="1 keys missing"):
        load_model({"model": tiny_models.latent_diffusion_config(tmp_path)}, path)


@pytest.mark.slow
def test_ignored_keys_are_initialized(tmp_path: Path, initialization_count: Callable[[], int]) -> None:
    path = tiny_models.write_weights(tmp_path)
    ignored = ["first_stage_model.decoder.conv_out"]
    model = load_model({"model": tiny_models.latent_diffusion_config(tmp_path, ignore_keys=ignored)}, path)
    last = model.first_stage_model.decoder.conv_out
    assert initialization_count() == 2
    bound = 1 / math.sqrt(last.weight[0].numel())
    for tensor in (last.weight, last.bias):
        assert 0 < tensor.abs().max() <= bound


class ManyInits(nn.Module):
    """Initializes one parameter by each function of `RANDOM_INITS`, and may load them."""

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.parts = nn.ParameterDict({name: nn.Parameter(torch.empty(6, 6)) for name in sorted(RANDOM_INITS)})
        for name, part in self.parts.items():
            getattr(nn.init, name)(part)
        if path is not None:
            load_weights(self, path)


def test_every_initialization_is_deferred_and_runs(tmp_path: Path) -> None:
    torch.save(ManyInits().state_dict(), tmp_path / "x.ckpt")
    for path in (None, str(tmp_path / "x.ckpt")):
        with DeferredInit() as mode:
            module = ManyInits(path)
            assert len(mode._pending) == (len(RANDOM_INITS) if path is None else 0)
        assert all(0 < part.abs().max() < 10 for part in module.parts.values())
