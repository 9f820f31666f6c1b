"""The ComfyUI nodes: words in prompts, bad input, and the folder that ComfyUI loads."""
from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.comfyui import StandInModel
from helpers.comfyui_nodes import LoadedNodes, settled
from helpers.diffusers_pipelines import Family
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.common.words import split_at_placeholders
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.integrations.comfyui import concept_file, edit, folders, nodes, text, unet, words
from ldm.integrations.comfyui.errors import PerfusionError

ROOT = Path(nodes.__file__).parent

# Words


@pytest.mark.parametrize("prompt", ["a <teddy>, a <Teddybear> and sks", "<teddy>s' sksy b\u00e4r ba\u0308r", "skssks",
                                    ""])
def test_words_are_found_as_in_the_project(prompt: str) -> None:
    placeholders = ["<teddy>", "<teddybear>", "sks", "b\u00e4r"]
    found = words.replace_words(prompt, placeholders, lambda index: f"\0{index}\0")
    ours = [part for part in split_at_placeholders(prompt, placeholders) if isinstance(part, int)]
    assert [int(index) for index in re.findall("\0(\\d)\0", found)] == ours


def test_stand_ins_for_words_do_not_occur_in_the_prompt(comfy: LoadedNodes) -> None:
    tokenizer = comfy.base[1].tokenizer.clip_l.tokenizer
    first = words.markers(tokenizer, "", 3)
    second = words.markers(tokenizer, " ".join(first), 3)
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    assert all(tokenizer(word)["input_ids"][1:-1] == [token] for word, token in first.items())


# Bad input


def test_a_word_can_be_replaced_and_must_be_unique(comfy: LoadedNodes, files: Path) -> None:
    load = nodes.LoadPerfusionConcept().load
    with pytest.raises(PerfusionError, match="same word; give one of them another"):
        load(*comfy.one, "teddy.safetensors")
    model, clip, word = load(*comfy.one, "teddy.safetensors", word="<other>")
    assert word == "<other>" and clip.encode("an <other>")[0][0].shape[-1] == 3 * 16 + 2 * 2
    with pytest.raises(PerfusionError, match="give one word"):
        load(*comfy.base, "teddy.safetensors", word="my bear")


def test_bad_settings(comfy: LoadedNodes) -> None:
    with pytest.raises(PerfusionError, match="temperature of 0 makes no gate"):
        settled(*comfy.one, "a <teddy>", temperature=0.0)
    with pytest.raises(PerfusionError, match="has no concepts; connect"):
        settled(*comfy.base, "a <teddy>")
    with pytest.raises(PerfusionError, match="no concept has the word <bear>; there are <teddy>, <pot>"):
        nodes.PerfusionBias().set_gate(comfy.two[1], "<bear>", 0.5, -1.0)


def test_prompts_of_another_chain_are_refused(comfy: LoadedNodes, files: Path) -> None:
    with pytest.raises(PerfusionError, match="the model with its 2 concepts reads 52, or 16"):
        settled(comfy.two[0], comfy.one[1], "a <teddy>")
    other = nodes.LoadPerfusionConcept().load(*comfy.base, "pot.safetensors")
    with pytest.raises(PerfusionError, match="encoded with other concepts than the model has"):
        settled(comfy.one[0], other[1], "a <pot>")
    packed = comfy.one[1].encode("a <teddy>")[0][0]
    layout = edit.Layout(16, 1)
    with pytest.raises(PerfusionError, match="has 49 numbers per token"):
        unet.EditedProjection(nn.Identity(), layout, layout.keys, torch.zeros(1), torch.zeros(1))(packed[..., :-1])


@pytest.mark.slow
def test_concepts_of_another_base_are_refused(comfy: LoadedNodes, xl: Family, files: Path) -> None:
    parts = xl.own.pipeline.model.cond_stage_model.word_parts
    save_perfusion_concepts(files / "xl.safetensors", [replace(xl.concepts[0], word_parts=dict(parts))])
    load = nodes.LoadPerfusionConcept().load
    with pytest.raises(PerfusionError, match=r"text width 40\), but this MODEL is of .*text width 16"):
        load(*comfy.base, "xl.safetensors")
    concept, = concept_file.load_concepts(files / "xl.safetensors")
    with pytest.raises(PerfusionError, match="word for clip_l, clip_g, but this CLIP has clip_l"):
        text.clip_with_concepts(comfy.base[1], [concept])
    wide = replace(concept, vectors={"clip_l": torch.zeros(17)})
    with pytest.raises(PerfusionError, match="word of 17 numbers, but clip_l of this CLIP reads 16"):
        text.clip_with_concepts(comfy.base[1], [wide])
    teddy, = concept_file.load_concepts(files / "teddy.safetensors")
    with pytest.raises(PerfusionError, match="differ in layer input_blocks.9"):
        unet.model_with_concepts(comfy.base[0], [replace(teddy, outputs_v={"input_blocks.9": torch.zeros(3)})])
    with pytest.raises(PerfusionError, match="no cross-attention"):
        unet.model_with_concepts(StandInModel(nn.Identity()), [teddy])


def change_header(path: Path, **changes: Any) -> Path:
    """Write a copy of a concept file with changed settings; return its path."""
    with concept_file.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["perfusion"])
    tensors = load_file(path)
    for name in changes.pop("without", ()):
        del tensors[name]
    tensors |= changes.pop("tensors", {})
    for name in [name for name in changes if name in header]:
        header[name] = changes.pop(name)
    if isinstance(header["concepts"], list) and header["concepts"]:
        header["concepts"][0] |= changes
    save_file(tensors, path.with_name("changed.safetensors"), {"perfusion": json.dumps(header)})
    return path.with_name("changed.safetensors")


