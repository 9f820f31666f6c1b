"""Concept files survive the round trip, every way in which they can be unusable is one line, and merging is exact."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.common.files import load_tensors
from ldm.concepts.concept import (
    Concept,
    base_fingerprint,
    check_base,
    load_perfusion_concepts,
    save_perfusion_concepts,
    stack_concepts,
)
from ldm.concepts.merging import rename_duplicates
from ldm.modules.context import PromptContext
from ldm.modules.rank_one import invert_covariance

WIDTH = 6
FIRST, MIDDLE = "input_blocks.1.1.attn2", "middle_block.1.attn2"
INNER = {FIRST: 5, MIDDLE: 8}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(placeholder: str = "<bear>", seed: int = 0, trained_keys: bool = False, **settings: object) -> Concept:
    outputs = {name: draw(p, seed=seed + 3) for name, p in INNER.items()}
    return Concept(
        placeholder=placeholder,
        super_category=str(settings.pop("super_category", "teddy bear")),
        embedding=draw(1, 4, seed=seed),
        target_input=draw(WIDTH, seed=seed + 1),
        super_input=draw(WIDTH, seed=seed + 2),
        target_output_v=outputs,
        target_output_k={name: -o for name, o in outputs.items()} if trained_keys else {},
        **{"steps": 7, "base": "f" * 64, **settings},
    )


def make_layers(seed: int = 0) -> dict[str, SimpleNamespace]:
    torch.manual_seed(seed)
    return {
        name: SimpleNamespace(to_k=nn.Linear(WIDTH, p, bias=False), to_v=nn.Linear(WIDTH, p, bias=False))
        for name, p in INNER.items()
    }


def assert_same(one: Concept, other: Concept) -> None:
    for name in ("placeholder", "super_category", "bias", "temperature", "projection", "used_layers", "steps", "base",
                 "target_energy"):
        assert getattr(one, name) == getattr(other, name)
    mine, theirs = dict(one.tensors()), dict(other.tensors())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# -- round trip


@pytest.mark.parametrize("trained_keys", [False, True])
def test_a_loaded_concept_survives_saving_bit_for_bit(tmp_path: Path, trained_keys: bool) -> None:
    concept = make(trained_keys=trained_keys, bias=0.65, temperature=0.15, projection="gated",
                   used_layers=[MIDDLE])
    first = tmp_path / "first.safetensors"
    save_perfusion_concepts(first, [concept])
    (loaded,) = load_perfusion_concepts(first)
    assert loaded.source == str(first)
    torch.testing.assert_close(loaded.target_input, concept.target_input.half().float(), rtol=0, atol=0)
    for precision in (torch.float16, None):
        save_perfusion_concepts(tmp_path / "second.safetensors", [loaded], precision)
        assert (tmp_path / "second.safetensors").read_bytes() == first.read_bytes()
    assert_same(load_perfusion_concepts(tmp_path / "second.safetensors")[0], loaded)


def test_precision_that_changes_nothing(tmp_path: Path) -> None:
    concept = make()
    for precision in (torch.float32, None):
        save_perfusion_concepts(tmp_path / "full.safetensors", [concept], precision)
        assert_same(load_perfusion_concepts(tmp_path / "full.safetensors")[0], concept)


def test_several_concepts_keep_their_order(tmp_path: Path) -> None:
    concepts = [make(f"<c{n}>", seed=10 * n, trained_keys=n == 2, steps=n) for n in range(12)]
    save_perfusion_concepts(tmp_path / "many.safetensors", concepts, precision=None)
    loaded = load_perfusion_concepts(tmp_path / "many.safetensors")
    assert len(loaded) == 12
    for one, other in zip(loaded, concepts, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("version", "unknown", "kept"), [
    (1, ("projection", "used_layers"), "full"), (2, ("used_layers",), "gated")])
def test_concepts_of_earlier_formats(tmp_path: Path, version: int, unknown: tuple[str, ...], kept: str) -> None:
    """Those from before projections are full, those from before used layers use all."""
    def age(tensors: dict, header: dict) -> None:
        header["format_version"] = version
        settings_of(header)["projection"] = "gated"
        for name in unknown:
            del settings_of(header)[name]

    path = rewritten(tmp_path / "old.safetensors", age)
    assert_same(load_perfusion_concepts(path)[0], make(projection=kept, used_layers=[]))


def test_each_keeps_the_energy_it_was_taught_with_where_it_is_known(tmp_path: Path) -> None:
    """The format is the same: earlier versions of this project read such files, too."""
    concepts = [make("<a>", target_energy=231.25), make("<b>", seed=9)]
    path = save_perfusion_concepts(tmp_path / "both.safetensors", rename_duplicates(concepts, ["<c>", "<d>"]))
    assert [concept.target_energy for concept in load_perfusion_concepts(path)] == [231.25, None]
    header = load_tensors(path)[1]["perfusion"]
    assert header["format_version"] == 3
    assert ["target_energy" in values for values in header["concepts"]] == [True, False]


def test_a_concept_of_stable_diffusion_takes_thirty_kilobytes(tmp_path: Path) -> None:
    inner = [320] * 5 + [640] * 5 + [1280] * 6
    layers = {f"output_blocks.{n}.1.transformer_blocks.0.attn2": torch.randn(p) for n, p in enumerate(inner)}
    assert sum(map(len, layers.values())) == 12_480
    vectors = {"embedding": draw(1, 768), "target_input": draw(768), "super_input": draw(768)}
    path = save_perfusion_concepts(tmp_path / "c.safetensors", [Concept("<x>", "cat", target_output_v=layers, **vectors)])
    assert path.stat().st_size < 33_000


# -- what cannot be used


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """A concept file whose tensors and parsed header `change` has altered in place."""
    save_perfusion_concepts(path, [make()], torch.float32)
    tensors, metadata = load_tensors(path)
    header = metadata["perfusion"]
    change(tensors, header)
    save_file(tensors, str(path), metadata={"perfusion": json.dumps(header)})
    return path


def settings_of(header: dict) -> dict:
    return header["concepts"][0]


V = "0.target_output_v.middle_block.1.attn2"
BROKEN: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "newer": (lambda t, h: h.update(format_version=4), "concept format 4.*update"),
    "no version": (lambda t, h: h.pop("format_version"), "not a concept"),
    "no list": (lambda t, h: h.pop("concepts"), "lists no concepts"),
    "empty list": (lambda t, h: h.update(concepts=[]), "no concept in it"),
    "settings no table": (lambda t, h: h.update(concepts=["x"]), "settings are damaged"),
    "no placeholder": (lambda t, h: settings_of(h).pop("placeholder"), "placeholder is missing"),
    "bias of the wrong kind": (lambda t, h: settings_of(h).update(bias="high"), "<bear>: its bias"),
    "bias not finite": (lambda t, h: settings_of(h).update(bias=float("nan")), "<bear>: its bias is nan"),
    "bias of many digits": (lambda t, h: settings_of(h).update(bias=10**400), "<bear>: its bias is 1000"),
    "temperature zero": (lambda t, h: settings_of(h).update(temperature=0), "its temperature is 0"),
    "no projection": (lambda t, h: settings_of(h).pop("projection"), "its projection is missing"),
    "unknown projection": (lambda t, h: settings_of(h).update(projection="half"), "'half' is none of full, gated"),
    "used layers of the wrong kind": (lambda t, h: settings_of(h).update(used_layers="all"), "its used_layers is"),
    "unknown layer in use": (lambda t, h: settings_of(h).update(used_layers=["attn9"]), "uses layer attn9, of which"),
    "energy of the wrong kind": (lambda t, h: settings_of(h).update(target_energy="2"), "its target_energy '2' is no"),
    "energy zero": (lambda t, h: settings_of(h).update(target_energy=0), "its target_energy 0 is no number above 0"),
    "white space": (lambda t, h: settings_of(h).update(placeholder="my bear"), "without white space"),
    "no embedding": (lambda t, h: t.pop("0.embedding"), "embedding is missing"),
    "no values": (lambda t, h: [t.pop(f"0.target_output_v.{n}") for n in INNER], "target_output_v is missing"),
    "several vectors": (lambda t, h: t.update({"0.embedding": draw(2, 4)}), r"one vector.*\(2, 4\)"),
    "sizes disagree": (lambda t, h: t.update({"0.super_input": draw(5)}), r"of one size, not \(6,\) and \(5,\)"),
    "zero input": (lambda t, h: t.update({"0.target_input": torch.zeros(WIDTH)}), "target_input is zero"),
    "value not a vector": (lambda t, h: t.update({V: draw(3, 3)}), "middle_block.1.attn2 do not fit"),
    "keys of one layer": (lambda t, h: t.update({V.replace("_v", "_k"): draw(8)}), "trained keys but no values"),
    "eight bits": (lambda t, h: t.update({V: torch.ones(8).to(torch.float8_e4m3fn)}), "float8_e4m3fn instead"),
    "eight bits of input": (lambda t, h: t.update({"0.target_input": torch.ones(WIDTH).to(torch.float8_e5m2)}), "e5m2"),
    "integers": (lambda t, h: t.update({V: torch.ones(8, dtype=torch.int32)}), "int32"),
    "not finite": (lambda t, h: t[V].fill_(torch.inf), "middle_block.1.attn2 holds numbers that are not finite"),
    "tensor of nobody": (lambda t, h: t.update({"1.embedding": draw(1, 4)}), "1.embedding, which belongs to no"),
    "table without layer": (lambda t, h: t.update({"0.target_output_v": draw(4)}), "belongs to no concept"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_contents_are_one_line_with_the_file(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    path = rewritten(tmp_path / "broken.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        load_perfusion_concepts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_off_foreign_and_missing_files(tmp_path: Path) -> None:
    path = save_perfusion_concepts(tmp_path / "whole.safetensors", [make()])
    cut = tmp_path / "cut.safetensors"
    for length in (0, 5, 100, path.stat().st_size - 1):
        cut.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            load_perfusion_concepts(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, str(foreign))
    with pytest.raises(UserError, match="not a concept"):
        load_perfusion_concepts(foreign)
    with pytest.raises(UserError, match="no such file"):
        load_perfusion_concepts(tmp_path / "missing.safetensors")


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    diverged = replace(make(), target_input=torch.full((WIDTH,), torch.nan))
    for concepts, message in (
        ([diverged], "diverged"),
        ([make(), make("<Bear>")], "several concepts are called <Bear>, where case does not count"),
        ([make("<a>"), make("<b>", base="0" * 64)], "different base models"),
        ([make("<a>"), replace(make("<b>"), target_output_v={"other": draw(5)})], "different base models"),
        ([], "no concept"),
    ):
        with pytest.raises(UserError, match=message):
            save_perfusion_concepts(path, concepts)
    assert list(tmp_path.iterdir()) == []


# -- merging


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["<a>", "<b>"], ["<a>", "<b>"]),
        (["<a>", "<a>", "<a>"], ["<a>", "<a-2>", "<a-3>"]),
        (["<a>", "<a>", "<a-2>"], ["<a>", "<a-3>", "<a-2>"]),
        (["sks", "sks"], ["sks", "sks-2"]),
    ],
)
def test_equal_placeholders_are_numbered(words: list[str], expected: list[str]) -> None:
    concepts = [make(word, seed=n) for n, word in enumerate(words)]
    merged = rename_duplicates(concepts)
    assert [concept.placeholder for concept in merged] == expected
    assert [concept.placeholder for concept in concepts] == words
    for old, new in zip(concepts, merged, strict=True):
        assert_same(replace(new, placeholder=old.placeholder), old)


def test_given_placeholders() -> None:
    concepts = [make("<a>"), make("<a>", seed=1)]
    assert [c.placeholder for c in rename_duplicates(concepts, ["<x>", "<y>"])] == ["<x>", "<y>"]
    for words, message in (
        (["<x>"], "1 placeholders for 2 concepts"),
        (["<x>", "<x>"], "<x> is given twice"),
        (["<x>", "<X>"], "<X> is given twice, where case does not count"),
        (["<x>", "my bear"], "'my bear'"),
        (["<x>", ""], "''"),
    ):
        with pytest.raises(UserError, match=message):
            rename_duplicates(concepts, words)


def test_concepts_of_different_bases_are_not_merged() -> None:
    one, other = make("<a>", source="a.safetensors"), make("<b>", base="0" * 64, source="b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors.*000000000000.*a\.safetensors.*ffffffffffff"):
        rename_duplicates([one, other])


# -- the base model


def test_fingerprint_is_that_of_the_weights_alone() -> None:
    half = {name: SimpleNamespace(to_k=x.to_k.half(), to_v=x.to_v.half()) for name, x in make_layers().items()}
    fingerprint = base_fingerprint(half)
    assert len(fingerprint) == 64
    reordered = dict(reversed(half.items()))
    assert base_fingerprint(reordered) == fingerprint
    full = {name: SimpleNamespace(to_k=x.to_k.float(), to_v=x.to_v.float()) for name, x in half.items()}
    assert base_fingerprint(full) == fingerprint
    full["middle_block.1.attn2"].to_v.weight.data[0, 0] += 0.01
    assert base_fingerprint(full) != fingerprint
    assert base_fingerprint(make_layers(seed=1)) != fingerprint


def test_check_base_names_both() -> None:
    check_base(make(), "f" * 64)
    with pytest.raises(UserError, match="<bear>.*ffffffffffff.*000000000000.*load the model it was trained on"):
        check_base(make(), "0" * 64)
    with pytest.raises(UserError, match="unknown"):
        check_base(make(base=""), "0" * 64)


# -- the edit they make


def test_stacked_concepts_lock_keys_to_the_super_category_unless_they_were_trained() -> None:
    layers = make_layers()
    locked, trained = make("<a>", bias=1, temperature=1), make("<b>", seed=9, trained_keys=True, bias=0.6)
    edit = stack_concepts([locked, trained], layers)
    assert edit.target_inputs.dtype == torch.float32
    torch.testing.assert_close(edit.target_inputs, torch.stack([locked.target_input, trained.target_input]))
    torch.testing.assert_close(edit.biases, torch.tensor([1.0, 0.6]))
    torch.testing.assert_close(edit.temperatures, torch.tensor([1.0, 0.1]))
    for name, layer in layers.items():
        torch.testing.assert_close(edit.target_outputs_k[name][0], layer.to_k.weight.detach() @ locked.super_input)
        assert torch.equal(edit.target_outputs_k[name][1], trained.target_output_k[name])
        assert torch.equal(edit.target_outputs_v[name][1], trained.target_output_v[name])
    context = edit.context(draw(2, 3, WIDTH), invert_covariance(torch.eye(WIDTH)))
    assert isinstance(context, PromptContext)
    assert context.concept_count == 2


def test_layers_that_are_not_used_give_the_super_categorys_values() -> None:
    layers = make_layers()
    some, every = make("<a>", used_layers=[MIDDLE]), make("<b>", seed=9)
    edit = stack_concepts([some, every], layers)
    plain = layers[FIRST].to_v.weight.detach() @ some.super_input
    torch.testing.assert_close(edit.target_outputs_v[FIRST][0], plain)
    assert not torch.allclose(plain, some.target_output_v[FIRST])
    assert torch.equal(edit.target_outputs_v[MIDDLE][0], some.target_output_v[MIDDLE])
    for name in layers:
        assert torch.equal(edit.target_outputs_v[name][1], every.target_output_v[name])
    assert some.summary.endswith(", 1 of 2 layers") and "layers" not in every.summary


def test_concept_with_other_layers_than_the_model_is_named() -> None:
    layers = make_layers()
    layers.pop("middle_block.1.attn2")
    with pytest.raises(UserError, match="<bear>.*middle_block.1.attn2"):
        stack_concepts([make()], layers)
