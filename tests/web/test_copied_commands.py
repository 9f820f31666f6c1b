"""The commands that the page shows ask for the same as the page: the scripts' own parsers read them."""
from __future__ import annotations

import importlib.util
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from ldm.inference.settings import GenerationOptions, GenerationSettings, ModelSettings
from ldm.web.commands import generation_commands
from ldm.web.image_request import ImageRequest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelSettings("models/mini/config.yaml", device="cpu", precision="full")
SETTINGS = GenerationSettings(num_inference_steps=7, guidance_scale=2.5, sampler="dpm", height=64, width=128)
CONCEPT = str(ROOT / "tests" / "integrations" / "my-teddy.safetensors")


def parse(command: str) -> GenerationOptions:
    """Return what the script of a command understands."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    return load(ROOT / script).parse_arguments(arguments)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_to_image() -> None:
    request = ImageRequest('a "photo"; rm -rf $HOME', "snow", settings=SETTINGS, seed=5, count=6)
    options = parse(generation_commands(request, MODEL))
    assert options.prompts == ('a "photo"; rm -rf $HOME',)
    assert options.negative_prompts == ("snow",)
    assert (options.model, options.settings) == (MODEL, SETTINGS)
    assert (options.seed, options.num_images, options.batch_size, options.source) == (5, 6, 4, None)


def test_concepts_and_their_settings() -> None:
    settings = replace(SETTINGS, bias=0.55, temperature=0.2, global_locking=True, timestep_spacing="trailing")
    request = ImageRequest("a <my-teddy>", concepts=(CONCEPT,), settings=settings, seed=1, count=1)
    options = parse(generation_commands(request, MODEL))
    assert options.concepts == (CONCEPT,)
    assert options.settings == replace(settings, bias=(0.55,), temperature=(0.2,))


def test_a_strip_has_one_command_for_each_bias() -> None:
    request = ImageRequest("a <my-teddy>", concepts=(CONCEPT,), settings=SETTINGS, seed=1, biases=(0.3, 0.9))
    options = [parse(line) for line in generation_commands(request, MODEL).splitlines()]
    assert [one.settings.bias for one in options] == [(0.3,), (0.9,)]
    assert [one.num_images for one in options] == [1, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_images_to_start_from(tmp_path: Path, masked: bool) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", (64, 64)).save(image)
    Image.new("L", (64, 64), 255).save(mask)
    request = ImageRequest("a dog", settings=SETTINGS, seed=1, image=image, mask=mask if masked else None,
                           strength=0.4)
    source = parse(generation_commands(request, MODEL)).source
    assert (source.image, source.mask, source.strength) == (str(image), str(mask) if masked else None, 0.4)
