"""Concept files of built-in methods and of methods that this version does not know: round trip, errors and merging."""
from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.concept_values import make_concept
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_metadata, load_tensors, save_tensors
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.finetuned_concept_file import METADATA_KEY
from ldm.concepts.merging import merge_concepts
from ldm.concepts.storage import load_concepts, save_concepts

SCRIPT = Path(__file__).resolve().parents[2] / "merge_embeddings.py"
NEW = "norm-inversion"  # a method that no list in this project names


def make_finetuned(method: str = "custom-diffusion", **changes: object) -> FinetunedConcept:
    torch.manual_seed(0)
    weights = {} if method == "textual-inversion" else {"a.to_k.weight": torch.randn(4, 5).half().float()}
    inputs = torch.randn(3, 5).half().float() if method == "custom-diffusion" else torch.zeros(0, 0)
    concept = FinetunedConcept(method, "<toy>", "cat", torch.randn(3, 6).half().float(), weights, inputs,
                               parameter_count=26, steps=7, base="f" * 64)
    return replace(concept, **changes)


def assert_same_tensors(one: FinetunedConcept, other: FinetunedConcept) -> None:
    mine, theirs = dict(one.tensors()), dict(other.tensors())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def save_with_header(folder: Path, **change: object) -> Path:
    """Save a concept file with other values in its header."""
    tensors, metadata = load_tensors(save_concepts(folder / "toy.safetensors", [make_finetuned()]))
    return save_tensors(folder / "odd.safetensors", tensors, {METADATA_KEY: {**metadata[METADATA_KEY], **change}})


# Round trip


@pytest.mark.parametrize("method", ["textual-inversion", "custom-diffusion", "dreambooth", NEW])
def test_a_file_restores_the_whole_concept(tmp_path: Path, method: str) -> None:
    concept = make_finetuned(method)
    path = save_concepts(tmp_path / "toy.safetensors", [concept])
    (loaded,) = load_concepts(path)
    for name in ("method", "placeholder", "super_category", "parameter_count", "steps", "base"):
        assert getattr(loaded, name) == getattr(concept, name)
    assert_same_tensors(concept, loaded)
    again = save_concepts(tmp_path / "again.safetensors", [loaded], precision=None)
    assert again.read_bytes() == path.read_bytes() and loaded.source == str(path)


@pytest.mark.parametrize("method_name", ["", "Inversion under a norm"])
def test_a_new_method_has_its_stored_name_or_its_identifier_in_title_case(tmp_path: Path, method_name: str) -> None:
    path = save_concepts(tmp_path / "toy.safetensors", [make_finetuned(NEW, method_name=method_name)])
    (loaded,) = load_concepts(path)
    assert loaded.method_label == (method_name or "Norm Inversion")
    assert loaded.summary == f"by {loaded.method_label}"
    again = save_concepts(tmp_path / "again.safetensors", [loaded], precision=None)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("method", "method_name"), [
    ("textual-inversion", "Textual Inversion"), ("custom-diffusion", "Custom Diffusion"), ("dreambooth", "DreamBooth")])
def test_files_of_built_in_methods_store_no_name(tmp_path: Path, method: str, method_name: str) -> None:
    """Such files stay as they were before files had names, byte for byte."""
    unnamed = save_concepts(tmp_path / "unnamed.safetensors", [make_finetuned(method)])
    named = save_concepts(tmp_path / "named.safetensors", [make_finetuned(method, method_name=method_name)])
    assert named.read_bytes() == unnamed.read_bytes()
    assert set(load_metadata(named)[METADATA_KEY]) == {"format_version", "method", "concepts"}
    assert load_concepts(named)[0].method_label == method_name


# Errors


@pytest.mark.parametrize(("change", "message"), [
    ({"format_version": 2}, "format or method"), ({"method": "Magic!"}, "format or method"),
    ({"method": ""}, "format or method"), ({"method": "perfusion"}, "format or method"),
    ({"method": ["dreambooth"]}, "format or method"), ({"method": None}, "format or method"),
    ({"method_name": 3}, "damaged"), ({"method_name": "two\nlines"}, "damaged"),
    ({"concepts": []}, "damaged"), ({"concepts": [{"placeholder": "<toy>"}]}, "damaged")])
