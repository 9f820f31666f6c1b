"""LitEma against a plain loop, and its use with a model."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    return model


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("warm_up", [True, False])
def test_updates_equal_a_plain_loop(warm_up: bool) -> None:
    model = small_model()
    ema = LitEma(model, decay=0.4, use_num_upates=warm_up)
    average = model[0].weight.detach().clone()
    for count in range(1, 15):
        shift(model)
        ema(model)
        decay = min(0.4, (1 + count) / (10 + count)) if warm_up else 0.4
        average = average * decay + model[0].weight.detach() * (1 - decay)
    assert torch.allclose(ema.get_buffer("0weight"), average, atol=1e-6)
    assert int(ema.num_updates) == (14 if warm_up else -1)


def test_buffers_have_the_names_of_public_checkpoints() -> None:
    ema = LitEma(small_model())
    assert set(ema.state_dict()) == {"decay", "num_updates", "0weight", "0bias", "1weight"}
    assert float(ema.decay) == pytest.approx(0.9999)
    assert not list(ema.parameters())


def test_copy_store_and_restore() -> None:
    model = small_model()
    ema = LitEma(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    shift(model)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    ema.store(model.parameters())
    ema.copy_to(model)
    assert torch.equal(model[0].weight, start["0.weight"])
    assert torch.equal(model[1].bias, trained["1.bias"])  # frozen, so not averaged
    ema.restore(model.parameters())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError):
        ema.restore(model.parameters())  # nothing is stored anymore


def test_averaged_restores_the_weights_even_after_an_error() -> None:
    model = small_model()
    ema = LitEma(model)
    start = model[0].weight.detach().clone()
    shift(model)
    trained = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError), ema.averaged(model):
        assert torch.equal(model[0].weight, start)
        raise RuntimeError
    assert torch.equal(model[0].weight, trained)


def test_a_loaded_average_continues() -> None:
    model = small_model()
    first, second = LitEma(model), LitEma(small_model())
    shift(model)
    first(model)
    second.load_state_dict(first.state_dict())
    shift(model)
    first(model)
    second(model)
    assert all(torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items())


def test_impossible_averages_are_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        LitEma(small_model(), decay=1.5)
    with pytest.raises(ValueError, match="nothing to average"):
        LitEma(small_model().requires_grad_(False))
    twins = nn.Module()
    twins.ab = nn.Parameter(torch.zeros(1))
    twins.a = nn.Module()
    twins.a.b = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="without dots"):
        LitEma(twins)


def test_updates_can_be_counted_again() -> None:
    ema = LitEma(torch.nn.Linear(1, 1))
    ema.num_updates += 4
    ema.reset_num_updates()
    assert int(ema.num_updates) == 0
