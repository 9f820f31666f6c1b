"""PerfusionPipeline: loading, seeds, concepts and their settings, and images to start from, on a tiny model."""
from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.model_files import (
    PROMPT,
    ROOT,
    ROUNDING,
    WIDTH,
    ModelFiles,
    load_main,
    max_difference,
    script_generator,
)
from helpers.oracles import diffusers_unet_state
from helpers.oracles_vae import diffusers_vae_state
from helpers.tiny_clips import write_clip
from omegaconf import OmegaConf
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.inference import PerfusionPipeline, auto_bias
from ldm.inference.model_config import InferenceDefaults
from ldm.inference.requests import GenerationRequest, requests_for
from ldm.inference.settings import GenerationSettings
from ldm.inference.source_image import StartingLatents
from ldm.util import instantiate_from_config

CAT = "a photo of a cat"
QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def shared_model(shared_model_files: ModelFiles) -> Any:
    return PerfusionPipeline.from_pretrained(shared_model_files.config, device="cpu").model


@pytest.fixture
def pipeline(shared_model: Any, model_files: ModelFiles) -> PerfusionPipeline:
    """The tiny model on the CPU, without concepts."""
    return PerfusionPipeline(shared_model, OmegaConf.load(model_files.config))


@pytest.fixture
def with_concepts(pipeline: PerfusionPipeline, model_files: ModelFiles) -> PerfusionPipeline:
    """The tiny model with <teddy> and <mug>."""
    pipeline.load_concepts(model_files.teddy, model_files.mug)
    return pipeline


def pixels(images: list[Image.Image]) -> np.ndarray:
    """Return (n, H, W, 3) integers."""
    return np.stack([np.asarray(image, dtype=int) for image in images])


def generate(pipeline: PerfusionPipeline, prompt: str | list[str] = CAT, **arguments: Any) -> np.ndarray:
    """Return the pixels of a call with few steps and, unless it says otherwise, seed 1."""
    seed = {} if "generator" in arguments else {"seed": 1}
    return pixels(pipeline(prompt, **{**QUICK, **seed, **arguments}).images)


