"""What ComfyUI's U-Net predicts through the nodes; our own encoder and U-Net are the oracle."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.comfyui import Conditioning, conds_of, predict
from helpers.comfyui_nodes import LATENTS, TWO, LoadedNodes, assert_close, settled
from helpers.diffusers_pipelines import Family, requests_of
from torch import Tensor, nn

from ldm.integrations.comfyui import concept_file, edit, folders, nodes, sampling, text, unet


@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("prompt", ["a photo of a <teddy>", TWO, "a <POT>, please"])
def test_predictions_are_ours(comfy: LoadedNodes, prompt: str, lock: str) -> None:
    assert_close(settled(*comfy.two, prompt, "blurry", lock=lock), comfy.oracle(prompt, "blurry", lock == "global"))


def test_the_concept_changes_the_prediction(comfy: LoadedNodes) -> None:
    with_concept, without = comfy.oracle("a <teddy>"), predict(
        comfy.base[0], [comfy.base[1].encode("a teddy bear")], LATENTS)
    assert (with_concept[0] - without[0]).abs().max() > 0.05


def test_a_plain_negative_prompt_is_edited_as_well(comfy: LoadedNodes) -> None:
    model, clip = comfy.two
    found = predict(model, [clip.encode(TWO), comfy.base[1].encode("blurry")], LATENTS)
    assert_close(found, comfy.oracle(TWO, "blurry"))


def test_without_a_concepts_word_everything_is_as_without_concepts(comfy: LoadedNodes) -> None:
    expected = predict(comfy.base[0], [comfy.base[1].encode("a red dog")], LATENTS)[0]
    for clip in (comfy.two[1], comfy.base[1]):
        assert torch.equal(predict(comfy.two[0], [clip.encode("a red dog")], LATENTS)[0], expected)


@pytest.mark.slow
def test_sdxl(xl: Family, files: Path) -> None:
    comfy = LoadedNodes(xl, files)
    model, clip = comfy.two
    for prompt, lock in ((TWO, False), ("a <teddy>", True)):
        found = nodes.PerfusionTextEncode().encode(clip, prompt, -1.0, -1.0, "global" if lock else "local")[0]
        contexts = xl.own.contexts(requests_of((prompt, "blurry")), lock)
        # <teddy> locks the pooled encoding to its super-category, <pot> does not.
        torch.testing.assert_close(found[0][1]["pooled_output"], contexts[0].pooled, rtol=1e-4, atol=1e-5)
        predicted = predict(model, [found, clip.encode("blurry")], LATENTS, contexts[0].vector)
        assert_close(predicted[:1], comfy.oracle(prompt, "blurry", lock)[:1])


def test_concepts_of_some_layers_gated_projections_and_trained_keys(sd1: Family, files: Path) -> None:
    teddy, pot = sd1.concepts
    first, *others = teddy.target_outputs_v
    pot = replace(pot, projection="gated", target_outputs_k={name: -values for name, values in
                                                             pot.target_outputs_v.items()})
    teddy = replace(teddy, projection="gated", target_outputs_v={name: teddy.target_outputs_v[name] for name in others},
                    used_layers=others[:-1])
    own = type(sd1.own)(sd1.own.pipeline.model, [teddy, pot])
    comfy = LoadedNodes(Family(own, sd1.pipe, [teddy, pot]), files)
    assert_close(settled(*comfy.two, TWO), comfy.oracle(TWO))


def test_bias_of_one_concept_and_of_a_prompt(comfy: LoadedNodes, sd1: Family) -> None:
    model, clip = comfy.two
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


def test_prompt_weights_act_on_keys_and_values_as_on_any_token(comfy: LoadedNodes) -> None:
    model, clip = comfy.one
    layout = edit.Layout(clip.encode("a cat")[0][0].shape[-1] // 3, 1)
    plain, weighted, empty = (clip.encode(prompt)[0][0] for prompt in ("a <teddy>", "a (<teddy>:1.4)", ""))
    word = 2  # start, a, <teddy>
    torch.testing.assert_close(weighted[0, word], empty[0, word] + 1.4 * (plain - empty)[0, word])
    assert torch.equal(weighted[0, :word], plain[0, :word]) and layout.acting(weighted) == [0]
    # Without a concept, the weights are the original's own.
    original = comfy.base[1].encode("a (red:1.3) dog")[0][0]
    assert torch.equal(layout.encoding(clip.encode("a (red:1.3) dog")[0][0]), original)


def test_prompts_of_several_sections(comfy: LoadedNodes) -> None:
    model, clip = comfy.one
    long = "a <teddy> on a big red box beside the table and the dog and a cup and a <teddy>"
    packed = clip.encode(long)[0][0]
    length = comfy.own.pipeline.model.cond_stage_model.max_length
    # Each section is encoded on its own, so the edit of the second is that of a prompt of its words.
    second = long.split(maxsplit=length - 2)[-1]
    torch.testing.assert_close(packed[:, length:], clip.encode(second)[0][0])
    assert packed.shape[1] == 2 * length and predict(model, [[[packed, {}]]], LATENTS)[0].isfinite().all()


# Other nodes


def test_combined_concatenated_averaged_and_zeroed_conditionings(comfy: LoadedNodes) -> None:
    model, clip = comfy.two
    teddy, pot, plain = (clip.encode(prompt)[0] for prompt in ("a <teddy>", "a <pot>", "blurry"))
    # Prompts of an image share their concepts, as if each had its own place in one prompt.
    both = predict(model, [[teddy, pot], [plain]], LATENTS)
    expected = [comfy.oracle("a <teddy>", "a <pot>")[0], comfy.oracle("a <pot>", "a <teddy>")[0],
                comfy.oracle(TWO, "blurry")[1]]
    assert_close(both, expected)
    joined = [[torch.cat([teddy[0], plain[0]], 1), teddy[1]]]
    halves = [sampled(comfy, [[[teddy[0], {}]], [[plain[0], {}]]])[index] for index in range(2)]
    found = sampled(comfy, [joined])[0]
    assert torch.allclose(found[:, :teddy[0].shape[1], :16], halves[0][..., :16])
    zeroed = sampled(comfy, [[teddy], [[torch.zeros_like(plain[0]), plain[1]]]])[1]
    assert not edit.Layout(16, 2).encoding(zeroed).any()


def sampled(comfy: LoadedNodes, conditionings: Sequence[Conditioning]) -> list[Tensor]:
    """Return the encodings that a sampling run reads."""
    conds = conds_of(conditionings)
    flat = [cond for of_kind in conds.values() for cond in of_kind]
    sampling.share_concepts(flat, comfy.two[0].get_wrappers("outer_sample", "perfusion")[0].concepts)
    return [cond["cross_attn"] for cond in flat]


def test_a_controlnet_reads_the_plain_encoding(comfy: LoadedNodes) -> None:
    model, clip = comfy.one
    plain = comfy.base[1].encode("a dog")
    entry = {**clip.encode("a <teddy>")[0][1], "cross_attn_controlnet": clip.encode("a red dog")[0][0]}
    conds = [cond for of_kind in conds_of([clip.encode("a <teddy>"), [[clip.encode("a <teddy>")[0][0], entry]],
                                           plain]).values() for cond in of_kind]
    sampling.share_concepts(conds, model.get_wrappers("outer_sample", "perfusion")[0].concepts)
    context, _ = comfy.own.contexts(requests_of(("a <teddy>", "")))
    torch.testing.assert_close(conds[0]["cross_attn_controlnet"], context.encoding)
    torch.testing.assert_close(conds[1]["cross_attn_controlnet"], comfy.base[1].encode("a red dog")[0][0])
    assert torch.equal(conds[2].get("cross_attn_controlnet", plain[0][0]), plain[0][0])  # the edit is for the U-Net


def test_a_lora_acts_on_what_it_changes(comfy: LoadedNodes) -> None:
    model, clip = comfy.one
    layer = comfy.base[0].model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
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


def test_sixteen_bit_weights_and_copies_of_other_types(comfy: LoadedNodes) -> None:
    model, clip = comfy.one
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


def test_the_original_model_and_clip_are_unchanged(comfy: LoadedNodes) -> None:
    model, clip = comfy.base
    assert not model.object_patches and not model.wrappers
    assert not isinstance(clip.cond_stage_model, text.ConceptEncoder)
    assert len(comfy.one[0].get_wrappers("outer_sample", "perfusion")[0].concepts) == 1
    assert len(comfy.one[1].cond_stage_model.concepts) == 1
    before = predict(model, [clip.encode("a dog")], LATENTS)[0]
    settled(*comfy.two, TWO)
    assert torch.equal(predict(model, [clip.encode("a dog")], LATENTS)[0], before)


def test_other_tokens_and_attributes_pass_through(comfy: LoadedNodes) -> None:
    clip = comfy.two[1]
    assert clip.cond_stage_model.encoder is comfy.base[1].cond_stage_model.encoder
    assert clip.tokenizer.clip_l is comfy.base[1].tokenizer.clip_l
    with pytest.raises(AttributeError):
        clip.cond_stage_model.no_such_attribute  # noqa: B018
    assert clip.tokenize("a red dog") == comfy.base[1].tokenize("a red dog")
    concept = concept_file.load_concepts(folders.concept_path("teddy.safetensors"))[0]
    found, = [token for token, _ in comfy.one[1].tokenize("a <teddy>")["l"][0] if isinstance(token, Tensor)]
    assert torch.equal(found, concept.vectors["clip_l"])
