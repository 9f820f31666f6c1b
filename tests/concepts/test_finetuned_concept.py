"""Files of word vectors and weights: the round trip, what is refused in a line, and merging by the script."""
from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.concepts.finetuned_concept import METADATA_KEY, FinetunedConcept, load_concepts, merge_concepts, save_concepts

SCRIPT = Path(__file__).resolve().parents[2] / "merge_embeddings.py"


def made(method: str = "custom-diffusion", **changes: object) -> FinetunedConcept:
    torch.manual_seed(0)
    weights = {} if method == "textual-inversion" else {"a.to_k.weight": torch.randn(4, 5).half().float()}
    inputs = torch.randn(3, 5).half().float() if method == "custom-diffusion" else torch.zeros(0, 0)
    concept = FinetunedConcept(method, "<toy>", "cat", torch.randn(3, 6).half().float(), weights, inputs,
                           parameter_count=26, steps=7, base="f" * 64)
    return replace(concept, **changes)


@pytest.mark.parametrize("method", ["textual-inversion", "custom-diffusion", "dreambooth"])
def test_a_file_brings_everything_back(tmp_path: Path, method: str) -> None:
    concept = made(method)
    path = save_concepts(tmp_path / "toy.safetensors", [concept])
    (loaded,) = load_concepts(path)
    for name in ("method", "placeholder", "super_category", "parameter_count", "steps", "base"):
        assert getattr(loaded, name) == getattr(concept, name)
    ours, theirs = dict(concept.tensors()), dict(loaded.tensors())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = save_concepts(tmp_path / "again.safetensors", [loaded], precision=None)
    assert again.read_bytes() == path.read_bytes() and loaded.source == str(path)


def test_the_merging_script_takes_files_of_one_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("merge_embeddings", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = [str(save_concepts(tmp_path / f"{n}.safetensors", [made(steps=n)])) for n in range(2)]
    script.main(["--manager_ckpts", *files, "--output_path", str(tmp_path / "both.safetensors")])
    assert "<toy-2>: cat" in capsys.readouterr().out
    both = load_concepts(tmp_path / "both.safetensors")
    assert [(concept.placeholder, concept.steps) for concept in both] == [("<toy>", 0), ("<toy-2>", 1)]
    assert all(torch.equal(concept.inputs, made().inputs) for concept in both)


@pytest.mark.parametrize(("change", "said"), [
    ({"format_version": 2}, "format or method"), ({"method": "magic"}, "format or method"),
    ({"method": ["dreambooth"]}, "format or method"),
    ({"concepts": []}, "damaged"), ({"concepts": [{"placeholder": "<toy>"}]}, "damaged")])
def test_what_a_file_says_must_make_sense(tmp_path: Path, change: dict[str, object], said: str) -> None:
    tensors, metadata = load_tensors(save_concepts(tmp_path / "toy.safetensors", [made()]))
    path = save_tensors(tmp_path / "odd.safetensors", tensors, {METADATA_KEY: {**metadata[METADATA_KEY], **change}})
    with pytest.raises(UserError, match=said) as refused:
        load_concepts(path)
    assert "\n" not in str(refused.value)


def test_tensors_must_be_there_and_finite(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training diverged"):
        save_concepts(tmp_path / "toy.safetensors", [made(vectors=torch.full((1, 6), torch.nan))])
    tensors, metadata = load_tensors(save_concepts(tmp_path / "toy.safetensors", [made()]))
    for name, tensor in (("0.vectors", torch.zeros(0, 6)), ("0.inputs", torch.zeros(2, 5))):
        path = save_tensors(tmp_path / "odd.safetensors", {**tensors, name: tensor}, metadata)
        with pytest.raises(UserError, match="word vectors of <toy>"):
            load_concepts(path)
    with pytest.raises(UserError, match="different base|trained on base model"):
        merge_concepts([made(), made(base="0" * 64)])
