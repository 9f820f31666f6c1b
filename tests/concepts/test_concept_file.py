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
    (1, ("projection", "used_layers"), "full"), (2, ("used_layers",), "gated"), (3, (), "gated")])
def test_earlier_formats_load_and_are_saved_in_this_one(
    tmp_path: Path, version: int, missing: tuple[str, ...], projection: str
) -> None:
    """Format 1 means full projections, formats 1 and 2 mean that all layers are used; before 4 there is no dual."""
    def make_older(tensors: dict, header: dict) -> None:
        header["format_version"] = version
        settings_of(header)["projection"] = "gated"
        tensors["0.embedding"] = tensors.pop("clip_l")
        del tensors["0.dual"]
        for name in ("word_parts", "pooled", *missing):
            del settings_of(header)[name]

    path = save_changed(tmp_path / "old.safetensors", make_older)
    expected = make_concept(projection=projection, used_layers=[], dual=None)
    (loaded,) = load_perfusion_concepts(path)
    assert_same_concept(loaded, expected)
    newer = make_concept("<b>", seed=9)
    save_perfusion_concepts(path, [loaded, newer], precision=None)
    tensors, metadata = load_tensors(path)
    assert metadata["perfusion"]["format_version"] == 4
    assert "0.clip_l" in tensors and "0.dual" not in tensors and "1.dual" in tensors
    for one, other in zip(load_perfusion_concepts(path), (expected, newer), strict=True):
        assert_same_concept(one, other)


def test_optional_settings_are_stored_if_they_are_known(tmp_path: Path) -> None:
    known = make_concept("<a>", date="2026-01-31", resolution="512x512", prediction_type="v", base_name="dreamer")
    known.target_energy = float(known.dual.double() @ known.target_input.double())
    path = save_perfusion_concepts(tmp_path / "both.safetensors", [known, make_concept("<b>", 9, dual=None)], None)
    loaded = load_perfusion_concepts(path)
    assert_same_concept(loaded[0], known)
    assert loaded[1].target_energy is None and not loaded[1].date
    header = load_tensors(path)[1]["perfusion"]
    for name in ("target_energy", "date", "resolution", "prediction_type", "base_name"):
        assert [name in values for values in header["concepts"]] == [True, False]


def test_a_word_of_two_text_encoders_is_stored_in_two_parts(tmp_path: Path) -> None:
    parts = {"clip_l": 3, "clip_g": 5}
    concepts = [make_concept(f"<{n}>", seed=n, embedding=randn(1, 8, seed=n), word_parts=parts, pooled="concept")
                for n in range(2)]
    one, both = (save_perfusion_concepts(tmp_path / f"{count}.safetensors", concepts[:count], torch.float32)
                 for count in (1, 2))
    alone = load_tensors(one)[0]
    assert torch.equal(torch.cat([alone["clip_l"], alone["clip_g"]], 1), concepts[0].embedding)
    assert {"0.clip_l", "0.clip_g", "1.clip_l", "1.clip_g"} < set(load_tensors(both)[0])
    for path in (one, both):
        for loaded, concept in zip(load_perfusion_concepts(path), concepts, strict=False):
            assert_same_concept(loaded, concept)
            assert list(loaded.word_parts.items()) == [("clip_l", 3), ("clip_g", 5)], "in the order of the vector"


def test_concepts_of_different_layers_fit_into_one_file(tmp_path: Path) -> None:
    concepts = [make_concept("<a>"), make_concept("<b>")]
    for concept, layer in zip(concepts, INNER_WIDTHS, strict=True):
        concept.target_outputs_v = {layer: concept.target_outputs_v[layer]}
    path = save_perfusion_concepts(tmp_path / "both.safetensors", concepts, None)
    for loaded, concept in zip(load_perfusion_concepts(path), concepts, strict=True):
        assert_same_concept(loaded, concept)


def save_public_size(path: Path, width: int, parts: dict[str, int], layers: dict[str, int]) -> int:
    """Save a concept of these sizes and return the size of its file."""
    outputs = {name: torch.randn(p) for name, p in layers.items()}
    concept = Concept("<x>", "cat", torch.randn(1, sum(parts.values())), randn(width), randn(width), outputs,
                      dual=randn(width), word_parts=parts, base="f" * 64, base_name="a-base-model",
                      base_samples="A" * (44 * len(layers)), date="2026-01-31", resolution="1024x1024")
    return save_perfusion_concepts(path, [concept]).stat().st_size


def test_a_stable_diffusion_concept_takes_37_kilobytes(tmp_path: Path) -> None:
    inner = [320] * 5 + [640] * 5 + [1280] * 6
    layers = {f"output_blocks.{n}.1.transformer_blocks.0.attn2": p for n, p in enumerate(inner)}
    assert sum(layers.values()) == 12_480
    size = save_public_size(tmp_path / "c.safetensors", 768, {"clip_l": 768}, layers)
    assert 12_480 * 2 < size < 38_000


