"""What a run says about itself: steps of a strength, sizes and photos that the model does not know."""
from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from ldm.inference.model_config import inference_defaults, read_model_config
from ldm.inference.notices import tell_about_few_steps, tell_about_strength, warn_about_photos, warn_about_size
from ldm.inference.settings import GenerationSettings

MINI = "models/mini/config.yaml"


@pytest.mark.parametrize(("strength", "steps", "run"), [
    (0.3, 50, 15), (0.001, 20, 1), (0.75, 50, 38), (0.5, 5, 2), (0.99, 10, 10)])
def test_steps_of_a_strength_are_told(
    strength: float, steps: int, run: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tell_about_strength(strength, GenerationSettings(num_inference_steps=steps))
    assert caplog.messages == [f"strength {strength:g}: {run} of {steps} steps are run, the last ones"]


def test_all_steps_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tell_about_strength(1.0, GenerationSettings(num_inference_steps=5))
    assert not caplog.messages


def test_sizes_other_than_the_models_get_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = read_model_config(MINI)
    for height, width in ((None, None), (64, None), (64, 64)):
        warn_about_size(config, height, width)
    assert not caplog.messages
    warn_about_size(config, None, 128)
    (message,) = caplog.messages
    assert "trained on images of 64x64; at 128x64" in message


def test_photos_get_a_warning_on_models_of_drawings_only(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [Image.open(f"models/mini/examples/teddy/{number}.png").size for number in range(5)]
    bundled = inference_defaults(read_model_config(MINI))
    warn_about_photos(bundled, 64, sizes)
    warn_about_photos(inference_defaults(OmegaConf.create({"inference": {}})), 64, [(3024, 4032)])
    assert not caplog.messages
    warn_about_photos(bundled, 64, [*sizes, (3024, 4032), (600, 600)])
    (message,) = caplog.messages
    assert "knows only a small world of drawings, 64 pixels wide" in message


def test_training_finds_the_bundled_models_domain() -> None:
    assert inference_defaults(read_model_config("configs/perfusion.yaml")).domain == "a small world of drawings"


@pytest.mark.parametrize(("file", "advice"), [
    ("sdxl_lightning_4step.safetensors", "Lightning model; .* --sampler euler --timestep_spacing trailing --steps 4 "),
    ("juggernautXL_v9Lightning.ckpt", "Lightning model; .* --steps 4 --scale 1 is usual"),
    ("Hyper-SDXL-8steps-lora.safetensors", "Hyper-SD model; .* --sampler ddim --timestep_spacing trailing --steps 8 "),
    ("Hyper-SDXL-1step-lora.safetensors", "one-step Hyper-SD model; .* --sampler tcd --steps 1 "),
    ("Hyper-SD15-12steps-CFG-lora.safetensors", "Hyper-SD CFG model; .* --steps 12 --scale 5 "),
    ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", None), ("lcm-lora-sdxl", "LCM model; .* --sampler lcm "),
    ("sd_xl_turbo_1.0_fp16.safetensors", "Turbo model; .* --sampler euler_a --steps 4 "),
    ("hyperrealistic_v3.safetensors", None), ("v1-5-pruned-emaonly.safetensors", None), ("12stepslcmodel.ckpt", None)])
def test_distilled_models_are_told_by_their_names(
    file: str, advice: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tell_about_few_steps(["base.safetensors", file], GenerationSettings(50, 6.0, "ddim"))
    assert bool(caplog.messages) == (advice is not None)
    if advice is not None:
        assert re.search(f"{re.escape(file)}: by its name, a {advice}", caplog.messages[0])


def test_distilled_models_are_told_by_their_titles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"modelspec.title": "My SDXL Turbo"})
    caplog.set_level(logging.INFO)
    tell_about_few_steps([file], GenerationSettings(20, 6.0, "dpm"))
    assert "a Turbo model" in caplog.messages[0]


@pytest.mark.parametrize(("file", "settings"), [
    ("sdxl_lightning_4step.safetensors", GenerationSettings(4, 1.0, "euler", timestep_spacing="trailing")),
    ("sd_xl_turbo_1.0.safetensors", GenerationSettings(1, 1.0, "euler_a")),
    ("lcm-lora.safetensors", GenerationSettings(6, 1.5, "lcm"))])
def test_settings_that_suit_a_distilled_model_are_no_news(
    file: str, settings: GenerationSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tell_about_few_steps([file], settings)
    assert not caplog.messages


def test_settings_that_ignore_the_prompt_or_the_noise_get_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tell_about_few_steps([], GenerationSettings(20, 0.0, "euler"))
    tell_about_few_steps([], GenerationSettings(1, 1.0, "ddim"))
    tell_about_few_steps([], GenerationSettings(1, 1.0, "ddim", timestep_spacing="trailing"))
    unprompted, noisy = caplog.messages
    assert "guidance 0 leaves out the prompt" in unprompted and "--timestep_spacing trailing" in noisy
