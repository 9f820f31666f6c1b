"""What else a pipeline of diffusers does must go together with concepts, in either order."""
from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from helpers.diffusers_pipelines import DDIM, Family, OwnSampler, own_unet, requests_of
from peft import LoraConfig
from torch import Tensor

from ldm.integrations.diffusers import load_concepts, unload_concepts
from ldm.modules.attention import CrossAttention

CLOSE = {"rtol": 0, "atol": 1e-3}
TWO, PLAIN = "a <Teddy> next to a <pot>", "a cat"
XL = pytest.mark.parametrize("family", ["xl"], indirect=True)
ORDERS = pytest.mark.parametrize("first", ["concepts", "feature"])


def expected_images(family: Family) -> Tensor:
    return family.own.images(requests_of((TWO, "")))


def assert_same_in_order(family: Family, first: str, feature: Any) -> None:
    """Load concepts and apply the feature, in this order or the other; compare with our sampler."""
    steps = [lambda: load_concepts(family.pipe, family.concepts), lambda: feature(family.pipe)]
    for step in steps if first == "concepts" else reversed(steps):
        step()
    torch.testing.assert_close(family.images(TWO), expected_images(family), **CLOSE)


# Embeddings and callbacks


@pytest.mark.parametrize("family", ["sd1", pytest.param("xl", marks=pytest.mark.slow)], indirect=True)
def test_embeddings_of_encode_prompt_are_used_as_they_are(family: Family):
    load_concepts(family.pipe, family.concepts)
    embeds = encode(family, TWO, "ugly")
    expected = family.own.images(requests_of((TWO, "ugly")))
    torch.testing.assert_close(family.images(None, **embeds), expected, **CLOSE)

    # Rows of several prompts, of which one names no concept, are repeated with their edits.
    both = encode(family, [TWO, PLAIN], ["ugly", "ugly"])
    expected = family.own.images(requests_of((TWO, "ugly"), (PLAIN, "ugly"), seeds=(0, 1, 2, 3)))
    got = family.images(None, **both, num_images_per_prompt=2, seeds=(0, 1, 2, 3))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.slow
def test_embeddings_of_one_half_only(family: Family):
    """The negative prompt is then encoded under the concepts that the given rows name, and the reverse."""
    load_concepts(family.pipe, family.concepts)
    prompt, negative = encode(family, TWO, "ugly").values()
    expected = family.own.images(requests_of((TWO, "ugly")))
    for given in ({"prompt_embeds": prompt, "negative_prompt": "ugly", "prompt": None},
                  {"prompt": TWO, "negative_prompt_embeds": negative}):
        torch.testing.assert_close(family.images(**given), expected, **CLOSE)


def test_plain_embeddings_give_exactly_the_plain_image(family: Family):
    embeds = encode(family, PLAIN, "ugly")
    expected = family.images(None, **embeds)
    load_concepts(family.pipe, family.concepts)
    assert torch.equal(family.images(None, **embeds), expected)


@pytest.mark.slow
def test_callbacks_may_change_embeddings(family: Family):
    """Guidance ends after the first step, as in the documentation of diffusers."""
    def end_guidance(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return values

    settings = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with own_unet(family.pipe, family.own, requests_of((TWO, ""))) as embeds:
        expected = family.images(None, **embeds, **settings)
    load_concepts(family.pipe, family.concepts)
    torch.testing.assert_close(family.images(TWO, **settings), expected, **CLOSE)


# Schedulers, precision and attention


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                                       HeunDiscreteScheduler, LCMScheduler])
def test_schedulers(family: Family, scheduler: Any):
    family.pipe.scheduler = scheduler.from_config(family.pipe.scheduler.config)
    with own_unet(family.pipe, family.own, requests_of((TWO, ""))) as embeds:
        expected = family.images(None, **embeds, generator=torch.Generator().manual_seed(1))
    load_concepts(family.pipe, family.concepts)
    got = family.images(TWO, generator=torch.Generator().manual_seed(1))
    family.pipe.scheduler = DDIMScheduler(**DDIM)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.slow
def test_sixteen_bits(family: Family, caplog: pytest.LogCaptureFixture):
    """Rounding is all that changes, and the rounded model is the same base."""
    expected = expected_images(family)
    pipe = copy.deepcopy(family.pipe).to(torch.bfloat16)
    load_concepts(pipe, family.concepts)
    got = family.images(TWO, pipe=pipe).float()
    assert (got - expected).abs().mean() < 0.02 < (expected - family.images(PLAIN)).abs().mean()
    assert not [record for record in caplog.records if record.name.startswith("ldm")]


@pytest.mark.slow
@ORDERS
def test_attention_slicing(family: Family, first: str):
    try:
        assert_same_in_order(family, first, lambda pipe: pipe.enable_attention_slicing("max"))
        unload_concepts(family.pipe)
        assert {type(one).__name__ for one in family.pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}
    finally:
        family.pipe.disable_attention_slicing()


