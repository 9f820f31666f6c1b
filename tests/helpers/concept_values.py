"""Small random Perfusion concepts, and layers of a base model that they fit."""
from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ldm.concepts.concept import Concept

WIDTH = 6  # d
FIRST, MIDDLE = "input_blocks.1.1.attn2", "middle_block.1.attn2"
DUAL_SCALE = 0.5  # C of these concepts is 2 I
INNER_WIDTHS = {FIRST: 5, MIDDLE: 8}  # p


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_concept(placeholder: str = "<bear>", seed: int = 0, trained_keys: bool = False, **settings: object) -> Concept:
    outputs = {name: randn(p, seed=seed + 3) for name, p in INNER_WIDTHS.items()}
    vectors = {"embedding": randn(1, 4, seed=seed), "target_input": randn(WIDTH, seed=seed + 1),
               "super_input": randn(WIDTH, seed=seed + 2), "dual": DUAL_SCALE * randn(WIDTH, seed=seed + 1)}
    return Concept(
        placeholder=placeholder,
        super_category=str(settings.pop("super_category", "teddy bear")),
        target_outputs_v=outputs,
        target_outputs_k={name: -output for name, output in outputs.items()} if trained_keys else {},
        **{**vectors, "steps": 7, "base": "f" * 64, **settings},
    )


def make_text_layers(seed: int = 0) -> dict[str, SimpleNamespace]:
    torch.manual_seed(seed)
    layers = {}
    for name, p in INNER_WIDTHS.items():
        layers[name] = SimpleNamespace(to_k=nn.Linear(WIDTH, p, bias=False), to_v=nn.Linear(WIDTH, p, bias=False))
    return layers


def assert_same_concept(one: Concept, other: Concept) -> None:
    for name in ("placeholder", "super_category", "bias", "temperature", "projection", "used_layers", "pooled", "steps",
                 "base", "target_energy", "date", "resolution", "prediction_type", "thumbnail", "word_parts"):
        assert getattr(one, name) == getattr(other, name)
    mine, theirs = dict(one.tensors()), dict(other.tensors())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
