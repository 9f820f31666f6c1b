"""Files describe themselves, and the same concept gives the same bytes."""
from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.concept_values import make_concept, randn
from safetensors import safe_open

from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.concepts.model_spec import current_date


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_file_says_what_it_is_in_plain_words(tmp_path: Path) -> None:
    concept = make_concept("<teddy>", date="2026-01-31", resolution="512x512", prediction_type="epsilon",
                           base_name="dreamer")
    found = metadata_of(save_perfusion_concepts(tmp_path / "c.safetensors", [concept]))
    spec = {name.removeprefix("modelspec."): text for name, text in found.items() if name != "perfusion"}
    assert spec["title"] == "Perfusion concept <teddy>"
    assert (spec["trigger_phrase"], spec["tags"]) == ("<teddy>", "teddy bear")
    assert (spec["date"], spec["resolution"], spec["prediction_type"]) == ("2026-01-31", "512x512", "epsilon")
    assert "<teddy>: teddy bear, learned on dreamer" in spec["description"] and "7 steps" in spec["description"]
    assert spec["sai_model_spec"] == "1.0.1" and "thumbnail" not in spec
    both = metadata_of(save_perfusion_concepts(tmp_path / "b.safetensors", [concept, make_concept("<mug>", seed=9)]))
    assert both["modelspec.trigger_phrase"] == "<teddy>, <mug>" and both["modelspec.date"] == "2026-01-31"


@pytest.mark.parametrize(("width", "prediction", "architecture"), [
    (768, "epsilon", "stable-diffusion-v1"), (1024, "v", "stable-diffusion-v2-768-v"),
    (1024, "epsilon", "stable-diffusion-v2-512"), (2048, "epsilon", "stable-diffusion-xl-v1-base"),
    (6, "v", "latent-diffusion")])
def test_the_architecture_has_the_name_of_public_lists(
    width: int, prediction: str, architecture: str, tmp_path: Path
) -> None:
    concept = make_concept(prediction_type=prediction)
    concept = replace(concept, target_input=randn(width), super_input=randn(width), dual=randn(width))
    found = metadata_of(save_perfusion_concepts(tmp_path / "c.safetensors", [concept]))
    assert found["modelspec.architecture"] == f"{architecture}/perfusion"


def test_equal_concepts_are_equal_bytes_and_the_hash_is_of_the_tensors(tmp_path: Path) -> None:
    concept = make_concept("<Bär\x01>", date="2026-01-31", super_category='a "quoted"\u2028 \\ bear')
    paths = [save_perfusion_concepts(tmp_path / f"{n}.safetensors", [concept]) for n in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1, "the library itself writes metadata in random order"
    assert list(metadata_of(paths[0])) and metadata_of(paths[0])["modelspec.trigger_phrase"] == concept.placeholder

    content = paths[0].read_bytes()
    tensors_alone = content[8 + int.from_bytes(content[:8], "little"):]
    expected = f"0x{hashlib.sha256(tensors_alone).hexdigest()}"
    assert metadata_of(paths[0])["modelspec.hash_sha256"] == expected
    later = save_perfusion_concepts(tmp_path / "later.safetensors", [replace(concept, date="2027-01-01")])
    assert later.read_bytes() != content and metadata_of(later)["modelspec.hash_sha256"] == expected
    other = save_perfusion_concepts(tmp_path / "other.safetensors", [concept], torch.float32)
    assert metadata_of(other)["modelspec.hash_sha256"] != expected


def test_the_date_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert current_date() == "1970-01-02"
    for unset in ("", "soon"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", unset)
        assert current_date() > "2026"
