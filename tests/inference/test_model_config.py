"""What a model's config says about generating with it: sizes, and the section `inference`."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.model_files import ROOT, ModelFiles
from omegaconf import DictConfig, OmegaConf

from ldm.common.errors import UserError
from ldm.inference.model_config import (
    DEFAULT_SEGMENTER,
    InferenceDefaults,
    check_steps,
    complete_settings,
    image_size,
    inference_defaults,
    latent_size,
    model_setting,
    read_model_config,
    segmenter_of,
)
from ldm.inference.settings import GenerationSettings

MINI = "models/mini/config.yaml"
CONFIGS = [MINI, "configs/perfusion.yaml", "configs/stable-diffusion/v1-inference.yaml",
           "configs/stable-diffusion/v2-inference-v.yaml", "configs/latent-diffusion/txt2img-1p4B-eval.yaml"]


def config(inference: Any = None, **params: Any) -> DictConfig:
    """Return a config with these params of the model and this section `inference`."""
    section = {} if inference is None else {"inference": inference}
    return OmegaConf.create({"model": {"target": "some.Model", "params": params}, **section})


def first_stage(**ddconfig: Any) -> dict[str, Any]:
    return {"params": {"ddconfig": ddconfig}}


# Sizes


@pytest.mark.parametrize(("params", "latents", "image"), [
    ({"image_size": 64, "first_stage_config": first_stage(ch_mult=[1, 2, 4, 4])}, (64, 64), (512, 512)),
    ({"image_size": [32, 48], "first_stage_config": first_stage(ch_mult=[1, 1])}, (32, 48), (64, 96)),
    ({"image_size": 16, "first_stage_config": first_stage(ch_mult=[1], patch_size=4)}, (16, 16), (64, 64)),
    ({"image_size": 16, "first_stage_config": first_stage()}, (16, 16), (128, 128)),  # the first stage's default
    ({}, (256, 256), (256, 256))])  # a diffusion model of pixels
def test_a_config_gives_the_sizes_of_latents_and_images(
    params: dict[str, Any], latents: tuple[int, int], image: tuple[int, int]
) -> None:
    assert latent_size(config(**params)) == latents
    assert image_size(config(**params), latents) == image


@pytest.mark.parametrize(("path", "image"), zip(CONFIGS, (64, 64, 512, 768, 256), strict=True))
def test_bundled_configs_generate_images_of_the_published_size(path: str, image: int) -> None:
    described = read_model_config(path)
    assert image_size(described, latent_size(described)) == (image, image)


def test_height_and_width_are_given_in_pixels() -> None:
    described = read_model_config("configs/stable-diffusion/v1-inference.yaml")
    assert latent_size(described, 768, 512) == (96, 64)
    assert latent_size(described, width=1024) == (64, 128)


@pytest.mark.parametrize(("height", "width", "message"), [
    (500, None, "height 500: this model generates multiples of 64 pixels; the nearest is 512"),
    (None, 30, "width 30: this model generates multiples of 64 pixels; the nearest is 64"),
    (0, None, "height 0: .* the nearest is 64"), (-64, None, "height -64: .* the nearest is 64")])
def test_a_size_that_the_model_cannot_generate_is_an_error(height: int | None, width: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        latent_size(read_model_config("configs/stable-diffusion/v1-inference.yaml"), height, width)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_the_model_does_not_have_is_an_error(steps: int) -> None:
    check_steps(config(timesteps=1000), 1000)
    check_steps(config(), 1)
    with pytest.raises(UserError, match=f"{steps} sampling steps: this model has 1000; give 1 to 1000"):
        check_steps(config(timesteps=1000), steps)


# Reading


def test_a_relative_path_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_model_config(MINI) == read_model_config(ROOT / MINI)
    (tmp_path / "models" / "mini").mkdir(parents=True)
    (tmp_path / MINI).write_text("model: {target: my.Own}")
    assert read_model_config(MINI).model.target == "my.Own"  # the working directory comes first


@pytest.mark.parametrize(("text", "message"), [
    (None, "not readable as a config"), ("a: [", "not readable as a config"), ("a: 1", "describes no model"),
    ("- a", "describes no model"), ("model: 5", "describes no model"), ("", "describes no model")])
def test_a_file_that_describes_no_model_is_an_error_of_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_model_config(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_a_damaged_reference_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match="model.params.ckpt_path cannot be read"):
        model_setting(config(ckpt_path="${nowhere}"), "params.ckpt_path")
    assert model_setting(config(), "params.ckpt_path") is None
    assert model_setting(config(), "params.image_size", 3) == 3


# The section `inference`


def test_without_a_section_the_defaults_are_those_of_latent_diffusion() -> None:
    expected = InferenceDefaults(guidance_scale=6.0, sampler="ddim", num_inference_steps=50)
    assert inference_defaults(None) == inference_defaults(config()) == expected


def test_the_section_says_what_suits_the_model() -> None:
    section = {"guidance_scale": 2, "sampler": "dpm", "num_inference_steps": 20, "evaluation_clip": "a",
               "segmenter": "b", "covariance": "c"}
    assert inference_defaults(config(section)) == InferenceDefaults(2, "dpm", 20, "a", "b", "c")


def test_the_section_of_the_config_beside_the_weights_is_used_if_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("inference: {guidance_scale: 2.5}")
    weights = str(tmp_path / "model.safetensors")
    assert inference_defaults(config(ckpt_path=weights)).guidance_scale == 2.5
    assert inference_defaults(config(), weights).guidance_scale == 2.5
    assert inference_defaults(config(), tmp_path / "model.ckpt").guidance_scale == 2.5
    own = config({"guidance_scale": 4.0}, ckpt_path=weights)
    assert inference_defaults(own).guidance_scale == 4.0
    elsewhere = tmp_path / "other" / "model.ckpt"
    assert inference_defaults(config(ckpt_path=weights), elsewhere) == InferenceDefaults()


def test_a_config_beside_the_weights_may_be_of_anything(tmp_path: Path) -> None:
    for text in ("- a", "a: 1", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert inference_defaults(config(), tmp_path / "model.ckpt") == InferenceDefaults()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="config.yaml: not readable as a config"):
        inference_defaults(config(), tmp_path / "model.ckpt")


def test_a_training_config_on_the_mini_model_has_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = inference_defaults(read_model_config(MINI))
    assert (mini.guidance_scale, mini.sampler, mini.num_inference_steps) == (2.0, "ddim", 50)
    monkeypatch.chdir(tmp_path)
    assert inference_defaults(read_model_config("configs/perfusion.yaml")) == mini


@pytest.mark.parametrize(("section", "message"), [
    ({"guidance": 2}, "inference: unknown key guidance; it has guidance_scale, sampler, num_inference_steps"),
    ({1: 2}, "inference: unknown key 1;"),
    ({"guidance_scale": "high"}, "inference: guidance_scale must be .*not 'high'"),
    ({"num_inference_steps": 2.5}, "inference: num_inference_steps must be .*not 2.5"),
    ({"num_inference_steps": None}, "inference: num_inference_steps must be .*not None"),
    ({"sampler": 3}, "inference: sampler must be .*not 3"),
    ({"evaluation_clip": ["a"]}, r"inference: evaluation_clip must be .*not \['a'\]"),
    (5, "inference: must be keys with values, not 5"), ([1], r"inference: must be keys with values, not \[1\]")])
def test_unknown_keys_and_wrong_kinds_are_errors_of_one_line(section: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        inference_defaults(config(section))
    assert "\n" not in str(error.value)


def test_the_segmenter_is_the_trained_ones_the_models_or_the_public_one() -> None:
    assert segmenter_of(config()) == DEFAULT_SEGMENTER
    assert segmenter_of(config({"segmenter": "model"})) == "model"
    assert segmenter_of(config({"segmenter": "model"}, segmenter="training")) == "training"
    assert segmenter_of(read_model_config(MINI)) == "models/mini/segmenter"


# Settings


def test_settings_that_are_left_open_come_from_the_model_and_the_sampler() -> None:
    defaults = InferenceDefaults(2.0, "euler_a", 7)
    filled_in = GenerationSettings(7, 2.0, "euler_a", 1, guidance_rescale=0.0)
    assert complete_settings(GenerationSettings(), config(), defaults) == filled_in
    given = GenerationSettings(9, 0.0, "ddim", 0.5, bias=0.3, timestep_spacing="trailing", guidance_rescale=0.7)
    assert complete_settings(given, config(), defaults) == given


def test_the_models_spacing_is_for_samplers_that_know_it() -> None:
    defaults = InferenceDefaults(1.0, "euler", 4, timestep_spacing="trailing", guidance_rescale=0.5)
    for sampler, spacing in ((None, "trailing"), ("dpm", "trailing"), ("lcm", None)):
        settings = complete_settings(GenerationSettings(sampler=sampler), config(), defaults)
        assert (settings.timestep_spacing, settings.guidance_rescale) == (spacing, 0.5)
    with pytest.raises(UserError, match="section inference: timestep_spacing 'even' is unknown; choose one of leading"):
        complete_settings(GenerationSettings(), config(), InferenceDefaults(timestep_spacing="even"))


@pytest.mark.parametrize(("settings", "message"), [
    (GenerationSettings(num_inference_steps=0), "0 sampling steps"),
    (GenerationSettings(sampler="ddpm"), "sampler 'ddpm' is unknown; choose one of ddim"),
    (GenerationSettings(sampler="dpm", eta=0.5), "adds no noise, so eta must be 0"),
    (GenerationSettings(eta=2.0), "eta 2 must be between 0"), (GenerationSettings(width=3), "width 3: this model"),
    (GenerationSettings(sampler="lcm", timestep_spacing="trailing"), "LCM has timesteps of its own"),
    (GenerationSettings(sampler="lcm", num_inference_steps=51), "51 sampling steps: LCM takes 1 to 50"),
    (GenerationSettings(timestep_spacing="even"), "does not know timestep_spacing 'even'"),
    (GenerationSettings(guidance_rescale=2), "guidance_rescale 2 must be a number from 0 to 1")])
def test_settings_are_checked_before_any_weights_are_loaded(settings: GenerationSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete_settings(settings, config(timesteps=10), InferenceDefaults(num_inference_steps=5))


def test_the_tiny_models_config_is_complete(model_files: ModelFiles) -> None:
    described = read_model_config(model_files.config)
    assert image_size(described, latent_size(described)) == (16, 16)
    assert inference_defaults(described) == InferenceDefaults()


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, ldm.inference.model_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The bundled model is described in three files, which must not drift apart.

PARTS = ("unet_config", "first_stage_config", "cond_stage_config")
SCHEDULE = ("beta_schedule", "linear_start", "linear_end", "cosine_s", "timesteps", "parameterization", "image_size",
            "channels", "conditioning_key", "scale_factor", "first_stage_key", "cond_stage_key")


def architecture(path: str) -> dict[str, Any]:
    """Return what a config says of the model's networks and schedule, without where their weights come from."""
    params = OmegaConf.to_container(OmegaConf.load(ROOT / path).model.params, resolve=True)
    settings = {name: params.get(name) for name in SCHEDULE}
    for part in PARTS:
        described = params[part]["params"]
        settings[part] = {name: value for name, value in described.items() if name != "ckpt_path"}
    settings["scale_factor"] = settings["scale_factor"] or 1.0  # the default
    return settings


def test_the_mini_model_and_the_training_of_concepts_describe_one_model() -> None:
    bundled, concepts = OmegaConf.load(ROOT / MINI).model, OmegaConf.load(ROOT / "configs/perfusion.yaml").model
    assert architecture(MINI) == architecture("configs/perfusion.yaml")
    for part in PARTS:
        assert bundled.params[part] == concepts.params[part], part
    assert bundled.params.ckpt_path == concepts.params.ckpt_path
    assert set(bundled.params) - set(concepts.params) == set()


def test_the_mini_model_is_what_its_training_describes() -> None:
    """Only the class of the text encoder differs: it is trained on attribute-binding captions and exported without."""
    bundled, trained = architecture(MINI), architecture("configs/mini/text2img.yaml")
    bundled_encoder, trained_encoder = bundled.pop("cond_stage_config"), trained.pop("cond_stage_config")
    assert bundled == trained
    assert bundled_encoder["max_length"] == trained_encoder["max_length"]
    for part in PARTS[:2]:
        targets = {OmegaConf.load(ROOT / path).model.params[part].target
                   for path in (MINI, "configs/mini/text2img.yaml")}
        assert len(targets) == 1, part
