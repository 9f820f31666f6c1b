"""What a run says about itself: steps of a strength, sizes and photos that the model does not know."""
from __future__ import annotations

import logging

import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.inference.model_config import inference_defaults, read_model_config
from ldm.inference.notices import tell_about_strength, warn_about_photos, warn_about_size
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