@pytest.mark.slow
def test_compiled_layer(family: Family):
    """Without a break of the graph. (The whole U-Net compiles too, in ten seconds.)"""
    block = family.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    try:
        assert_same_in_order(family, "feature", lambda _: block.compile(backend="eager", fullgraph=True))
        unload_concepts(family.pipe)
        family.images(PLAIN)
    finally:
        block._compiled_call_impl = None
        torch.compiler.reset()


@pytest.mark.slow
def test_compiled_text_encoder(family: Family):
    original = family.pipe.text_encoder
    family.pipe.text_encoder = torch.compile(original, backend="eager")
    try:
        family.images(PLAIN)
        assert_same_in_order(family, "concepts", lambda _: None)
    finally:
        unload_concepts(family.pipe)
        family.pipe.text_encoder = original
        torch.compiler.reset()


@XL
@pytest.mark.slow
def test_clip_skip(family: Family):
    """The concept is as it was taught, the encoding is that of another layer: different, and not plain."""
    load_concepts(family.pipe, family.concepts)
    skipped = family.images(TWO, clip_skip=1)
    assert (skipped - expected_images(family)).abs().max() > 0.01
    assert (skipped - family.images("a teddy next to a pot", clip_skip=1)).abs().max() > 0.01


@XL
@pytest.mark.slow
def test_pooled_vectors_with_an_old_config(family: Family):
    """Public configs of the second encoder have `eos_token_id: 2`, and look for the highest id instead."""
    encoder = family.pipe.text_encoder_2.text_model
    encoder.eos_token_id, kept = 2, encoder.eos_token_id
    try:
        assert_same_in_order(family, "concepts", lambda _: None)
    finally:
        encoder.eos_token_id = kept


# Offloading


@pytest.mark.slow
@ORDERS
def test_model_offloading(family: Family, first: str):
    """The hooks of accelerate, with the CPU as the device that is computed on."""
    from accelerate import cpu_offload_with_hook

    def offload(pipe: Any) -> None:
        for name in ("text_encoder", "unet", "vae"):
            cpu_offload_with_hook(getattr(pipe, name), "cpu")

    try:
        assert_same_in_order(family, first, offload)
    finally:
        family.pipe.remove_all_hooks()


@pytest.mark.slow
def test_sequential_offloading(family: Family, first: str = "feature"):
    """Weights are on the meta device, also those of the embedding table and of the fingerprint."""
    from accelerate import cpu_offload

    pipe = copy.deepcopy(family.pipe)

    def offload(pipe: Any) -> None:
        for name in ("text_encoder", "unet", "vae"):
            cpu_offload(getattr(pipe, name), torch.device("cpu"))

    moved = Family(family.own, pipe, family.concepts)
    assert_same_in_order(moved, first, offload)
    assert pipe.unet.conv_in.weight.device.type == "meta"


# LoRA


@pytest.mark.slow
@ORDERS
def test_lora(family: Family, first: str):
    """Keys of the concept follow the LoRA: o*_K = W_K i_super, with the W_K that acts."""
    pipe, model = copy.deepcopy(family.pipe), copy.deepcopy(family.own.pipeline.model)
    torch.manual_seed(0)
    steps = [lambda: load_concepts(pipe, family.concepts),
             lambda: pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], lora_alpha=1,
                                                      init_lora_weights=False))]
    for step in steps if first == "concepts" else reversed(steps):
        step()
    got = family.images(TWO, pipe=pipe)
    merge_lora(pipe.unet, model.model.diffusion_model)
    logging.getLogger("ldm.concepts.fingerprint").setLevel(logging.ERROR)  # it is another base now
    expected = OwnSampler(model, family.concepts).images(requests_of((TWO, "")))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (expected - expected_images(family)).abs().max() > 0.01
    pipe.unet.disable_adapters()
    torch.testing.assert_close(family.images(TWO, pipe=pipe), expected_images(family), **CLOSE)


def merge_lora(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Add the LoRA of diffusers' U-Net to the weights of ours; attention layers come in the same order in both."""
    from diffusers.models.attention_processor import Attention

    loras = sorted((module for module in theirs.modules() if isinstance(module, Attention)), key=weight_key)
    layers = sorted((module for module in ours.modules() if isinstance(module, CrossAttention)), key=weight_key)
    with torch.no_grad():
        for lora, layer in zip(loras, layers, strict=True):
            for name in ("to_q", "to_k", "to_v"):
                getattr(layer, name).weight += getattr(lora, name).get_delta_weight("default")


def weight_key(layer: Any) -> float:
    """Return a number that identifies a layer by its weights."""
    return float(getattr(layer.to_q, "base_layer", layer.to_q).weight.detach().double().sum())


def encode(family: Family, prompt: str | list[str], negative: str | list[str]) -> dict[str, Tensor]:
    """Return what `encode_prompt` of the pipeline returns, by the names that its call takes."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    result = family.pipe.encode_prompt(prompt=prompt, negative_prompt=negative, device=torch.device("cpu"),
                                       num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(names, result, strict=False))


