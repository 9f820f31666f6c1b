"""The ComfyUI nodes on stand-ins for its MODEL and CLIP; our own encoder and U-Net are the oracle."""
from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.comfyui import Conditioning, StandInClip, StandInModel, conds_of, predict
from helpers.diffusers_pipelines import Family, requests_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.common.words import split_at_placeholders
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.integrations.comfyui import concept_file, edit, folders, nodes, sampling, text, unet, words
from ldm.integrations.comfyui.errors import PerfusionError

ROOT = Path(nodes.__file__).parent
TWO = "a <teddy> beside a <pot>"
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


class Setup:
    """A family's model as ComfyUI has it, before and after its two concepts are loaded by the node."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.own, model = family.own, family.own.pipeline.model
        for name, concept in zip(("teddy", "pot"), family.concepts, strict=True):
            concept = replace(concept, word_parts=dict(model.cond_stage_model.word_parts))
            save_perfusion_concepts(folder / f"{name}.safetensors", [concept], precision=None)
        self.base = StandInModel(model.model.diffusion_model), StandInClip(model.cond_stage_model)
        load = nodes.LoadPerfusionConcept().load
        self.one = load(*self.base, "teddy.safetensors")[:2]
        self.two = load(*self.one, "pot.safetensors")[:2]

    def oracle(self, prompt: str, negative: str = "", global_locking: bool = False) -> list[Tensor]:
        """Return what our U-Net predicts for prompt and negative prompt."""
        model = self.own.pipeline.model
        with torch.no_grad():
            return [model.apply_model(LATENTS, torch.tensor([500]), context)
                    for context in self.own.contexts(requests_of((prompt, negative)), global_locking)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ComfyUI's `folder_paths`; returns its folder of concepts."""
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths(tmp_path))
    return tmp_path


def folder_paths(folder: Path) -> ModuleType:
    module = ModuleType("folder_paths")
    module.models_dir = str(folder)
    module.folder_names_and_paths = {}
    module.get_filename_list = lambda name: sorted(path.name for path in folder.glob("*.safetensors"))
    module.get_full_path = lambda name, file: str(folder / file) if (folder / file).is_file() else None
    return module


@pytest.fixture
def setup(sd1: Family, files: Path) -> Setup:
    return Setup(sd1, files)


def settled(model: StandInModel, clip: StandInClip, prompt: str, negative: str = "", **settings: Any) -> list[Tensor]:
    """Return the U-Net's predictions for texts that Perfusion Text Encode encoded."""
    given = {"bias": -1.0, "temperature": -1.0, "lock": "local", **settings}
    encode = nodes.PerfusionTextEncode().encode
    return predict(model, [encode(clip, prompt, **given)[0], encode(clip, negative, **given)[0]], LATENTS)


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# Images


@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("prompt", ["a photo of a <teddy>", TWO, "a <POT>, please"])
def test_predictions_are_ours(setup: Setup, prompt: str, lock: str) -> None:
    assert_close(settled(*setup.two, prompt, "blurry", lock=lock), setup.oracle(prompt, "blurry", lock == "global"))


def test_the_concept_changes_the_prediction(setup: Setup) -> None:
    with_concept, without = setup.oracle("a <teddy>"), predict(
        setup.base[0], [setup.base[1].encode("a teddy bear")], LATENTS)
    assert (with_concept[0] - without[0]).abs().max() > 0.05


def test_a_plain_negative_prompt_is_edited_as_well(setup: Setup) -> None:
    model, clip = setup.two
    found = predict(model, [clip.encode(TWO), setup.base[1].encode("blurry")], LATENTS)
    assert_close(found, setup.oracle(TWO, "blurry"))


def test_without_a_concepts_word_everything_is_as_without_concepts(setup: Setup) -> None:
    expected = predict(setup.base[0], [setup.base[1].encode("a red dog")], LATENTS)[0]
    for clip in (setup.two[1], setup.base[1]):
        assert torch.equal(predict(setup.two[0], [clip.encode("a red dog")], LATENTS)[0], expected)


def test_sdxl(xl: Family, files: Path) -> None:
    setup = Setup(xl, files)
    model, clip = setup.two
    for prompt, lock in ((TWO, False), ("a <teddy>", True)):
        found = nodes.PerfusionTextEncode().encode(clip, prompt, -1.0, -1.0, "global" if lock else "local")[0]
        contexts = xl.own.contexts(requests_of((prompt, "blurry")), lock)
        # <teddy> locks the pooled encoding to its super-category, <pot> does not.
        torch.testing.assert_close(found[0][1]["pooled_output"], contexts[0].pooled, rtol=1e-4, atol=1e-5)
        predicted = predict(model, [found, clip.encode("blurry")], LATENTS, contexts[0].vector)
        assert_close(predicted[:1], setup.oracle(prompt, "blurry", lock)[:1])


