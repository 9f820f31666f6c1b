"""Loading and unloading: what a pipeline is before and after, and what is refused."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from helpers.diffusers_pipelines import Family, OwnSampler, requests_of
from safetensors.torch import save_file

from ldm.common.errors import UserError
from ldm.concepts.storage import save_concepts
from ldm.integrations.diffusers import load_concepts, unload_concepts

TWO, PLAIN = "a <teddy> next to a <pot>", "a cat"
SLOW_BOTH = pytest.mark.parametrize("family", ["sd1", pytest.param("xl", marks=pytest.mark.slow)], indirect=True)


def state_of(pipe: Any) -> dict[str, Any]:
    """Return everything of a pipeline that loading could change."""
    state: dict[str, Any] = {"attributes": sorted(pipe.__dict__), "config": dict(pipe.config)}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            state |= {f"{name}.{key}": (value.data_ptr(), value._version) for key, value in part.state_dict().items()}
            for path, module in part.named_modules():
                hooks = module._forward_hooks, module._forward_pre_hooks
                state[f"{name}:{path}"] = id(module), sorted(module.__dict__), *map(len, hooks)
                state[f"{name}:{path}.processor"] = getattr(module, "processor", None)
        elif hasattr(part, "get_vocab"):
            state[name] = len(part), part.get_added_vocab()
    return state


@SLOW_BOTH
def test_an_unloaded_pipeline_is_what_it_was(family: Family):
    family.images(PLAIN)
    before = state_of(family.pipe)
    load_concepts(family.pipe, family.concepts)
    family.images(TWO)
    unload_concepts(family.pipe)
    unload_concepts(family.pipe)  # without concepts, nothing happens
    assert state_of(family.pipe) == before


def test_files_load_and_more_of_them_later(family: Family, tmp_path: Any):
    files = [save_concepts(tmp_path / f"{index}.safetensors", [concept], precision=torch.float32)
             for index, concept in enumerate(family.concepts)]
    loaded = load_concepts(family.pipe, files[0])
    loaded.set(bias=0.1)
    assert load_concepts(family.pipe, [files[1], family.concepts[0]]) is loaded
    assert loaded.placeholders == ["<teddy>", "<pot>", "<teddy-2>"]
    assert [concept.bias for concept in loaded.concepts] == [0.1, 0.5, 0.5]

    loaded.reset()
    prompt = "a <teddy-2> next to a <pot>"
    own = OwnSampler(family.own.pipeline.model, [replace(family.concepts[0], placeholder="<teddy-2>"),
                                                 family.concepts[1]])
    torch.testing.assert_close(family.images(prompt), own.images(requests_of((prompt, ""))), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_older_files_need_the_covariance(family: Family, tmp_path: Any):
    from ldm.modules.covariance_files import save_covariance
    from ldm.modules.rank_one import dual_vectors, invert_covariance

    concept, root = replace(family.concepts[0], dual=None), torch.randn(16, 16)
    file = tmp_path / "c.safetensors"
    save_covariance(file, root @ root.mT, source="test", captions=1, tokens="all", encoder="unknown")
    with pytest.raises(UserError, match="covariance=FILE"):
        load_concepts(family.pipe, concept)
    loaded = load_concepts(family.pipe, concept, covariance=file)
    expected = dual_vectors(concept.target_input[None], invert_covariance(root @ root.mT))[0]
    torch.testing.assert_close(loaded.concepts[0].dual, expected)


@pytest.mark.slow
def test_pipelines_that_share_a_unet_share_its_concepts(family: Family):
    loaded = load_concepts(family.pipe, family.concepts)
    other = AutoPipelineForImage2Image.from_pipe(family.pipe)
    other.set_progress_bar_config(disable=True)
    start, settings = torch.rand(1, 3, 16, 16), {"num_inference_steps": 4, "strength": 0.5}
    with pytest.raises(UserError, match=r"names <teddy>, but was not encoded .* call load_concepts on this pipeline"):
        other(TWO, image=start, **settings)
    assert load_concepts(other) is loaded
    other(TWO, image=start, **settings)
    before = family.images(TWO)
    unload_concepts(other)
    assert torch.equal(family.images(TWO), before)


@pytest.mark.slow
def test_a_pipeline_with_concepts_is_not_kept_alive(family: Family):
    import gc
    import weakref

    pipe = type(family.pipe)(**family.pipe.components, requires_safety_checker=False)
    load_concepts(pipe, family.concepts)
    reference = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert reference() is None
    load_concepts(family.pipe, family.concepts)  # the U-Net still has the processors
    unload_concepts(family.pipe)


@pytest.mark.slow
def test_a_pipeline_with_concepts_is_not_copied(family: Family):
    load_concepts(family.pipe, family.concepts)
    with pytest.raises(UserError, match="cannot be copied or pickled; call unload_concepts first"):
        copy.deepcopy(family.pipe)


@pytest.mark.slow
def test_a_method_that_the_pipeline_itself_had_stays(family: Family):
    original = type(family.pipe).encode_prompt
    calls = []

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(family.pipe, *args, **kwargs)

    family.pipe.encode_prompt = encode_prompt
    load_concepts(family.pipe, family.concepts)
    family.pipe.encode_prompt(TWO, "cpu", 1, True)
    assert len(calls) == 1
    unload_concepts(family.pipe)
    assert family.pipe.__dict__.pop("encode_prompt") is encode_prompt


def test_words_of_no_concept_are_told_once(family: Family, caplog: pytest.LogCaptureFixture):
    load_concepts(family.pipe, family.concepts)
    for _ in range(2):
        family.images("a <tedy>", num_inference_steps=1)
    assert [record.message for record in caplog.records if "<tedy>" in record.message] == [
        "warning: <tedy> is not the word of a loaded concept; loaded are <teddy>, <pot>"]


REFUSED_SETTINGS = [
    ({"bias": {"<tedy>": 0.5}}, "no loaded concept is called <tedy>; loaded are <teddy>, <pot>"),
    ({"bias": "auto"}, "bias 'auto' is not a number"),
    ({"bias": float("nan")}, "bias nan is not a number"),
    ({"bias": [0.1, 0.2, 0.3]}, "3 values of bias for 2 concepts"),
    ({"temperature": 0}, "temperature 0 must be above 0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SETTINGS)
def test_settings_that_are_refused(family: Family, settings: dict[str, Any], message: str):
    loaded = load_concepts(family.pipe, family.concepts)
    before = loaded.concepts
    with pytest.raises(UserError, match=message):
        loaded.set(**settings)
    assert loaded.concepts == before




def test_a_word_that_is_cut_off(family: Family):
    load_concepts(family.pipe, family.concepts)
    for prompt in ("a cat " * 6 + "and one <teddy>", ["a <pot>", "cat " * 14 + "<teddy>"]):
        seeds = range(1 if isinstance(prompt, str) else len(prompt))
        with pytest.raises(UserError, match="the word is cut off; shorten the prompt"):
            family.images(prompt, seeds=tuple(seeds))
    assert torch.isfinite(family.images("a <teddy> " + "cat " * 20)).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["xl"], indirect=True)
def test_second_prompts(family: Family):
    load_concepts(family.pipe, family.concepts)
    with pytest.raises(UserError, match="prompt and prompt_2 must name the same concepts at the same positions"):
        family.images(TWO, prompt_2="a teddy next to a pot")
    assert torch.equal(family.images(TWO, prompt_2=TWO), family.images(TWO))


@pytest.mark.slow
def test_embeddings_of_other_concepts(family: Family):
    load_concepts(family.pipe, family.concepts)
    arguments = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    embeds, negative_embeds = family.pipe.encode_prompt(TWO, **arguments)
    unload_concepts(family.pipe)
    load_concepts(family.pipe, family.concepts)
    with pytest.raises(UserError, match="encode them again with pipe.encode_prompt"):
        family.images(None, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds)


def ip_adapter(pipe: Any) -> None:
    processors = {name: IPAdapterAttnProcessor2_0(32, 16) if "attn2" in name else processor
                  for name, processor in pipe.unet.attn_processors.items()}
    pipe.unet.set_attn_processor(processors)


def custom_diffusion(pipe: Any) -> None:
    pipe.unet.set_attn_processor(CustomDiffusionAttnProcessor2_0(train_kv=False, hidden_size=32))


def fused(pipe: Any) -> None:
    pipe.fuse_qkv_projections()


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "message", "first"), [
    (ip_adapter, "do not work beside an IP-Adapter; call pipe.unload_ip_adapter", "feature"),
    (ip_adapter, "do not work beside an IP-Adapter; call pipe.unload_ip_adapter", "concepts"),
    (custom_diffusion, "CustomDiffusionAttnProcessor2_0 of layer down_blocks.*set_default_attn_processor", "concepts"),
    (fused, "do not work with fused projections; call pipe.unfuse_qkv_projections", "concepts"),
], ids=["ip-first", "ip", "custom-diffusion", "fused"])
def test_other_processors_are_refused(family: Family, feature: Callable[[Any], None], message: str, first: str):
    """Before and after loading, and also for a prompt without a concept, since loading promised that images stay."""
    pipe = copy.deepcopy(family.pipe)
    if first == "concepts":
        load_concepts(pipe, family.concepts)
    feature(pipe)
    with pytest.raises(UserError, match=message):
        if first == "concepts":
            family.images(TWO, pipe=pipe)
        else:
            load_concepts(pipe, family.concepts)
    unload_concepts(pipe)
    assert not [one for one in pipe.unet.attn_processors.values() if type(one).__name__ == "ConceptAttnProcessor"]


@pytest.mark.slow
def test_processors_that_only_attend_are_wrapped_again(family: Family):
    pipe = copy.deepcopy(family.pipe)
    load_concepts(pipe, family.concepts)
    before = family.images(TWO, pipe=pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(family.images(TWO, pipe=pipe), before, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fused_and_unfused(family: Family):
    pipe = copy.deepcopy(family.pipe)
    load_concepts(pipe, family.concepts)
    before = family.images(TWO, pipe=pipe)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    assert torch.equal(family.images(TWO, pipe=pipe), before)
    pipe.fuse_qkv_projections()
    unload_concepts(pipe)
    pipe.unfuse_qkv_projections()
    assert {type(one).__name__ for one in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_pipelines_and_concepts_that_do_not_fit(family: Family, request: pytest.FixtureRequest, tmp_path: Any):
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",))
    pixels = DDPMPipeline(unet, DDPMScheduler())
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.down_blocks.0.lora.down.weight": torch.zeros(2, 2)}, lora)
    concept = family.concepts[0]
    other_layers = replace(concept, base="", base_samples="", target_outputs_v={"input_blocks.9.1": torch.ones(4)})
    narrow = replace(concept, embedding=concept.embedding[:, :9])
    cases = [
        ("pipe", concept, "into a pipeline of diffusers, not a str"),
        (pixels, concept, "DDPMPipeline is not a pipeline of Stable Diffusion 1, 2 or XL"),
        (family.pipe, [], "no concept is given"),
        (family.pipe, tmp_path / "missing.safetensors", "no such file"),
        (family.pipe, lora, "lora.safetensors"),
        (family.pipe, other_layers, "which is another model"),
        (family.pipe, narrow, "has 9 numbers, words of its text encoders have 16"),
        (family.pipe, [concept, narrow], "only concepts of one base model can be used together"),
    ]
    for pipe, given, message in cases:
        with pytest.raises(UserError, match=message) as error:
            load_concepts(pipe, given)
        assert "\n" not in str(error.value)
    assert "encode_prompt" not in family.pipe.__dict__
    assert {type(one).__name__ for one in family.pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.slow
def test_concepts_of_another_family(sd1: Family, xl: Family):
    for one, other in ((sd1, xl), (xl, sd1)):
        with pytest.raises(UserError, match="which is another model"):
            load_concepts(one.pipe, other.concepts[0])


@pytest.mark.slow
def test_a_word_that_the_tokenizer_has(family: Family):
    pipe = copy.deepcopy(family.pipe)
    pipe.load_textual_inversion({"<teddy>": torch.zeros(1, 16)}, token="<teddy>")
    with pytest.raises(UserError, match="tokenizer already has the word <teddy>; call pipe.unload_textual_inversion"):
        load_concepts(pipe, family.concepts)
    load_concepts(pipe, family.concepts[1])
    assert torch.isfinite(family.images("a <teddy> and a <pot>", pipe=pipe)).all()