def test_an_sdxl_concept_takes_200_kilobytes_and_two_blocks_of_it_a_third(tmp_path: Path) -> None:
    blocks = {"input_blocks.4.1": (640, 2), "input_blocks.5.1": (640, 2), "input_blocks.7.1": (1280, 10),
              "input_blocks.8.1": (1280, 10), "middle_block.1": (1280, 10), "output_blocks.0.1": (1280, 10),
              "output_blocks.1.1": (1280, 10), "output_blocks.2.1": (1280, 10), "output_blocks.3.1": (640, 2),
              "output_blocks.4.1": (640, 2), "output_blocks.5.1": (640, 2)}
    layers = {f"{block}.transformer_blocks.{n}.attn2": p for block, (p, depth) in blocks.items() for n in range(depth)}
    assert sum(layers.values()) == 83_200 and len(layers) == 70
    parts = {"clip_l": 768, "clip_g": 1280}
    assert 180_000 < save_public_size(tmp_path / "all.safetensors", 2048, parts, layers) < 210_000
    some = {name: p for name, p in layers.items() if name.startswith(("output_blocks.0.1.", "output_blocks.1.1."))}
    assert save_public_size(tmp_path / "some.safetensors", 2048, parts, some) < 78_000


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
    "newer": (lambda t, h: h.update(format_version=5), "concept format 5.*update"),
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
    "no embedding": (lambda t, h: t.pop("clip_l"), "clip_l is missing"),
    "unknown pooled": (lambda t, h: settings_of(h).update(pooled="both"), "'both' is not one of super_category, conc"),
    "no word parts": (lambda t, h: settings_of(h).update(word_parts=[]), "word_parts are no names"),
    "word parts of the wrong type": (lambda t, h: settings_of(h).update(word_parts=[3]), "word_parts are no names"),
    "a vector as word part": (lambda t, h: settings_of(h).update(word_parts=["dual"]), "word_parts are no names"),
    "twice the same part": (lambda t, h: settings_of(h).update(word_parts=["clip_l"] * 2), "word_parts are no names"),
    "missing part": (lambda t, h: settings_of(h).update(word_parts=["clip_l", "clip_g"]), "clip_g is missing"),
    "date of the wrong type": (lambda t, h: settings_of(h).update(date=2026), "its date is no text"),
    "huge text": (lambda t, h: settings_of(h).update(base_name="x" * 10**6), "base_name has 1,000,000 char"),
    "huge placeholder": (lambda t, h: settings_of(h).update(placeholder="x" * 10**6), "^.{,400}$"),
    "dual not finite": (lambda t, h: t["0.dual"].fill_(torch.nan), "dual is that of another|dual holds numbers"),
    "dual of another width": (lambda t, h: t.update({"0.dual": randn(5)}), r"size .*\(6,\), not .5"),
    "dual of another input": (lambda t, h: (t.update({"0.dual": randn(WIDTH, seed=77)}),
                                            settings_of(h).update(target_energy=30.0)), "dual is that of another"),
    "dual with negative energy": (lambda t, h: t["0.dual"].neg_(), "dual is that of another.* should be above 0"),
    "no values": (lambda t, h: [t.pop(f"0.target_output_v.{n}") for n in INNER_WIDTHS], "target_output_v is missing"),
    "several vectors": (lambda t, h: t.update({"clip_l": randn(2, 4)}), r"one vector.*\(2, 4\)"),
    "sizes disagree": (lambda t, h: t.update({"0.super_input": randn(5)}), r"of one size, not \(6,\) and \(5,\)"),
    "zero input": (lambda t, h: t.update({"0.target_input": torch.zeros(WIDTH)}), "target_input is zero"),
    "value not a vector": (lambda t, h: t.update({V: randn(3, 3)}), "middle_block.1.attn2 do not fit"),
    "keys of one layer": (lambda t, h: t.update({V.replace("_v", "_k"): randn(8)}), "trained keys but no values"),
    "eight bits": (lambda t, h: t.update({V: torch.ones(8).to(torch.float8_e4m3fn)}), "float8_e4m3fn instead"),
    "eight bits of input": (lambda t, h: t.update({"0.target_input": torch.ones(WIDTH).to(torch.float8_e5m2)}), "e5m2"),
    "integers": (lambda t, h: t.update({V: torch.ones(8, dtype=torch.int32)}), "int32"),
    "not finite": (lambda t, h: t[V].fill_(torch.inf), "middle_block.1.attn2 holds numbers that are not finite"),
    "tensor of no concept": (lambda t, h: t.update({"1.clip_l": randn(1, 4)}), "1.clip_l, which belongs to no"),
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
    other_layers = replace(make_concept("<b>"), target_outputs_v={MIDDLE: randn(5)})
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
