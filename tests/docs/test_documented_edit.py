"""The plain-torch code of docs/concept_file.md applies the edit as this project does, from a file alone."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.concept_values import FIRST, MIDDLE, WIDTH, make_concept, make_text_layers, randn

from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.stacking import stack_concepts

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "concept_file.md"


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the code in the document defines."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("settings", [
    [{}], [{"projection": "gated", "used_layers": [MIDDLE]}], [{}, {"bias": 0.4, "temperature": 0.3}],
    [{"projection": "gated"}, {"projection": "gated", "trained_keys": True}], [{}, {"projection": "gated"}],
    [{}, {"seed": 0, "bias": 0.3}]], ids=["one", "gated", "two", "two gated", "mixed", "twice the same direction"])
def test_the_code_in_the_document_gives_our_keys_and_values(
    documented: dict[str, Any], settings: list[dict[str, Any]], tmp_path: Path
) -> None:
    concepts = [make_concept(f"<c{n}>", **{"seed": 10 * n, **values}) for n, values in enumerate(settings)]
    concepts[0].target_outputs_v.pop(FIRST)
    path = save_perfusion_concepts(tmp_path / "concepts.safetensors", concepts)
    layers, encoding = make_text_layers(), randn(2, 5, WIDTH, seed=99)
    ours = stack_concepts(load_perfusion_concepts(path), layers).context(encoding)
    for name, layer in layers.items():
        weights = layer.to_k.weight.detach(), layer.to_v.weight.detach()
        found = documented["keys_values"](documented["load"](path), encoding, name, *weights)
        for one, other in zip(found, ours.keys_values(name, layer.to_k, layer.to_v), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
