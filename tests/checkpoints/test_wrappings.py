"""Weights are found within what training tools wrap around them."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoints.averages import complete_averages, moving_averages
from ldm.checkpoints.header import read_header
from ldm.checkpoints.read import read_state_dict

Weights = dict[str, Tensor]


def weights() -> Weights:
    keys = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight",
            "first_stage_model.decoder.conv_in.weight", "cond_stage_model.transformer.text_model.x")
    return {key: torch.full((2, 3), float(index)) for index, key in enumerate(keys)}



def prefixed(prefix: str) -> Weights:
    return {prefix + key: value for key, value in weights().items()}


def inside(before: str, inserted: str) -> Weights:
    return {key.replace(before, before + inserted, 1): value for key, value in weights().items()}


CONTENTS: dict[str, Callable[[], Any]] = {
    "bare": weights,
    **{name: lambda name=name: {name: weights(), "step": 3} for name in (
        "state_dict", "model", "module", "ema", "params_ema", "params", "model_state_dict", "net", "odd")},
    "nested": lambda: {"state_dict": {"state_dict": weights()}},
    "nested in another": lambda: {"model": {"module": {"state_dict": weights()}}},
    "with an optimizer": lambda: {"model": weights(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "beside its averages": lambda: {"model": {key: value + 1 for key, value in weights().items()}, "ema": weights()},
    "parallel": lambda: prefixed("module."),
    "parallel twice": lambda: prefixed("module.module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "compiled in parallel": lambda: prefixed("module._orig_mod."),
    "network compiled": lambda: inside("model.", "_orig_mod."),
    "U-Net compiled": lambda: inside("model.diffusion_model.", "_orig_mod."),
    "network in parallel": lambda: inside("model.diffusion_model.", "module."),
    "in another model": lambda: prefixed("model."),
    "in an attribute": lambda: prefixed("pipeline.ldm."),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrapped_weights_are_found(tmp_path: Path, name: str) -> None:
    torch.save(CONTENTS[name](), tmp_path / "x.ckpt")
    read = read_state_dict(tmp_path / "x.ckpt")
    assert read.keys() == weights().keys() and all(torch.equal(read[key], value) for key, value in weights().items())
    assert read_header(tmp_path / "x.ckpt").shapes.keys() == weights().keys()


def test_names_that_look_wrapped_stay(tmp_path: Path) -> None:
    plain = {"module.weight": torch.ones(2), "model.weight": torch.ones(2), "first.module.x": torch.ones(1)}
    torch.save(plain, tmp_path / "x.ckpt")
    assert read_state_dict(tmp_path / "x.ckpt").keys() == plain.keys()


def network(names: tuple[str, ...]) -> tuple[Weights, Weights]:
    last = {f"model.diffusion_model.{name}.weight": torch.zeros(2) for name in names}
    averages = {f"model_ema.diffusion_model{name.replace('.', '')}weight": torch.ones(2) for name in names}
    return last, averages


def test_incomplete_averages_are_not_mixed_with_weights(caplog: Any) -> None:
    last, averages = network(("a", "b.c", "d"))
    assert complete_averages("x.ckpt", {**last, **averages}, last).keys() == last.keys() and not caplog.records
    averages.popitem()
    assert complete_averages("x.ckpt", {**last, **averages}, last) == {}
    assert "x.ckpt: only 2 of 3 weights have moving averages, so these are not used" in caplog.text


def test_averages_alone_are_the_weights() -> None:
    last, averages = network(("a", "b.c"))
    found = moving_averages(averages, last)
    assert found.keys() == last.keys() and all(bool((value == 1).all()) for value in found.values())
    assert complete_averages("x.ckpt", averages, last).keys() == last.keys()
