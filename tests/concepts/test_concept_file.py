"""Concept files survive a round trip, and each invalid file is refused with a one-line error."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.concept_values import INNER_WIDTHS, MIDDLE, WIDTH, assert_same_concept, make_concept, randn
from safetensors.torch import save_file

from ldm.common.errors import UserError
from ldm.common.files import load_tensors
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.merging import rename_duplicates

# Round trip


@pytest.mark.parametrize("trained_keys", [False, True])
def test_a_loaded_concept_survives_saving_bit_for_bit(tmp_path: Path, trained_keys: bool) -> None:
    concept = make_concept(trained_keys=trained_keys, bias=0.65, temperature=0.15, projection="gated",
                           used_layers=[MIDDLE])
    first = tmp_path / "first.safetensors"
    save_perfusion_concepts(first, [concept])
    (loaded,) = load_perfusion_concepts(first)
    assert loaded.source == str(first)
    torch.testing.assert_close(loaded.target_input, concept.target_input.half().float(), rtol=0, atol=0)
    for precision in (torch.float16, None):
        save_perfusion_concepts(tmp_path / "second.safetensors", [loaded], precision)
        assert (tmp_path / "second.safetensors").read_bytes() == first.read_bytes()
    assert_same_concept(load_perfusion_concepts(tmp_path / "second.safetensors")[0], loaded)


def test_lossless_precision_changes_no_number(tmp_path: Path) -> None:
    concept = make_concept()
    for precision in (torch.float32, None):
        save_perfusion_concepts(tmp_path / "full.safetensors", [concept], precision)
        assert_same_concept(load_perfusion_concepts(tmp_path / "full.safetensors")[0], concept)


def test_several_concepts_keep_their_order(tmp_path: Path) -> None:
    concepts = [make_concept(f"<c{n}>", seed=10 * n, trained_keys=n == 2, steps=n) for n in range(12)]
    save_perfusion_concepts(tmp_path / "many.safetensors", concepts, precision=None)
    loaded = load_perfusion_concepts(tmp_path / "many.safetensors")
    assert len(loaded) == 12
    for one, other in zip(loaded, concepts, strict=True):
        assert_same_concept(one, other)


@pytest.mark.parametrize(("version", "missing", "projection"), [
    (1, ("projection", "used_layers"), "full"), (2, ("used_layers",), "gated")])
def test_earlier_formats_load(tmp_path: Path, version: int, missing: tuple[str, ...], projection: str) -> None:
    """Format 1 means full projections, formats 1 and 2 mean that all layers are used."""
    def make_older(tensors: dict, header: dict) -> None:
        header["format_version"] = version
        settings_of(header)["projection"] = "gated"
        for name in missing:
            del settings_of(header)[name]

    path = save_changed(tmp_path / "old.safetensors", make_older)
    assert_same_concept(load_perfusion_concepts(path)[0], make_concept(projection=projection, used_layers=[]))


def test_target_energy_is_stored_if_it_is_known(tmp_path: Path) -> None:
    """The format version stays 3, so earlier versions of this project read such files, too."""
    concepts = [make_concept("<a>", target_energy=231.25), make_concept("<b>", seed=9)]
    path = save_perfusion_concepts(tmp_path / "both.safetensors", rename_duplicates(concepts, ["<c>", "<d>"]))
    assert [concept.target_energy for concept in load_perfusion_concepts(path)] == [231.25, None]
    header = load_tensors(path)[1]["perfusion"]
    assert header["format_version"] == 3
    assert ["target_energy" in values for values in header["concepts"]] == [True, False]


def test_a_stable_diffusion_concept_takes_30_kilobytes(tmp_path: Path) -> None:
    inner = [320] * 5 + [640] * 5 + [1280] * 6
    layers = {f"output_blocks.{n}.1.transformer_blocks.0.attn2": torch.randn(p) for n, p in enumerate(inner)}
    assert sum(map(len, layers.values())) == 12_480
    vectors = {"embedding": randn(1, 768), "target_input": randn(768), "super_input": randn(768)}
    concept = Concept("<x>", "cat", target_outputs_v=layers, **vectors)
    path = save_perfusion_concepts(tmp_path / "c.safetensors", [concept])
    assert path.stat().st_size < 33_000


# Invalid files


def save_changed(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """Save a concept file after `change` has modified its tensors and parsed header in place."""
    save_perfusion_concepts(path, [make_concept()], torch.float32)
    tensors, metadata = load_tensors(path)
    header = metadata["perfusion"]
    change(tensors, header)
    save_file(tensors, str(path), metadata={"perfusion": json.dumps(header)})
    return path


def settings_of(header: dict) -> dict:
    return header["concepts"][0]


V = "0.target_output_v.middle_block.1.attn2"
INVALID: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "newer": (lambda t, h: h.update(format_version=4), "concept format 4.*update"),
    "no version": (lambda t, h: h.pop("format_version"), "not a concept"),
    "no list": (lambda t, h: h.pop("concepts"), "lists no concepts"),
    "empty list": (lambda t, h: h.update(concepts=[]), "no concept in it"),
    "settings not a dictionary": (lambda t, h: h.update(concepts=["x"]), "settings are damaged"),
    "no placeholder": (lambda t, h: settings_of(h).pop("placeholder"), "placeholder is missing"),
    "bias of the wrong type": (lambda t, h: settings_of(h).update(bias="high"), "<bear>: its bias"),
    "bias not finite": (lambda t, h: settings_of(h).update(bias=float("nan")), "<bear>: its bias is nan"),
    "bias of many digits": (lambda t, h: settings_of(h).update(bias=10**400), "<bear>: its bias is 1000"),
    "temperature zero": (lambda t, h: settings_of(h).update(temperature=0), "its temperature is 0"),
    "no projection": (lambda t, h: settings_of(h).pop("projection"), "its projection is missing"),
    "unknown projection": (lambda t, h: settings_of(h).update(projection="half"), "'half' is not one of full, gated"),
    "used layers of the wrong type": (lambda t, h: settings_of(h).update(used_layers="all"), "its used_layers is"),
    "unknown used layer": (lambda t, h: settings_of(h).update(used_layers=["attn9"]),
                           "uses layer attn9, but has no target output for it"),
    "energy of the wrong type": (lambda t, h: settings_of(h).update(target_energy="2"), "its target_energy '2' is not"),
    "energy zero": (lambda t, h: settings_of(h).update(target_energy=0), "its target_energy 0 is not a number above 0"),
    "white space": (lambda t, h: settings_of(h).update(placeholder="my bear"), "without white space"),
    "no embedding": (lambda t, h: t.pop("0.embedding"), "embedding is missing"),
    "no values": (lambda t, h: [t.pop(f"0.target_output_v.{n}") for n in INNER_WIDTHS], "target_output_v is missing"),
    "several vectors": (lambda t, h: t.update({"0.embedding": randn(2, 4)}), r"one vector.*\(2, 4\)"),
    "sizes disagree": (lambda t, h: t.update({"0.super_input": randn(5)}), r"of one size, not \(6,\) and \(5,\)"),
    "zero input": (lambda t, h: t.update({"0.target_input": torch.zeros(WIDTH)}), "target_input is zero"),
    "value not a vector": (lambda t, h: t.update({V: randn(3, 3)}), "middle_block.1.attn2 do not fit"),
    "keys of one layer": (lambda t, h: t.update({V.replace("_v", "_k"): randn(8)}), "trained keys but no values"),
    "eight bits": (lambda t, h: t.update({V: torch.ones(8).to(torch.float8_e4m3fn)}), "float8_e4m3fn instead"),
    "eight bits of input": (lambda t, h: t.update({"0.target_input": torch.ones(WIDTH).to(torch.float8_e5m2)}), "e5m2"),
    "integers": (lambda t, h: t.update({V: torch.ones(8, dtype=torch.int32)}), "int32"),
    "not finite": (lambda t, h: t[V].fill_(torch.inf), "middle_block.1.attn2 holds numbers that are not finite"),
    "tensor of no concept": (lambda t, h: t.update({"1.embedding": randn(1, 4)}), "1.embedding, which belongs to no"),
    "table without layer": (lambda t, h: t.update({"0.target_output_v": randn(4)}), "belongs to no concept"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INVALID)
def test_invalid_contents_are_a_one_line_error_with_the_file(tmp_path: Path, name: str) -> None:
    change, message = INVALID[name]
    path = save_changed(tmp_path / "invalid.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        load_perfusion_concepts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = save_perfusion_concepts(tmp_path / "complete.safetensors", [make_concept()])
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


def test_concepts_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    diverged = replace(make_concept(), target_input=torch.full((WIDTH,), torch.nan))
    other_layers = replace(make_concept("<b>"), target_outputs_v={"other": randn(5)})
    for concepts, message in (
        ([diverged], "diverged"),
        ([make_concept(), make_concept("<Bear>")], "several concepts are called <Bear> .case is ignored"),
        ([make_concept("<a>"), make_concept("<b>", base="0" * 64)], "different base models"),
        ([make_concept("<a>"), other_layers], "different base models"),
        ([], "no concept"),
    ):
        with pytest.raises(UserError, match=message):
            save_perfusion_concepts(path, concepts)
    assert list(tmp_path.iterdir()) == []
