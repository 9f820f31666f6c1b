"""Fingerprints identify the weights that a concept depends on."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.concept_values import INNER_WIDTHS, make_concept, make_text_layers

from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts import fingerprint
from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import KNOWN_BASES, BaseModel, base_fingerprint, check_base, checkpoint_name
from ldm.concepts.merging import merge_concepts
from ldm.concepts.storage import load_concepts, save_concepts


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


def loaded(precision: torch.dtype = torch.float32, noise: float = 0.0, **described: Any) -> BaseModel:
    """Describe the model of `make_text_layers` in another precision, or slightly changed."""
    layers = make_text_layers()
    for layer in layers.values():
        for projection in (layer.to_k, layer.to_v):
            weight = projection.weight.data
            weight.copy_((weight + noise * torch.randn(weight.shape)).to(precision).float())
    return replace(BaseModel.of(layers), **described)


def taught_on(base: BaseModel, **settings: Any) -> Concept:
    return make_concept(**{**base.stored, **settings})


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_base_in_another_precision_is_the_same(caplog: Any, precision: torch.dtype) -> None:
    check_base(taught_on(loaded()), loaded(precision))
    check_base(taught_on(loaded(precision)), loaded())
    assert not caplog.records


def test_a_finetuned_base_causes_one_warning(caplog: Any) -> None:
    fingerprint._warn_of_another_base.cache_clear()  # another test may have caused it
    concept = taught_on(loaded(name="plain"), source="tuned.safetensors")
    for _ in range(3):
        check_base(concept, loaded(noise=1e-2, name="tuned"))
    assert len(caplog.records) == 1
    assert re.search("<bear>.*taught on plain, .*context 6, and .*generated with tuned, .*context 6", caplog.text)
    check_base(taught_on(loaded(), base_samples="", source="of an earlier version"), loaded(torch.bfloat16))
    assert len(caplog.records) == 2  # it cannot be told


def test_a_base_of_another_family_is_refused_by_name() -> None:
    sd = BaseModel("0" * 64, "v1-5", layers={"input_blocks.1.1.attn2": (320, 768)})
    with pytest.raises(UserError, match="<bear>.*on plain, .*context 6, .*v1-5, Stable Diffusion 1.x.*another model"):
        check_base(taught_on(loaded(name="plain")), sd)
    with pytest.raises(UserError, match="trained on a latent diffusion model of context 6, and"):
        check_base(make_concept(), sd)


def test_concepts_of_stable_diffusion_1_and_xl_exclude_each_other() -> None:
    bases = {"v1-5, Stable Diffusion 1.x": BaseModel("1" * 64, "v1-5", layers={"input_blocks.1.1.attn2": (320, 768)}),
             "xl, Stable Diffusion XL": BaseModel("2" * 64, "xl", layers={"input_blocks.4.1.attn2": (640, 2048)})}
    for (own, base), (other, another) in (tuple(bases.items()), tuple(bases.items())[::-1]):
        (layer, (inner, width)), = base.layers.items()
        concept = Concept("<x>", "cat", torch.ones(1, width), torch.ones(width), torch.ones(width),
                          {layer: torch.ones(inner)}, base=base.fingerprint, base_name=base.name)
        check_base(concept, base)
        with pytest.raises(UserError, match=f"<x>.*trained on {own}.*and the loaded model is {other}.*another model"):
            check_base(concept, another)


def test_an_unrelated_base_of_the_same_shapes_is_refused() -> None:
    with pytest.raises(UserError, match="<bear>.*is another model"):
        check_base(taught_on(loaded()), BaseModel.of(make_text_layers(seed=1)))


def test_concept_files_keep_the_description_of_the_base(tmp_path: Path) -> None:
    concept = taught_on(loaded(name="plain"))
    read = load_concepts(save_concepts(tmp_path / "c.safetensors", [concept]))[0]
    assert (read.base, read.base_name, read.base_samples) == (concept.base, "plain", concept.base_samples)
    assert len(read.base_samples) < 100 * len(INNER_WIDTHS)


def test_concepts_of_one_base_in_two_precisions_merge(tmp_path: Path) -> None:
    one = taught_on(loaded(), placeholder="<a>")
    other = taught_on(loaded(torch.bfloat16), placeholder="<b>")
    merged = merge_concepts([one, other])
    assert one.base != other.base and merged[1].base == one.base
    assert len(load_concepts(save_concepts(tmp_path / "c.safetensors", merged))) == 2


def test_the_bundled_model_is_known() -> None:
    """Its concept files stay as they were before files described their base."""
    folder = PROJECT_ROOT / "models" / "mini"
    tensors = read_state_dict(folder / "model.safetensors")
    layers = {}
    for key in tensors:
        if match := re.fullmatch(r"model\.diffusion_model\.(.*attn2)\.to_k\.weight", key):
            weights = {name: SimpleNamespace(weight=tensors[key.replace("to_k", name)]) for name in ("to_k", "to_v")}
            layers[match[1]] = SimpleNamespace(**weights)
    base = BaseModel.of(layers, folder / "model.safetensors")
    assert KNOWN_BASES[base.fingerprint].samples == base.samples and base.stored == {"base": base.fingerprint}
    assert base.label == "the bundled mini model" and checkpoint_name("a/v1-5.ckpt") == "v1-5"
