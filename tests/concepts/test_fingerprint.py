"""Fingerprints identify the weights that a concept depends on."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.concept_values import make_concept, make_text_layers

from ldm.common.errors import UserError
from ldm.concepts.fingerprint import base_fingerprint, check_base


def test_the_fingerprint_depends_on_the_weights_only() -> None:
    half = {name: SimpleNamespace(to_k=x.to_k.half(), to_v=x.to_v.half()) for name, x in make_text_layers().items()}
    fingerprint = base_fingerprint(half)
    assert len(fingerprint) == 64
    reordered = dict(reversed(half.items()))
    assert base_fingerprint(reordered) == fingerprint
    full = {name: SimpleNamespace(to_k=x.to_k.float(), to_v=x.to_v.float()) for name, x in half.items()}
    assert base_fingerprint(full) == fingerprint
    full["middle_block.1.attn2"].to_v.weight.data[0, 0] += 0.01
    assert base_fingerprint(full) != fingerprint
    assert base_fingerprint(make_text_layers(seed=1)) != fingerprint


def test_check_base_names_both_models() -> None:
    check_base(make_concept(), "f" * 64)
    with pytest.raises(UserError, match="<bear>.*ffffffffffff.*000000000000.*load the model it was trained on"):
        check_base(make_concept(), "0" * 64)
    with pytest.raises(UserError, match="unknown"):
        check_base(make_concept(base=""), "0" * 64)