def test_invalid_headers_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = save_with_header(tmp_path, **change)
    with pytest.raises(UserError, match=message) as error:
        load_concepts(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"method": "My Method"}, {"method": "perfusion"}, {"method_name": "two\nlines"}])
def test_a_concept_of_a_method_that_files_could_not_name_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="method"):
        make_finetuned(**change)


def test_tensors_must_be_complete_and_finite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training diverged"):
        save_concepts(tmp_path / "toy.safetensors", [make_finetuned(vectors=torch.full((1, 6), torch.nan))])
    tensors, metadata = load_tensors(save_concepts(tmp_path / "toy.safetensors", [make_finetuned()]))
    for name, tensor in (("0.vectors", torch.zeros(0, 6)), ("0.inputs", torch.zeros(2, 5))):
        path = save_tensors(tmp_path / "odd.safetensors", {**tensors, name: tensor}, metadata)
        with pytest.raises(UserError, match="word vectors of <toy>"):
            load_concepts(path)
    merge_concepts([make_finetuned(), make_finetuned(base="0" * 64)])  # of two fine-tunes of one model


# Merging


def test_the_merging_script_accepts_files_of_one_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("merge_embeddings", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = [str(save_concepts(tmp_path / f"{n}.safetensors", [make_finetuned(steps=n)])) for n in range(2)]
    script.main(["--manager_ckpts", *files, "--output_path", str(tmp_path / "both.safetensors")])
    assert "<toy-2>: cat" in capsys.readouterr().out
    both = load_concepts(tmp_path / "both.safetensors")
    assert [(concept.placeholder, concept.steps) for concept in both] == [("<toy>", 0), ("<toy-2>", 1)]
    assert all(torch.equal(concept.inputs, make_finetuned().inputs) for concept in both)


def mergeable(**changes: object) -> FinetunedConcept:
    """A concept of a new method whose weights (p, d) read encodings, and which stores its inputs (k, d)."""
    return make_finetuned(NEW, inputs=torch.ones(3, 5), **changes)


@pytest.mark.parametrize("concept", [make_finetuned(NEW, weights={}), mergeable()], ids=["vectors only", "with inputs"])
def test_concepts_of_a_new_method_are_merged_if_their_contents_allow_it(concept: FinetunedConcept) -> None:
    merged = merge_concepts([concept, concept])
    assert [one.placeholder for one in merged] == ["<toy>", "<toy-2>"]
    assert {one.method for one in merged} == {NEW}


CONVOLUTION: dict[str, Tensor] = {"a.to_k.weight": torch.zeros(4, 5), "b.weight": torch.zeros(4, 4, 3, 3)}
OTHER_WEIGHT: dict[str, Tensor] = {"a.to_v.weight": torch.zeros(4, 5)}


@pytest.mark.parametrize(("first", "second", "message"), [
    (make_finetuned(NEW), make_finetuned(NEW), "Norm Inversion changes weights of the U-Net that cannot be merged"),
    (mergeable(), make_finetuned(NEW), "Norm Inversion changes weights of the U-Net that cannot be merged"),
    (mergeable(weights=CONVOLUTION), mergeable(weights=CONVOLUTION), "cannot be merged"),
    (mergeable(), mergeable(weights=OTHER_WEIGHT), "only one of them changes a.to_k.weight"),
    (make_finetuned(NEW), make_finetuned("dreambooth"), "by Norm Inversion, .* by DreamBooth; only concepts of one"),
    (make_finetuned(NEW), make_concept("<bear>"), "by Norm Inversion, .* by Perfusion; only concepts of one method"),
], ids=["no inputs", "inputs of one only", "a convolution", "different weights", "two methods", "Perfusion"])
def test_concepts_that_cannot_be_used_together_are_refused(
        first: FinetunedConcept, second: FinetunedConcept, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        merge_concepts([first, second])
    assert "\n" not in str(error.value)