def test_concepts_of_some_layers_gated_projections_and_trained_keys(sd1: Family, files: Path) -> None:
    teddy, pot = sd1.concepts
    first, *others = teddy.target_outputs_v
    pot = replace(pot, projection="gated", target_outputs_k={name: -values for name, values in
                                                             pot.target_outputs_v.items()})
    teddy = replace(teddy, projection="gated", target_outputs_v={name: teddy.target_outputs_v[name] for name in others},
                    used_layers=others[:-1])
    own = type(sd1.own)(sd1.own.pipeline.model, [teddy, pot])
    setup = Setup(Family(own, sd1.pipe, [teddy, pot]), files)
    assert_close(settled(*setup.two, TWO), setup.oracle(TWO))


def test_bias_of_one_concept_and_of_a_prompt(setup: Setup, sd1: Family) -> None:
    model, clip = setup.two
    biased, = nodes.PerfusionBias().set_gate(clip, "<Pot>", 0.2, 0.3)
    teddy, pot = sd1.concepts
    own = type(sd1.own)(sd1.own.pipeline.model, [teddy, replace(pot, bias=0.2, temperature=0.3)])
    contexts = own.contexts(requests_of((TWO, "")))
    with torch.no_grad():
        expected = [own.pipeline.model.apply_model(LATENTS, torch.tensor([500]), context) for context in contexts]
    # The negative prompt has the settings of the prompt, also from a CLIP without them.
    assert_close(predict(model, [biased.encode(TWO), clip.encode("")], LATENTS), expected)
    assert_close(settled(model, clip, "a <pot>", bias=0.2, temperature=0.3)[:1],
                 settled(model, biased, "a <pot>")[:1])