@pytest.mark.parametrize(("changes", "message"), [
    ({"format_version": 3}, "format 3: it lacks the dual vector"),
    ({"format_version": 9}, "format 9, these nodes read up to 4"),
    ({"without": ["0.dual"]}, "concept <teddy>: it lacks the dual vector"),
    ({"concepts": []}, "not a concept of Perfusion"),
    ({"placeholder": "my bear"}, "settings in it are damaged"),
    ({"bias": "high"}, "is incomplete"),
    ({"temperature": 0.0}, "are no gate"),
    ({"used_layers": ["nowhere"]}, "is incomplete"),
    ({"without": ["clip_l"]}, "no word for clip_l or clip_g or clip_h"),
    ({"tensors": {"0.dual": torch.zeros(3)}}, "do not fit together"),
    ({"tensors": {"0.dual": torch.zeros(16)}}, "does not belong to its direction"),
    ({"tensors": {"0.super_input": torch.full((16,), torch.nan)}}, "not finite"),
    ({"tensors": {"clip_l": torch.zeros(2, 16)}}, "is incomplete"),
])
def test_damaged_files_are_refused(comfy: LoadedNodes, files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PerfusionError, match=message):
        concept_file.load_concepts(change_header(files / "teddy.safetensors", **changes))


def test_other_files_are_refused(comfy: LoadedNodes, files: Path) -> None:
    (files / "text.safetensors").write_text("no tensors")
    save_file({"clip_l": torch.zeros(1, 16)}, files / "embedding.safetensors")
    for name, message in (("text", "cannot be read"), ("embedding", "not a concept"), ("none", "no such concept")):
        with pytest.raises(PerfusionError, match=message):
            concept_file.load_concepts(folders.concept_path(f"{name}.safetensors"))


# The folder


def test_nodes_are_described() -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.DESCRIPTION and node.CATEGORY and hasattr(node, node.FUNCTION)
        assert len(node.RETURN_TYPES) == len(node.OUTPUT_TOOLTIPS)


def test_inputs_list_the_files(comfy: LoadedNodes, files: Path) -> None:
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert all(options["tooltip"] for group in inputs.values() for _, options in group.values())
    assert nodes.LoadPerfusionConcept.INPUT_TYPES()["required"]["concept"][0] == ["pot.safetensors",
                                                                                 "teddy.safetensors"]
    before = nodes.LoadPerfusionConcept.IS_CHANGED(concept="teddy.safetensors", model=None)
    shutil.copy(files / "pot.safetensors", files / "teddy.safetensors")
    assert nodes.LoadPerfusionConcept.IS_CHANGED(concept="teddy.safetensors", model=None) != before


def test_the_folder_of_concepts_is_registered_beside_those_of_the_user(files: Path) -> None:
    module = sys.modules["folder_paths"]
    module.folder_names_and_paths["perfusion"] = (["/elsewhere"], set())
    module.__spec__ = SimpleNamespace()
    folders.register_folder()
    folders.register_folder()
    paths, extensions = module.folder_names_and_paths["perfusion"]
    assert paths == ["/elsewhere", str(files / "perfusion")] and extensions == {".safetensors"}
    assert (files / "perfusion").is_dir()


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[ModuleType]:
    """The folder as ComfyUI imports a copy of it, where nothing of the project can be imported."""
    shutil.copytree(ROOT, tmp_path / "copy")
    spec = importlib.util.spec_from_file_location("copied_nodes", tmp_path / "copy" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["copied_nodes"] = module
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "ldm" or name.startswith("ldm.")}
    sys.modules["ldm"] = None
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["ldm"]
        sys.modules.update(hidden)
        for name in [name for name in sys.modules if name.startswith("copied_nodes")]:
            del sys.modules[name]


def test_a_copy_works_without_the_project(copied: ModuleType) -> None:
    assert set(copied.NODE_CLASS_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)


# The example workflow


@pytest.fixture
def workflow() -> dict[str, Any]:
    """The example for ComfyUI's API."""
    return json.loads((ROOT / "two_concepts_api.json").read_text())


def test_the_example_fits_the_nodes(comfy: LoadedNodes, workflow: dict[str, Any]) -> None:
    own = {name: node for name, node in workflow.items() if node["class_type"] in nodes.NODE_CLASS_MAPPINGS}
    assert {node["class_type"] for node in own.values()} == set(nodes.NODE_CLASS_MAPPINGS)
    for node in own.values():
        inputs = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        assert set(inputs["required"]) <= set(node["inputs"]) <= {*inputs["required"], *inputs.get("optional", ())}
        for name, value in node["inputs"].items():
            if isinstance(value, list):  # a link: the type of the output that it comes from
                source, output = value
                kind, _ = {**inputs["required"], **inputs.get("optional", {})}[name]
                source_class = nodes.NODE_CLASS_MAPPINGS.get(workflow[source]["class_type"])
                assert source_class is None or source_class.RETURN_TYPES[output] == kind


def test_the_example_with_a_layout_is_the_same(workflow: dict[str, Any]) -> None:
    drawn = json.loads((ROOT / "example_workflows" / "two_concepts.json").read_text())
    links = {number: [str(source), output] for number, source, output, *_ in drawn["links"]}
    assert {str(node["id"]): node["type"] for node in drawn["nodes"]} == {
        name: node["class_type"] for name, node in workflow.items()}
    for node in drawn["nodes"]:
        inputs = workflow[str(node["id"])]["inputs"]
        assert {entry["name"]: links[entry["link"]] for entry in node["inputs"]} == {
            name: value for name, value in inputs.items() if isinstance(value, list)}
        values = [value for value in node["widgets_values"] if value != "fixed"]  # what the page does with the seed
        assert values == [value for value in inputs.values() if not isinstance(value, list)]
