"""Few-step sampling through the pipeline: without guidance, with concepts, from an image, and for bias auto."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.model_files import ModelFiles, max_difference
from PIL import Image

from ldm.inference import PerfusionPipeline, auto_bias
from ldm.inference.auto_bias import BiasFinder
from ldm.inference.settings import GenerationSettings

PROMPT = "a <teddy> outside"
FEW_STEPS: dict[str, dict[str, Any]] = {
    "turbo": {"sampler": "euler_a", "num_inference_steps": 1}, "lcm": {"sampler": "lcm", "num_inference_steps": 4},
    "lightning": {"sampler": "euler", "num_inference_steps": 4, "timestep_spacing": "trailing"},
    "hyper": {"sampler": "ddim", "num_inference_steps": 2, "timestep_spacing": "trailing"},
    "tcd": {"sampler": "tcd", "num_inference_steps": 2}}


@pytest.fixture
def pipeline(shared_model_files: ModelFiles, model_files: ModelFiles) -> PerfusionPipeline:
    pipeline = PerfusionPipeline.from_pretrained(shared_model_files.config, device="cpu")
    pipeline.load_concepts(model_files.teddy)
    return pipeline


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.slow
def test_without_guidance_the_edit_alone_acts_and_the_network_sees_each_image_once(
    pipeline: PerfusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, apply_model = [], pipeline.model.apply_model
    monkeypatch.setattr(pipeline.model, "apply_model", lambda x, *rest: rows.append(len(x)) or apply_model(x, *rest))
    for name, settings in FEW_STEPS.items():
        strong, weak, word = (
            pixels(pipeline(prompt, seed=1, num_images=2, guidance_scale=1, bias=bias, **settings).images)
            for prompt, bias in ((PROMPT, 0.3), (PROMPT, 3.0), ("a teddy outside", None)))
        assert max_difference(strong, weak) > 0 and max_difference(strong, word) > 0, name
    assert set(rows) == {2} and len(rows) == 3 * sum(each["num_inference_steps"] for each in FEW_STEPS.values())


def test_one_step_starts_from_an_image(pipeline: PerfusionPipeline) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for settings in FEW_STEPS.values():
        output = pipeline(PROMPT, seed=1, guidance_scale=1, image=image, strength=0.2, **settings)
        assert np.isfinite(pixels(output.images)).all()
        assert output.settings.num_inference_steps == settings["num_inference_steps"]


@pytest.mark.slow
def test_rescaled_guidance_and_the_spacing_reach_the_sampler(pipeline: PerfusionPipeline) -> None:
    common = {"seed": 1, "num_inference_steps": 3, "guidance_scale": 5.0}
    plain, rescaled, trailing = (pixels(pipeline(PROMPT, **common, **changes).images) for changes in (
        {}, {"guidance_rescale": 0.7}, {"timestep_spacing": "trailing"}))
    assert max_difference(plain, rescaled) > 0 and max_difference(plain, trailing) > 0
    pipeline.defaults = replace(pipeline.defaults, timestep_spacing="trailing", guidance_rescale=0.7)
    by_model = pixels(pipeline(PROMPT, **common).images)
    both = pixels(pipeline(PROMPT, **common, guidance_rescale=0.7, timestep_spacing="trailing").images)
    assert max_difference(by_model, both) == 0


def test_bias_auto_searches_with_the_few_steps_of_a_distilled_model() -> None:
    searched = SimpleNamespace(image_size=(16, 16), complete=lambda settings: settings)

    def of_search(*settings: Any, **others: Any) -> tuple[Any, ...]:
        chosen = BiasFinder(searched, torch.nn.Identity(), GenerationSettings(*settings, **others)).settings
        return chosen.sampler, chosen.num_inference_steps, chosen.eta, chosen.timestep_spacing

    assert of_search(4, 1.0, "euler", timestep_spacing="trailing") == ("euler", 4, None, "trailing")
    assert of_search(2, 1.0, "tcd", 0.5) == ("tcd", 2, 0.5, None)
    usual = (auto_bias.SAMPLER, auto_bias.STEPS, None, None)
    assert of_search(50, 6.0, "euler_a", 1.0, timestep_spacing="trailing") == of_search() == usual