def test_prompt_weights_act_on_keys_and_values_as_on_any_token(setup: Setup) -> None:
    model, clip = setup.one
    layout = edit.Layout(clip.encode("a cat")[0][0].shape[-1] // 3, 1)
    plain, weighted, empty = (clip.encode(prompt)[0][0] for prompt in ("a <teddy>", "a (<teddy>:1.4)", ""))
    word = 2  # start, a, <teddy>
    torch.testing.assert_close(weighted[0, word], empty[0, word] + 1.4 * (plain - empty)[0, word])
    assert torch.equal(weighted[0, :word], plain[0, :word]) and layout.acting(weighted) == [0]
    # Without a concept, the weights are the original's own.
    original = setup.base[1].encode("a (red:1.3) dog")[0][0]
    assert torch.equal(layout.encoding(clip.encode("a (red:1.3) dog")[0][0]), original)


def test_prompts_of_several_sections(setup: Setup) -> None:
    model, clip = setup.one
    long = "a <teddy> on a big red box beside the table and the dog and a cup and a <teddy>"
    packed = clip.encode(long)[0][0]
    length = setup.own.pipeline.model.cond_stage_model.max_length
    # Each section is encoded on its own, so the edit of the second is that of a prompt of its words.
    second = long.split(maxsplit=length - 2)[-1]
    torch.testing.assert_close(packed[:, length:], clip.encode(second)[0][0])
    assert packed.shape[1] == 2 * length and predict(model, [[[packed, {}]]], LATENTS)[0].isfinite().all()


# Other nodes


def test_combined_concatenated_averaged_and_zeroed_conditionings(setup: Setup) -> None:
    model, clip = setup.two
    teddy, pot, plain = (clip.encode(prompt)[0] for prompt in ("a <teddy>", "a <pot>", "blurry"))
    # Prompts of an image share their concepts, as if each had its own place in one prompt.
    both = predict(model, [[teddy, pot], [plain]], LATENTS)
    expected = [setup.oracle("a <teddy>", "a <pot>")[0], setup.oracle("a <pot>", "a <teddy>")[0],
                setup.oracle(TWO, "blurry")[1]]
    assert_close(both, expected)
    joined = [[torch.cat([teddy[0], plain[0]], 1), teddy[1]]]
    halves = [sampled(setup, [[[teddy[0], {}]], [[plain[0], {}]]])[index] for index in range(2)]
    found = sampled(setup, [joined])[0]
    assert torch.allclose(found[:, :teddy[0].shape[1], :16], halves[0][..., :16])
    zeroed = sampled(setup, [[teddy], [[torch.zeros_like(plain[0]), plain[1]]]])[1]
    assert not edit.Layout(16, 2).encoding(zeroed).any()


def sampled(setup: Setup, conditionings: Sequence[Conditioning]) -> list[Tensor]:
    """Return the encodings that a sampling run reads."""
    conds = conds_of(conditionings)
    flat = [cond for of_kind in conds.values() for cond in of_kind]
    sampling.share_concepts(flat, setup.two[0].get_wrappers("outer_sample", "perfusion")[0].concepts)
    return [cond["cross_attn"] for cond in flat]


def test_a_controlnet_reads_the_plain_encoding(setup: Setup) -> None:
    model, clip = setup.one
    plain = setup.base[1].encode("a dog")
    entry = {**clip.encode("a <teddy>")[0][1], "cross_attn_controlnet": clip.encode("a red dog")[0][0]}
    conds = [cond for of_kind in conds_of([clip.encode("a <teddy>"), [[clip.encode("a <teddy>")[0][0], entry]],
                                           plain]).values() for cond in of_kind]
    sampling.share_concepts(conds, model.get_wrappers("outer_sample", "perfusion")[0].concepts)
    context, _ = setup.own.contexts(requests_of(("a <teddy>", "")))
    torch.testing.assert_close(conds[0]["cross_attn_controlnet"], context.encoding)
    torch.testing.assert_close(conds[1]["cross_attn_controlnet"], setup.base[1].encode("a red dog")[0][0])
    assert torch.equal(conds[2].get("cross_attn_controlnet", plain[0][0]), plain[0][0])  # the edit is for the U-Net


def test_a_lora_acts_on_what_it_changes(setup: Setup) -> None:
    model, clip = setup.one
    layer = setup.base[0].model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    packed = clip.encode("a <teddy>")[0][0]
    layout = edit.Layout(16, 1)
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.forward"
    projected, gates = layout.keys(packed)
    super_input = model.get_wrappers("outer_sample", "perfusion")[0].concepts[0].super_input
    before = layer.to_k.weight.clone()
    try:
        layer.to_k.weight.data += 0.1
        expected = (projected + gates * super_input) @ layer.to_k.weight.mT
        torch.testing.assert_close(model.object_patches[name](packed), expected, rtol=1e-4, atol=1e-4)
    finally:
        layer.to_k.weight.data.copy_(before)


def test_sixteen_bit_weights_and_copies_of_other_types(setup: Setup) -> None:
    model, clip = setup.one
    packed = clip.encode("a <teddy>")[0][0]
    linear = nn.Linear(16, 8, bias=False)
    inputs, outputs = torch.randn(1, 16), torch.randn(1, 8)
    layout = edit.Layout(16, 1)
    projection = unet.EditedProjection(linear.forward, layout, layout.values, inputs, outputs)
    exact = projection(packed)
    linear.bfloat16()
    assert projection(packed.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(projection(packed.bfloat16()).float(), exact, rtol=0.05, atol=0.05)
    linear.float()
    torch.testing.assert_close(projection(packed), exact, rtol=0.05, atol=0.05)


def test_the_original_model_and_clip_are_unchanged(setup: Setup) -> None:
    model, clip = setup.base
    assert not model.object_patches and not model.wrappers
    assert not isinstance(clip.cond_stage_model, text.ConceptEncoder)
    assert len(setup.one[0].get_wrappers("outer_sample", "perfusion")[0].concepts) == 1
    assert len(setup.one[1].cond_stage_model.concepts) == 1
    before = predict(model, [clip.encode("a dog")], LATENTS)[0]
    settled(*setup.two, TWO)
    assert torch.equal(predict(model, [clip.encode("a dog")], LATENTS)[0], before)


def test_other_tokens_and_attributes_pass_through(setup: Setup) -> None:
    clip = setup.two[1]
    assert clip.cond_stage_model.encoder is setup.base[1].cond_stage_model.encoder
    assert clip.tokenizer.clip_l is setup.base[1].tokenizer.clip_l
    with pytest.raises(AttributeError):
        clip.cond_stage_model.no_such_attribute  # noqa: B018
    assert clip.tokenize("a red dog") == setup.base[1].tokenize("a red dog")
    concept = concept_file.load_concepts(folders.concept_path("teddy.safetensors"))[0]
    found, = [token for token, _ in setup.one[1].tokenize("a <teddy>")["l"][0] if isinstance(token, Tensor)]
    assert torch.equal(found, concept.vectors["clip_l"])


# Words


@pytest.mark.parametrize("prompt", ["a <teddy>, a <Teddybear> and sks", "<teddy>s' sksy b\u00e4r ba\u0308r", "skssks",
                                    ""])
def test_words_are_found_as_in_the_project(prompt: str) -> None:
    placeholders = ["<teddy>", "<teddybear>", "sks", "b\u00e4r"]
    found = words.replace_words(prompt, placeholders, lambda index: f"\0{index}\0")
    ours = [part for part in split_at_placeholders(prompt, placeholders) if isinstance(part, int)]
    assert [int(index) for index in re.findall("\0(\\d)\0", found)] == ours


def test_stand_ins_for_words_do_not_occur_in_the_prompt(setup: Setup) -> None:
    tokenizer = setup.base[1].tokenizer.clip_l.tokenizer
    first = words.markers(tokenizer, "", 3)
    second = words.markers(tokenizer, " ".join(first), 3)
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    assert all(tokenizer(word)["input_ids"][1:-1] == [token] for word, token in first.items())


# Bad input


def test_a_word_can_be_replaced_and_must_be_unique(setup: Setup, files: Path) -> None:
    load = nodes.LoadPerfusionConcept().load
    with pytest.raises(PerfusionError, match="same word; give one of them another"):
        load(*setup.one, "teddy.safetensors")
    model, clip, word = load(*setup.one, "teddy.safetensors", word="<other>")
    assert word == "<other>" and clip.encode("an <other>")[0][0].shape[-1] == 3 * 16 + 2 * 2
    with pytest.raises(PerfusionError, match="give one word"):
        load(*setup.base, "teddy.safetensors", word="my bear")


def test_bad_settings(setup: Setup) -> None:
    with pytest.raises(PerfusionError, match="temperature of 0 makes no gate"):
        settled(*setup.one, "a <teddy>", temperature=0.0)
    with pytest.raises(PerfusionError, match="has no concepts; connect"):
        settled(*setup.base, "a <teddy>")
    with pytest.raises(PerfusionError, match="no concept has the word <bear>; there are <teddy>, <pot>"):
        nodes.PerfusionBias().set_gate(setup.two[1], "<bear>", 0.5, -1.0)


def test_prompts_of_another_chain_are_refused(setup: Setup, files: Path) -> None:
    with pytest.raises(PerfusionError, match="the model with its 2 concepts reads 52, or 16"):
        settled(setup.two[0], setup.one[1], "a <teddy>")
    other = nodes.LoadPerfusionConcept().load(*setup.base, "pot.safetensors")
    with pytest.raises(PerfusionError, match="encoded with other concepts than the model has"):
        settled(setup.one[0], other[1], "a <pot>")
    packed = setup.one[1].encode("a <teddy>")[0][0]
    layout = edit.Layout(16, 1)
    with pytest.raises(PerfusionError, match="has 49 numbers per token"):
        unet.EditedProjection(nn.Identity(), layout, layout.keys, torch.zeros(1), torch.zeros(1))(packed[..., :-1])


def test_concepts_of_another_base_are_refused(setup: Setup, xl: Family, files: Path) -> None:
    parts = xl.own.pipeline.model.cond_stage_model.word_parts
    save_perfusion_concepts(files / "xl.safetensors", [replace(xl.concepts[0], word_parts=dict(parts))])
    load = nodes.LoadPerfusionConcept().load
    with pytest.raises(PerfusionError, match=r"text width 40\), but this MODEL is of .*text width 16"):
        load(*setup.base, "xl.safetensors")
    concept, = concept_file.load_concepts(files / "xl.safetensors")
    with pytest.raises(PerfusionError, match="word for clip_l, clip_g, but this CLIP has clip_l"):
        text.clip_with_concepts(setup.base[1], [concept])
    wide = replace(concept, vectors={"clip_l": torch.zeros(17)})
    with pytest.raises(PerfusionError, match="word of 17 numbers, but clip_l of this CLIP reads 16"):
        text.clip_with_concepts(setup.base[1], [wide])
    teddy, = concept_file.load_concepts(files / "teddy.safetensors")
    with pytest.raises(PerfusionError, match="differ in layer input_blocks.9"):
        unet.model_with_concepts(setup.base[0], [replace(teddy, outputs_v={"input_blocks.9": torch.zeros(3)})])
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
def test_damaged_files_are_refused(setup: Setup, files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PerfusionError, match=message):
        concept_file.load_concepts(change_header(files / "teddy.safetensors", **changes))


def test_other_files_are_refused(setup: Setup, files: Path) -> None:
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


def test_inputs_list_the_files(setup: Setup, files: Path) -> None:
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
