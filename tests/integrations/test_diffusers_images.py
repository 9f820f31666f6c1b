"""Images of diffusers with concepts against our own, from the same weights and noise, for each kind of pipeline."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.models import MultiControlNetModel
from helpers.diffusers_pipelines import DDIM, STEPS, Family, OwnSampler, noise, own_unet, requests_of
from helpers.oracles import randomize

from ldm.inference.source_image import StartingLatents
from ldm.integrations.diffusers import load_concepts, unload_concepts

CLOSE = {"rtol": 0, "atol": 1e-3}
BOTH = pytest.mark.parametrize("family", ["sd1", pytest.param("xl", marks=pytest.mark.slow)], indirect=True)
ONE, TWO = "a <teddy> on the moon", "a <Teddy> next to a <pot>"
PLAIN = "a cat"


@BOTH
def test_one_and_two_concepts_with_both_locks(family: Family):
    loaded = load_concepts(family.pipe, family.concepts)
    plain = family.images(PLAIN)
    for global_locking in (False, True):
        loaded.set(global_locking=global_locking)
        for prompt in (ONE, TWO):
            expected = family.own.images(requests_of((prompt, "")), global_locking)
            torch.testing.assert_close(family.images(prompt), expected, **CLOSE)
            assert (expected - plain).abs().max() > 0.1


@BOTH
def test_prompts_without_a_concept_give_exactly_the_plain_image(family: Family):
    settings = ({}, {"guidance_scale": 1.0}, {"negative_prompt": "ugly"})
    before = [family.images(PLAIN, **one) for one in settings]
    load_concepts(family.pipe, family.concepts)
    for one, plain in zip(settings, before, strict=True):
        assert torch.equal(family.images(PLAIN, **one), plain)


@BOTH
@pytest.mark.slow
def test_prompts_with_several_images_and_negative_prompts(family: Family):
    load_concepts(family.pipe, family.concepts)
    pairs = ((ONE, "ugly"), (PLAIN, "a <pot>"), (TWO, "blurry"))
    seeds = (0, 1, 2, 3, 4, 5)
    got = family.images([prompt for prompt, _ in pairs], negative_prompt=[negative for _, negative in pairs],
                        seeds=seeds, num_images_per_prompt=2)
    torch.testing.assert_close(got, family.own.images(requests_of(*pairs, seeds=seeds)), **CLOSE)


@BOTH
@pytest.mark.slow
def test_without_guidance(family: Family):
    load_concepts(family.pipe, family.concepts)
    got = family.images(TWO, guidance_scale=1.0)
    torch.testing.assert_close(got, family.own.images(requests_of((TWO, "")), guidance_scale=1.0), **CLOSE)


@pytest.mark.slow
def test_settings_and_kinds_of_concepts(family: Family):
    """Settings for one call, layers that a concept does not use, trained keys, and the gated projection."""
    first, second = family.concepts
    names = sorted(first.target_outputs_v)
    first = replace(first, used_layers=names[:3], projection="gated")
    second = replace(second, projection="gated", target_outputs_k={
        name: -output for name, output in second.target_outputs_v.items()})
    loaded = load_concepts(family.pipe, [first, second])
    own = OwnSampler(family.own.pipeline.model, [first, second], family.own.pipeline.config)
    torch.testing.assert_close(family.images(TWO), own.images(requests_of((TWO, ""))), **CLOSE)

    loaded.set(bias={"<teddy>": 0.2}, temperature=0.3)
    loaded.set(global_locking=True, all_layers=True)
    own.concepts = [replace(first, bias=0.2, temperature=0.3, used_layers=[]), replace(second, temperature=0.3)]
    torch.testing.assert_close(family.images(TWO), own.images(requests_of((TWO, "")), True), **CLOSE)

    loaded.reset()
    own.concepts = [first, second]
    torch.testing.assert_close(family.images(TWO), own.images(requests_of((TWO, ""))), **CLOSE)


@BOTH
@pytest.mark.slow
def test_image_to_image(family: Family):
    load_concepts(family.pipe, family.concepts)
    pipe = AutoPipelineForImage2Image.from_pipe(family.pipe)
    pipe.set_progress_bar_config(disable=True)
    load_concepts(pipe)
    start = noise([7])
    got = pipe(TWO, image=start, strength=0.5, num_inference_steps=2 * STEPS, guidance_scale=3.0, output_type="pt",
               generator=torch.Generator().manual_seed(3), **sizes(family)).images
    expected = family.own.images(requests_of((TWO, ""), seeds=(3,)), start=StartingLatents(start, 0.5),
                                 num_inference_steps=2 * STEPS)
    torch.testing.assert_close(got, expected, **CLOSE)
    unload_concepts(pipe)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "global_locking"), [("sd1", False), ("xl", True)], indirect=["family"])
def test_inpainting(family: Family, global_locking: bool):
    pipe = AutoPipelineForInpainting.from_pipe(family.pipe)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :9] = 1
    settings = {"image": torch.rand(1, 3, 16, 16), "mask_image": mask}
    assert_same_with_our_unet(family, pipe, settings, global_locking)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), [
    ("sd1", {}), ("sd1", {"guess_mode": True}), ("sd1", {"nets": 2}), ("xl", {})], indirect=["family"], ids=str)
def test_controlnet(family: Family, settings: dict[str, Any]):
    count = settings.get("nets", 1)
    nets = [controlnet(family.pipe, seed) for seed in range(count)]
    kind = StableDiffusionXLControlNetPipeline if family.own.pipeline.config else StableDiffusionControlNetPipeline
    parts = {name: part for name, part in family.pipe.components.items() if name != "image_encoder"}
    parts |= {} if family.own.pipeline.config else {"requires_safety_checker": False}
    pipe = kind(**parts, controlnet=nets[0] if count == 1 else MultiControlNetModel(nets))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    asked = {"image": image if count == 1 else [image] * count, "guess_mode": "guess_mode" in settings,
             "controlnet_conditioning_scale": 1.0 if count == 1 else [1.0] * count}
    without = pipe(PLAIN, output_type="pt", num_inference_steps=STEPS, latents=noise([0]), **asked).images
    assert (without - family.images(PLAIN)).abs().max() > 0.01
    assert_same_with_our_unet(family, pipe, asked)
    names = {type(processor).__name__ for net in nets for processor in net.attn_processors.values()}
    assert names == {"AttnProcessor2_0"}


def controlnet(pipe: DiffusionPipeline, seed: int) -> ControlNetModel:
    """Return a ControlNet for the pipeline's U-Net, with random weights."""
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16))
    return randomize(net, seed, scale=0.1).eval()


def sizes(family: Family) -> dict[str, Any]:
    """Return the sizes of an image for the pipelines of SDXL that do not take them from `height` and `width`."""
    return {"original_size": (16, 16), "target_size": (16, 16)} if family.own.pipeline.config else {}


def assert_same_with_our_unet(family: Family, pipe: DiffusionPipeline, settings: dict[str, Any],
                              global_locking: bool = False) -> None:
    """Compare a pipeline with concepts with the same one around our U-Net, prompts and edit."""
    requests = requests_of((TWO, "ugly"), seeds=(0,))
    common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt", "height": 16, "width": 16,
              **settings}
    with own_unet(pipe, family.own, requests, global_locking) as embeds:
        expected = pipe(**common, **embeds, generator=torch.Generator().manual_seed(5)).images
    loaded = load_concepts(pipe, family.concepts)
    loaded.set(global_locking=global_locking)
    got = pipe(TWO, negative_prompt="ugly", **common, generator=torch.Generator().manual_seed(5)).images
    unload_concepts(pipe)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert pipe.scheduler.config.steps_offset == DDIM["steps_offset"]