def noise_image(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# Loading


def write_diffusers_folder(folder: Path, model: Any, text_config: Path) -> Path:
    """Save the tiny model with the classes of diffusers and transformers."""
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1}
    unet = UNet2DConditionModel(
        **blocks, sample_size=8, cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    unet.load_state_dict(diffusers_unet_state(model.model.diffusion_model.state_dict(), num_res_blocks=1))
    vae = AutoencoderKL(
        **blocks, latent_channels=4, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, mid_block_add_attention=False)
    vae.load_state_dict(diffusers_vae_state(model.first_stage_model.state_dict(), levels=2))
    tower = CLIPTextModel(CLIPTextConfig.from_pretrained(text_config))
    tower.load_state_dict(model.cond_stage_model.transformer.state_dict())
    for name, network in (("unet", unet), ("vae", vae), ("text_encoder", tower)):
        network.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
def test_every_form_of_weights_gives_the_same_image(
    pipeline: PerfusionPipeline, model_files: ModelFiles, tmp_path: Path
) -> None:
    expected = generate(pipeline)
    config = OmegaConf.load(model_files.config)
    del config.model.params.ckpt_path
    OmegaConf.save(config, tmp_path / "base.yaml")
    torch.save({"state_dict": pipeline.model.state_dict()}, tmp_path / "base.ckpt")
    folder = write_diffusers_folder(tmp_path / "diffusers", pipeline.model, model_files.folder / "text")
    for weights in (tmp_path / "base.ckpt", model_files.checkpoint, str(folder)):
        loaded = PerfusionPipeline.from_pretrained(weights, config=tmp_path / "base.yaml", device="cpu")
        assert max_difference(generate(loaded), expected) <= ROUNDING, weights
        assert loaded.checkpoint == Path(weights)
    described = PerfusionPipeline.from_config(config, model_files.checkpoint, "cpu")
    assert max_difference(generate(described), expected) == 0


@pytest.mark.slow
def test_a_config_with_its_checkpoint_is_enough(pipeline: PerfusionPipeline, model_files: ModelFiles) -> None:
    loaded = PerfusionPipeline.from_pretrained(str(model_files.config), device="cpu")
    assert loaded.checkpoint == str(model_files.checkpoint)
    assert max_difference(generate(loaded), generate(pipeline)) == 0


@pytest.mark.slow
def test_a_folder_of_config_and_weights_can_be_moved(
    pipeline: PerfusionPipeline, model_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights in the folder are used, whatever the config says, and its section `inference` counts."""
    config = OmegaConf.load(model_files.config)
    config.model.params.ckpt_path = "elsewhere/model.safetensors"
    config.inference = {"guidance_scale": 2.0, "num_inference_steps": 3, "sampler": "dpm"}
    (tmp_path / "moved").mkdir()
    OmegaConf.save(config, tmp_path / "moved" / "config.yaml")
    shutil.copy(model_files.checkpoint, tmp_path / "moved" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    loaded = PerfusionPipeline.from_pretrained("moved", device="cpu")
    assert loaded.checkpoint == Path("moved/model.safetensors")
    assert loaded.defaults == InferenceDefaults(2.0, "dpm", 3)
    output = loaded(CAT, seed=1)
    assert output.settings == GenerationSettings(3, 2.0, "dpm", 0.0, guidance_rescale=0.0)
    assert max_difference(pixels(output.images), generate(pipeline, sampler="dpm")) == 0


@pytest.mark.slow
def test_the_bundled_model_is_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = PerfusionPipeline.from_pretrained("models/mini", device="cpu")
    assert pipeline.image_size == (64, 64) and pipeline.defaults.guidance_scale == 2.0
    (image,) = pipeline("a photo of a dog", seed=1, num_inference_steps=2).images
    assert image.size == (64, 64) and image.mode == "RGB"
    described = PerfusionPipeline.from_pretrained("models/mini/model.safetensors", "models/mini/config.yaml", "cpu")
    (again,) = described("a photo of a dog", seed=1, num_inference_steps=2).images
    assert max_difference(pixels([image]), pixels([again])) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importing_the_pipeline_by_its_public_name_is_quick() -> None:
    """Names are imported on first use, so the modules of settings stay free of torch."""
    code = "import sys, ldm.inference; assert 'torch' not in sys.modules; from ldm.inference import PerfusionPipeline"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("path", "config", "message"), [
    ("nowhere", None, "nowhere: is not there and names no config.yaml; give the model's config too"),
    ("{folder}", None, "{folder}: holds no config.yaml; give the model's config too"),
    ("{folder}/base.safetensors", None, "base.safetensors: holds no config.yaml"),
    ("nowhere.yaml", None, "nowhere.yaml: not readable as a config"),
    ("nowhere.ckpt", "{folder}/base.yaml", "nowhere.ckpt: no such file"),
    ("{folder}/teddy.safetensors", "{folder}/base.yaml", "is a concept of this project, not a base"),
    ("{folder}/base.safetensors", "nowhere.yaml", "nowhere.yaml: not readable as a config"),
    ("{folder}/base.safetensors", "{folder}/text/config.json", "describes no model")])
def test_what_cannot_be_loaded_is_an_error_of_one_line(
    path: str, config: str | None, message: str, model_files: ModelFiles
) -> None:
    names = {"folder": model_files.folder}
    with pytest.raises(UserError) as error:
        PerfusionPipeline.from_pretrained(path.format(**names), config and config.format(**names), "cpu")
    assert message.format(**names) in str(error.value) and "\n" not in str(error.value)


def test_devices_and_precisions_that_do_not_exist_are_errors(model_files: ModelFiles) -> None:
    with pytest.raises(UserError, match="no such device"):
        PerfusionPipeline.from_pretrained(model_files.config, device="abacus")
    with pytest.raises(UserError, match="precision 'half' is unknown; choose full or autocast"):
        PerfusionPipeline.from_pretrained(model_files.config, device="cpu", precision="half")


def test_a_model_that_reads_no_prompts_is_refused(model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.load(model_files.config)
    monkeypatch.setattr("ldm.inference.pipeline.load_model", lambda *_: torch.nn.Identity())
    with pytest.raises(UserError, match="LatentDiffusion of this config reads no prompts"):
        PerfusionPipeline.from_config(config, None, "cpu")
    with pytest.raises(UserError, match="Identity of this config reads no prompts"):
        PerfusionPipeline(torch.nn.Identity())


@pytest.mark.slow
def test_sixteen_bits_hardly_change_the_image(pipeline: PerfusionPipeline, model_files: ModelFiles) -> None:
    assert not pipeline.autocast
    autocast = PerfusionPipeline.from_pretrained(model_files.config, device="cpu", precision="autocast")
    difference = max_difference(generate(autocast), generate(pipeline))
    assert 0 < difference <= 25


# Prompts and seeds


@pytest.mark.slow
def test_an_image_is_the_one_of_txt2img(
    with_concepts: PerfusionPipeline, model_files: ModelFiles, tmp_path: Path
) -> None:
    script = script_generator(load_main("txt2img"), model_files.config, tmp_path)
    of_script = script("--prompt", PROMPT, "a <mug>", "--concept", model_files.teddy, model_files.mug, "--seed", 5,
                       "--n_samples", 2, "--bias", 0.6, 0.9, "--negative_prompt", "a dog", "--sampler", "euler_a")
    of_call = generate(with_concepts, [PROMPT, "a <mug>"], seed=5, num_images=2, bias=[0.6, 0.9],
                       negative_prompt="a dog", sampler="euler_a", batch_size=2)
    assert max_difference(of_call, of_script) == 0


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_change_images(with_concepts: PerfusionPipeline, batch_size: int) -> None:
    prompts = [PROMPT, CAT, "a <mug> and a <teddy>"]
    expected = generate(with_concepts, prompts, num_images=2)
    assert max_difference(generate(with_concepts, prompts, num_images=2, batch_size=batch_size), expected) <= ROUNDING


@pytest.mark.slow
def test_seeds_count_up_from_the_first_image_of_each_prompt(pipeline: PerfusionPipeline) -> None:
    output = pipeline([CAT, "a dog"], seed=7, num_images=2, **QUICK)
    assert output.seeds == [7, 8, 7, 8]
    assert [request.prompt for request in output.requests] == [CAT, CAT, "a dog", "a dog"]
    assert output.settings == GenerationSettings(3, 2.0, "ddim", 0.0, guidance_rescale=0.0)
    images = pixels(output.images)
    assert max_difference(images[1:2], generate(pipeline, seed=8)) <= ROUNDING
    assert max_difference(images[2:3], generate(pipeline, "a dog", seed=7)) <= ROUNDING
    assert max_difference(images[0], images[1]) > 20 and max_difference(images[0], images[2]) > 20


def test_the_output_names_a_random_seed_that_gives_the_image_again(pipeline: PerfusionPipeline) -> None:
    first, second = pipeline(CAT, **QUICK), pipeline(CAT, **QUICK)
    assert first.seeds != second.seeds  # equal in one of four billion runs
    assert max_difference(generate(pipeline, seed=first.seeds[0]), pixels(first.images)) == 0


@pytest.mark.slow
def test_a_generator_may_be_given_instead_of_a_seed(pipeline: PerfusionPipeline) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = generate(pipeline, num_images=2, generator=generator(1))
    assert max_difference(one, generate(pipeline, num_images=2, generator=generator(1))) == 0
    assert max_difference(one[0], one[1]) > 20
    each = generate(pipeline, num_images=2, generator=[generator(1), generator(2)])
    assert max_difference(each[0], one[0]) <= ROUNDING and max_difference(each[1], one[1]) > 20


def test_generating_does_not_touch_the_global_random_state(pipeline: PerfusionPipeline) -> None:
    state = torch.get_rng_state()
    generate(pipeline, eta=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_negative_prompts_are_one_for_all_prompts_or_one_for_each(pipeline: PerfusionPipeline) -> None:
    prompts = [CAT, "a dog"]
    plain = generate(pipeline, prompts)
    for_all = generate(pipeline, prompts, negative_prompt="a mug")
    for_each = generate(pipeline, prompts, negative_prompt=["a mug", ""])
    assert max_difference(plain[0], for_all[0]) > ROUNDING and max_difference(plain[1], for_all[1]) > ROUNDING
    assert max_difference(for_each[0], for_all[0]) <= ROUNDING and max_difference(for_each[1], plain[1]) <= ROUNDING


def test_without_guidance_the_negative_prompt_is_not_evaluated(
    pipeline: PerfusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    apply_model = pipeline.model.apply_model
    monkeypatch.setattr(pipeline.model, "apply_model",
                        lambda x, t, context: batches.append(len(x)) or apply_model(x, t, context))
    unguided = generate(pipeline, guidance_scale=1)
    assert batches == [1] * 3
    batches.clear()
    assert max_difference(generate(pipeline, guidance_scale=1.0001), unguided) <= ROUNDING
    assert batches == [2] * 3
    with pytest.raises(UserError, match="negative prompts act through guidance, and a guidance_scale of 1 is none"):
        generate(pipeline, guidance_scale=1, negative_prompt="a mug")


def test_height_and_width_change_the_size(pipeline: PerfusionPipeline) -> None:
    assert pipeline.image_size == (16, 16)
    assert generate(pipeline, height=24, width=32).shape == (1, 24, 32, 3)
    assert generate(pipeline, width=12).shape == (1, 16, 12, 3)


@pytest.mark.slow
def test_images_come_as_soon_as_their_batch_is_done(pipeline: PerfusionPipeline) -> None:
    images = pipeline.generate(requests_for([CAT], range(3)), GenerationSettings(**QUICK), batch_size=1)
    first = pixels([next(images)])
    assert max_difference(first, generate(pipeline, seed=0)) == 0
    assert len(list(images)) == 2


def test_no_prompts_give_no_images(pipeline: PerfusionPipeline) -> None:
    assert pipeline([], seed=1, **QUICK).images == []


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompt": "a <mug>"}, "names <mug>, but no loaded concept has that word"),
    ({"negative_prompt": "<mug>"}, "names <mug>"),
    ({"prompt": "word " * 15}, "15 tokens, but the text encoder takes 14"),
    ({"num_inference_steps": 0}, "0 sampling steps: this model has 100"),
    ({"num_inference_steps": 101}, "101 sampling steps: this model has 100; give 1 to 100"),
    ({"guidance_scale": -1}, "guidance_scale -1 must be a number of at least 0"),
    ({"guidance_scale": float("inf")}, "guidance_scale inf must be a number of at least 0"),
    ({"sampler": "ddpm"}, "sampler 'ddpm' is unknown"), ({"eta": 2.0}, "eta 2 must be between 0"),
    ({"sampler": "dpm", "eta": 0.5}, "adds no noise"),
    ({"height": 30}, "height 30: this model generates multiples of 4 pixels; the nearest is 32"),
    ({"num_images": 0}, "num_images 0 must be 1 or more"), ({"seed": -1}, "seed -1 must be 0 or more"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"generator": [torch.Generator()], "num_images": 2}, "1 generators for 2 images"),
    ({"generator": torch.Generator(), "seed": 1}, "seed and generator both"),
    ({"batch_size": 0}, "batch_size 0 must be 1 or more"), ({"batch_size": -1}, "batch_size -1 must be 1 or more"),
    ({"bias": {"<hat>": 0.5}}, "no loaded concept is called <hat>; loaded are none"),
    ({"bias": [0.5, 0.6]}, "2 values of bias for 0 concepts"),
    ({"bias": "auto"}, "bias auto acts on learned concepts, and none is loaded"),
    ({"strength": 0.5}, "strength and mask_image act on an image"),
    ({"mask_image": noise_image()}, "strength and mask_image act on an image"),
    ({"mask_border": 2}, "act on an image"),
    ({"image": noise_image(), "strength": 0}, "strength 0 must be above 0 and at most 1"),
    ({"image": noise_image(), "mask_border": 2}, "mask_border acts on a mask_image"),
    ({"image": noise_image(), "mask_image": noise_image(), "mask_border": -1}, "mask_border -1 must be 0 or more"),
    ({"image": "nowhere.png"}, "nowhere.png: no such file")])
def test_mistakes_are_errors_of_one_line(pipeline: PerfusionPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        pipeline(**{"prompt": CAT, **QUICK, **arguments})
    assert message in str(error.value) and "\n" not in str(error.value)


# Concepts and their settings


@pytest.mark.slow
def test_a_concept_shows_in_the_images_that_name_it_only(
    pipeline: PerfusionPipeline, with_concepts: PerfusionPipeline, shared_model: Any, model_files: ModelFiles
) -> None:
    base = PerfusionPipeline(shared_model, OmegaConf.load(model_files.config))
    assert max_difference(generate(with_concepts, CAT), generate(base, CAT)) == 0
    assert max_difference(generate(with_concepts, PROMPT), generate(base, PROMPT.replace("<teddy>", "teddy"))) > 20
    assert max_difference(generate(with_concepts, PROMPT), generate(with_concepts, PROMPT.upper().lower())) == 0


@pytest.mark.slow
def test_concepts_are_loaded_one_after_another_and_unloaded(
    pipeline: PerfusionPipeline, model_files: ModelFiles
) -> None:
    before = generate(pipeline, CAT)
    assert [each.placeholder for each in pipeline.load_concepts(model_files.teddy)] == ["<teddy>"]
    alone = generate(pipeline, PROMPT)
    assert [each.placeholder for each in pipeline.load_concepts(model_files.mug)] == ["<teddy>", "<mug>"]
    assert max_difference(generate(pipeline, PROMPT), alone) == 0
    generate(pipeline, "a <mug>")
    pipeline.unload_concepts("<MUG>")
    with pytest.raises(UserError, match="names <mug>, but no loaded concept has that word; loaded are <teddy>"):
        generate(pipeline, "a <mug>")
    with pytest.raises(UserError, match="no loaded concept is called <mug>; loaded are <teddy>"):
        pipeline.unload_concepts("<teddy>", "<mug>")
    assert [each.placeholder for each in pipeline.concepts] == ["<teddy>"]
    pipeline.unload_concepts()
    assert pipeline.concepts == []
    with pytest.raises(UserError, match="loaded are none"):
        pipeline.unload_concepts("<teddy>")
    assert max_difference(generate(pipeline, CAT), before) == 0


def test_equal_placeholders_are_renamed(
    pipeline: PerfusionPipeline, model_files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pipeline.load_concepts(model_files.teddy)
    loaded = pipeline.load_concepts(model_files.teddy)
    assert [each.placeholder for each in loaded] == ["<teddy>", "<teddy-2>"]
    assert f"<teddy-2> stands for the <teddy> of {model_files.teddy}" in caplog.messages
    assert max_difference(generate(pipeline, "a <teddy>"), generate(pipeline, "a <teddy-2>")) <= 2 * ROUNDING


def test_concepts_may_be_given_as_values(pipeline: PerfusionPipeline, model_files: ModelFiles) -> None:
    (concept,) = load_perfusion_concepts(model_files.teddy)
    pipeline.load_concepts(replace(concept, placeholder="<bear>"))
    of_value = generate(pipeline, PROMPT.replace("<teddy>", "<bear>"))
    pipeline.unload_concepts()
    pipeline.load_concepts(model_files.teddy)
    assert max_difference(of_value, generate(pipeline, PROMPT)) <= ROUNDING


def test_a_list_of_loaded_concepts_can_be_changed_without_harm(with_concepts: PerfusionPipeline) -> None:
    loaded = with_concepts.load_concepts()
    loaded.clear()
    assert len(with_concepts.concepts) == 2


@pytest.mark.parametrize(("file", "message"), [
    ("nowhere.safetensors", "nowhere.safetensors: no such file"), ("{folder}/base.safetensors", "not a concept"),
    ("{folder}/foreign.safetensors", "which is another model; load the model it was trained on")])
def test_a_file_that_cannot_be_loaded_changes_nothing(
    with_concepts: PerfusionPipeline, model_files: ModelFiles, file: str, message: str
) -> None:
    before = list(with_concepts.concepts)
    with pytest.raises(UserError, match=message) as error:
        with_concepts.load_concepts(file.format(folder=model_files.folder))
    assert "\n" not in str(error.value) and with_concepts.concepts == before


def test_concepts_of_two_methods_cannot_be_combined(with_concepts: PerfusionPipeline) -> None:
    weights = {"out.2.bias": torch.zeros(4)}
    with pytest.raises(UserError, match="only concepts of one method can be used together"):
        with_concepts.load_concepts(FinetunedConcept("dreambooth", "<toy>", "mug", torch.zeros(1, WIDTH), weights))
    assert len(with_concepts.concepts) == 2


@pytest.mark.parametrize("settings", [{}, {"bias": 0.3}, {"bias": {"<teddy>": 0.3}}, {"bias": [0.3, 0.4]},
                                      {"global_locking": True}, {"prompt_weights": True}])
def test_a_word_beside_concepts_is_as_the_plain_words_of_its_vectors(
    with_concepts: PerfusionPipeline, settings: dict[str, Any]
) -> None:
    plain = generate(with_concepts, ["a <teddy> (on a red sofa:1.2) by a <mug>", "a red sofa"], **settings)
    encoder = with_concepts.model.cond_stage_model
    vectors = encoder.embed_pieces(encoder.word_pieces("red sofa")).detach()
    with_concepts.load_concepts(FinetunedConcept("textual-inversion", "<toy>", "thing", vectors))
    assert len(vectors) == 2
    mixed = generate(with_concepts, ["a <teddy> (on a <toy>:1.2) by a <mug>", "a <toy>"], **settings)
    assert max_difference(plain, mixed) <= ROUNDING
    with pytest.raises(UserError, match="3 values of bias for 2 concepts"):
        with_concepts(CAT, bias=[0.3, 0.4, 0.5])
    with_concepts.unload_concepts("<teddy>", "<mug>")
    alone = generate(with_concepts, ["a <toy>"], **{**QUICK, "num_inference_steps": 3})
    assert max_difference(alone, plain[1:]) <= ROUNDING or settings.get("bias") or settings.get("global_locking")


BOTH = "a <teddy> outside a <mug>"


@pytest.mark.slow
def test_a_bias_is_a_number_a_list_or_a_dict_by_placeholder(with_concepts: PerfusionPipeline) -> None:
    as_trained = generate(with_concepts, BOTH)
    (teddy, mug) = (concept.bias for concept in with_concepts.concepts)
    assert max_difference(generate(with_concepts, BOTH, bias=[teddy, mug]), as_trained) == 0
    one = generate(with_concepts, BOTH, bias=30.0)
    assert max_difference(one, as_trained) > 10
    assert max_difference(generate(with_concepts, BOTH, bias=[30.0, 30.0]), one) == 0
    assert max_difference(generate(with_concepts, BOTH, bias={"<MUG>": 30.0, "<teddy>": 30.0}), one) == 0
    of_mug = generate(with_concepts, BOTH, bias={"<mug>": 30.0})
    assert max_difference(of_mug, one) > ROUNDING and max_difference(of_mug, as_trained) > ROUNDING
    assert max_difference(generate(with_concepts, BOTH, bias=[None, 30.0]), of_mug) == 0
    assert max_difference(generate(with_concepts, BOTH), as_trained) == 0  # no call changes the concepts


@pytest.mark.slow
def test_a_temperature_is_a_number_a_list_or_a_dict_by_placeholder(with_concepts: PerfusionPipeline) -> None:
    as_trained = generate(with_concepts, BOTH)
    one = generate(with_concepts, BOTH, temperature=2.0)
    assert max_difference(one, as_trained) > ROUNDING
    assert max_difference(generate(with_concepts, BOTH, temperature={"<teddy>": 2.0, "<mug>": 2.0}), one) == 0
    of_teddy = generate(with_concepts, BOTH, temperature={"<teddy>": 2.0})
    assert max_difference(generate(with_concepts, BOTH, temperature=[2.0, None]), of_teddy) == 0
    assert max_difference(of_teddy, one) > 0


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bias": [0.1, 0.2, 0.3]}, "3 values of bias for 2 concepts"),
    ({"bias": {"<hat>": 0.5}}, "no loaded concept is called <hat>; loaded are <teddy>, <mug>"),
    ({"bias": "automatic"}, "bias 'automatic' must be a number or 'auto'"),
    ({"bias": {"<mug>": float("nan")}}, "bias nan must be a number or 'auto'"),
    ({"temperature": 0.0}, "temperature 0.0 must be a number above 0"),
    ({"temperature": [0.1, "warm"]}, "temperature 'warm' must be a number above 0"),
    ({"temperature": [0.1] * 3}, "3 values of temperature for 2 concepts")])
def test_invalid_settings_of_concepts_are_errors_of_one_line(
    with_concepts: PerfusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        generate(with_concepts, BOTH, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_global_locking_and_all_layers_reach_the_images(
    pipeline: PerfusionPipeline, model_files: ModelFiles
) -> None:
    (concept,) = load_perfusion_concepts(model_files.teddy)
    pipeline.load_concepts(replace(concept, used_layers=list(concept.target_outputs_v)[-1:]))
    one_layer = generate(pipeline, PROMPT)
    all_layers = generate(pipeline, PROMPT, all_layers=True)
    assert max_difference(one_layer, all_layers) > ROUNDING
    assert max_difference(one_layer, generate(pipeline, PROMPT, global_locking=True)) > ROUNDING
    pipeline.unload_concepts()
    pipeline.load_concepts(concept)
    assert max_difference(generate(pipeline, PROMPT), all_layers) <= ROUNDING


@pytest.mark.slow
def test_an_automatic_bias_is_found_and_reported(
    with_concepts: PerfusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto_bias, "BIASES", (0.5, 2.0))
    monkeypatch.setattr(auto_bias, "STEPS", 2)
    caplog.set_level(logging.INFO)
    with_concepts.defaults = replace(with_concepts.defaults, evaluation_clip=str(write_clip(tmp_path)))
    output = with_concepts(PROMPT, seed=1, bias={"<teddy>": "auto"}, **QUICK)
    teddy, mug = output.settings.biases
    assert teddy in (0.5, 0.75, 2.0) and mug is None
    assert [line.split(" (")[0] for line in caplog.messages if "(text" in line] == [f"bias of <teddy>: {teddy:g}"]
    assert max_difference(pixels(output.images), generate(with_concepts, PROMPT, bias=[teddy, None])) == 0
    both = with_concepts(BOTH, seed=1, bias="auto", **QUICK).settings.biases
    assert len(both) == 2 and all(bias in (0.5, 0.75, 2.0) for bias in both)


def test_an_automatic_bias_needs_a_clip(with_concepts: PerfusionPipeline) -> None:
    with pytest.raises(UserError, match="bias auto measures images by a CLIP, and there is none"):
        generate(with_concepts, PROMPT, bias="auto")


def test_concepts_that_no_prompt_names_are_reported(
    with_concepts: PerfusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    generate(with_concepts, [CAT, PROMPT], negative_prompt="a dog")
    warnings = [line for line in caplog.messages if "does not occur in the prompt" in line]
    assert warnings == ["warning: concept <mug> is loaded, but its word does not occur in the prompt"]


@pytest.mark.slow
def test_prompts_are_encoded_once_for_any_number_of_images(
    with_concepts: PerfusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = with_concepts.model.cond_stage_model
    texts: list[str] = []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda prompts, *rest: texts.extend(prompts) or tokenize(prompts, *rest))
    generate(with_concepts, [PROMPT, CAT], num_images=5, batch_size=2)
    assert sorted(set(texts)) == sorted({PROMPT, CAT, ""}) and texts.count(CAT) == 1


# An image to start from


@pytest.mark.slow
def test_strength_leads_from_the_image_to_the_one_of_the_prompt(pipeline: PerfusionPipeline) -> None:
    source = noise_image()
    near, middle, far = (generate(pipeline, image=source, strength=strength, num_inference_steps=10)
                         for strength in (0.01, 0.5, 1.0))
    assert max_difference(far, generate(pipeline, num_inference_steps=10)) == 0
    assert np.abs(near - middle).mean() < np.abs(near - far).mean()
    default = generate(pipeline, image=source, num_inference_steps=8)
    assert max_difference(default, generate(pipeline, image=source, strength=0.75, num_inference_steps=8)) == 0


@pytest.mark.slow
def test_an_image_may_be_a_file_of_any_size_and_mode(pipeline: PerfusionPipeline, tmp_path: Path) -> None:
    noise_image(size=(40, 24)).convert("RGBA").save(tmp_path / "photo.png")
    of_file = generate(pipeline, image=tmp_path / "photo.png", strength=0.5)
    assert max_difference(of_file, generate(pipeline, image=str(tmp_path / "photo.png"), strength=0.5)) == 0
    assert max_difference(of_file, generate(pipeline, image=noise_image(size=(40, 24)), strength=0.5)) == 0
    assert generate(pipeline, image=noise_image(), height=32, width=24).shape == (1, 32, 24, 3)


def half_white(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Return a mask whose left half is white."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.mark.slow
def test_pixels_outside_of_the_mask_stay_as_they_are(
    with_concepts: PerfusionPipeline, tmp_path: Path
) -> None:
    source, mask = noise_image(), half_white()
    original = np.asarray(source, dtype=int)
    images = generate(with_concepts, PROMPT, image=source, mask_image=mask, num_images=2, mask_border=2)
    assert np.array_equal(images[:, :, 10:], np.stack([original[:, 10:]] * 2))
    changed = (np.abs(images - original).max(axis=(0, 3)) > 0)[:, :8]
    assert changed.mean() > 0.9
    mask.save(tmp_path / "mask.png")
    of_file = generate(with_concepts, PROMPT, image=source, mask_image=tmp_path / "mask.png", num_images=2,
                       mask_border=2)
    assert max_difference(of_file, images) == 0
    large = generate(with_concepts, PROMPT, image=source, mask_image=half_white((64, 64)), num_images=2, mask_border=2)
    assert max_difference(large, images) == 0


def test_a_white_mask_gives_the_image_of_the_prompt(pipeline: PerfusionPipeline) -> None:
    white = Image.new("L", (16, 16), 255)
    assert max_difference(generate(pipeline, image=noise_image(), mask_image=white), generate(pipeline)) == 0


def test_a_black_mask_is_an_error(pipeline: PerfusionPipeline) -> None:
    with pytest.raises(UserError, match="mask_image: is black, so nothing would change"):
        generate(pipeline, image=noise_image(), mask_image=Image.new("L", (16, 16)))


@pytest.mark.slow
def test_the_sampler_starts_from_given_latents(pipeline: PerfusionPipeline) -> None:
    """Masked latents stay as they are, and a low strength changes little: img2img and inpainting build on this."""
    encoded = pipeline.encode([CAT, "a dog"], [])
    requests = [GenerationRequest(CAT, seed, "a dog") for seed in (1, 2)]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for sampler in ("ddim", "heun"):
        settings = pipeline.complete(GenerationSettings(10, 2.0, sampler))
        near, far, masked = (pipeline.latents(encoded, requests, settings, StartingLatents(latents, *arguments))
                             for arguments in ((0.1,), (0.8,), (1.0, mask)))
        assert (near - latents).abs().mean() < (far - latents).abs().mean()
        assert torch.equal(masked[..., :4], latents[..., :4].expand(2, -1, -1, -1))
        assert (near[0] - near[1]).abs().max() > 0.01


# Models that are in use elsewhere


@pytest.mark.slow
def test_a_model_in_training_generates_the_same_images_and_stays_in_training(
    with_concepts: PerfusionPipeline, model_files: ModelFiles
) -> None:
    expected = generate(with_concepts, [PROMPT, CAT])
    config = OmegaConf.load(model_files.config)
    model = instantiate_from_config(config.model).train()
    assert any(parameter.requires_grad for parameter in model.parameters())
    modes = {name: module.training for name, module in model.named_modules()}
    previews = PerfusionPipeline(model, config)
    previews.load_concepts(model_files.teddy, model_files.mug)
    assert max_difference(generate(previews, [PROMPT, CAT]), expected) <= ROUNDING
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    loss = model.apply_model(torch.zeros(1, 4, 8, 8), torch.tensor([3]), model.get_learned_conditioning([CAT])).sum()
    loss.backward()  # gradients still reach the U-Net
    assert any(parameter.grad is not None for parameter in model.model.parameters())


def test_without_a_config_the_models_own_size_is_generated(shared_model: Any, pipeline: PerfusionPipeline) -> None:
    unknown = PerfusionPipeline(shared_model)
    assert max_difference(generate(unknown), generate(pipeline)) == 0
    with pytest.raises(ValueError, match="without the model's config"):
        generate(unknown, height=32)


def test_concepts_never_change_the_model(with_concepts: PerfusionPipeline) -> None:
    before = {name: tensor.clone() for name, tensor in with_concepts.model.state_dict().items()}
    generate(with_concepts, BOTH, bias=0.1)
    after = with_concepts.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
