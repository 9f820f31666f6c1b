"""bias="auto": the rule on curves with known answers, the sweep against the evaluation's meter, and the scripts."""
from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import (
    PROMPT,
    WIDTH,
    Generate,
    ModelFiles,
    error_line,
    image_paths,
    load_main,
    script_generator,
)
from helpers.tiny_clips import write_clip
from omegaconf import OmegaConf
from PIL import Image

from evaluation.metrics.similarity import ImageBatch, References, image_similarity, text_similarity
from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import read_concepts, save_concepts
from ldm.data.images import to_tensor
from ldm.inference import auto_bias
from ldm.inference.auto_bias import (
    REFERENCE_SEEDS,
    SEEDS,
    BiasFinder,
    BiasTrial,
    balanced,
    clip_for,
    describe_choice,
    flat_measures,
    prompts_about,
)
from ldm.inference.model_config import InferenceDefaults, inference_defaults, model_setting
from ldm.inference.output_folder import read_metadata
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import requests_for
from ldm.inference.settings import GenerationSettings
from ldm.models.clip_encoder import ClipEncoder

BIASES = (0.4, 0.6, 0.8, 1.0)
NOISE = np.array([-1.0, 1.0, 0.0, 3.0])  # of each prompt, the same at all biases


def curve(texts: Sequence[float], likenesses: Sequence[float], noise: float = 1.0) -> list[BiasTrial]:
    """Return one trial per bias with these means, and fixed noise on each prompt."""
    return [BiasTrial(bias, text + noise * NOISE, likeness - noise * NOISE)
            for bias, text, likeness in zip(BIASES, texts, likenesses, strict=True)]


def concept(placeholder: str, super_category: str, bias: float = 0.75) -> Concept:
    """Return a concept of which only the words and the bias matter."""
    return Concept(placeholder, super_category, torch.zeros(1, 2), torch.zeros(2), torch.zeros(2), {}, bias=bias)


def as_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.stack([to_tensor(image) for image in images])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep two biases and the concept's own, with one seed and two steps."""
    monkeypatch.setattr(auto_bias, "BIASES", (0.5, 2.0))
    monkeypatch.setattr(auto_bias, "GLOBAL_BIASES", (0.3, 2.0))
    monkeypatch.setattr(auto_bias, "SEEDS", range(1))
    monkeypatch.setattr(auto_bias, "REFERENCE_SEEDS", range(1, 2))
    monkeypatch.setattr(auto_bias, "STEPS", 2)


@pytest.fixture
def generate(model_files: ModelFiles, tmp_path: Path) -> Generate:
    return script_generator(load_main("txt2img"), model_files.config, tmp_path)


@pytest.mark.parametrize(("texts", "likenesses", "bias"), [
    # text rescaled: 0, 1/2, 3/4, 1; likeness: 1, 1/2, 1/4, 0; harmonic means: 0, 1/2, 3/8, 0
    ([20, 30, 35, 40], [90, 70, 60, 50], 0.6),
    # text: 0, 1/4, 1/2, 1; likeness: 1, 3/4, 3/4, 0; harmonic means: 0, 3/8, 3/5, 0
    ([20, 30, 40, 60], [90, 70, 70, 10], 0.8),
    ([20, 30, 40, 60], [0.9, 0.7, 0.7, 0.1], 0.8),  # likeness is flat: the bias closest to the concept's own
    ([20, 20.3, 20.6, 20.9], [70, 90, 80, 50], 0.6),  # text is flat: the most likeness
    ([20, 20.3, 20.6, 20.9], [90, 90, 89.5, 50], 0.8),  # almost the most likeness, and closest to the concept's own
    ([20] * 4, [50] * 4, 0.8)])
def test_the_balanced_bias_of_known_curves(texts: list[float], likenesses: list[float], bias: float) -> None:
    trials = curve(texts, likenesses)
    assert balanced(trials, own_bias=0.75).bias == balanced(trials[::-1], own_bias=0.75).bias == bias


def test_a_change_within_its_standard_error_is_flat() -> None:
    """Likeness ends 5 lower, but not in every prompt: twice its paired standard error is larger."""
    trials = curve([20, 30, 40, 60], [90, 88, 86, 85])
    assert balanced(trials, own_bias=0.4).bias == 0.6
    noisy = replace(trials[3], likenesses=trials[3].likenesses + np.array([-20.0, 20.0, 12.0, -12.0]))
    assert balanced([*trials[:3], noisy], own_bias=0.4).bias == 0.4


def test_noise_alone_is_rarely_taken_for_a_change() -> None:
    """A t distribution with 3 degrees of freedom exceeds 2 in 7 of 100 cases."""
    rng, changes = np.random.default_rng(0), 0
    for _ in range(300):
        trials = [BiasTrial(bias, *rng.normal(0, 20, (2, 4))) for bias in BIASES]
        changes += 2 - len(flat_measures(trials))
    assert changes / 600 < 0.1


def test_a_change_in_the_wrong_direction_is_flat() -> None:
    assert flat_measures(curve([40, 35, 30, 20], [50, 60, 70, 90])) == ["text", "likeness"]
    assert flat_measures(curve([20, 30, 35, 40], [90, 70, 60, 50])) == []
    assert flat_measures(curve([20, 60, 60, 20], [90, 50, 50, 90])) == ["text", "likeness"]  # the ends are equal


def test_all_images_of_a_prompt_count_as_one_sample() -> None:
    """Two prompts that change in opposite directions show nothing, however many images each of them has."""
    low, high = np.zeros(40), np.repeat([12.0, -8.0], 20)
    trials = [BiasTrial.of_images(bias, values, -values, prompts=2) for bias, values in ((0.4, low), (1.0, high))]
    assert trials[1].texts.tolist() == [12.0, -8.0] and trials[1].text == 2.0
    assert flat_measures(trials) == ["text", "likeness"]
    forty_prompts = [BiasTrial.of_images(bias, values, -values, prompts=40)
                     for bias, values in ((0.4, low), (1.0, high + 3))]
    assert flat_measures(forty_prompts) == []


def test_the_choice_is_described_in_one_line() -> None:
    toy = concept("<toy>", "mug")
    trials = curve([20, 30, 35, 40], [90, 70, 60, 50], noise=0)
    expected = "bias of <toy>: 0.6 (text 30.0, likeness 70.0; tried 0.4 to 1)"
    assert describe_choice(toy, trials[1], trials) == expected
    flat = curve([20] * 4, [50] * 4, noise=0)
    assert describe_choice(toy, flat[0], flat).endswith(
        "tried 0.4 to 1; text and likeness hardly change, so it keeps its own)")
    flat_text = curve([20] * 4, [90, 70, 60, 50])
    assert describe_choice(toy, trials[0], flat_text).endswith("; text hardly changes)")


def test_the_sweep_uses_the_first_prompts_that_name_the_concept() -> None:
    toy, cup = concept("<toy>", "owl"), concept("<cup>", "mug")
    given = ["a cat", "a <cup> next to a <Toy>", "a <cup>", "a <cup>", "a <toy> outside", "a <toy> inside"]
    backgrounds = ("", " on the beach", " in the snow", " in a garden")
    neutral = [f"a photo of a <cup>{background}" for background in backgrounds]
    assert prompts_about(toy, [toy, cup], given)[:3] == ["a mug next to a <Toy>", "a <toy> outside", "a <toy> inside"]
    assert prompts_about(toy, [toy, cup], given * 2)[3:] == ["a photo of a <toy>"]
    assert prompts_about(cup, [toy, cup], given) == ["a <cup> next to an owl", "a <cup>", *neutral[:2]]
    assert prompts_about(cup, [cup], ["a <cup>"]) == ["a <cup>", *neutral[:3]]
    assert prompts_about(cup, [cup], []) == neutral
    assert len(prompts_about(cup, [cup], [f"a <cup> {number}" for number in range(9)])) == 4


def test_a_placeholder_that_contains_another_is_a_word_of_its_own() -> None:
    toy, bear = concept("sks", "owl"), concept("sks-2", "teddy bear")
    assert prompts_about(bear, [toy, bear], ["a sks-2 on a sks"])[0] == "a sks-2 on an owl"
    prompts = prompts_about(toy, [toy, bear], ["a sks-2", "a sks on a sks-2"])
    assert prompts[:2] == ["a sks on a teddy bear", "a photo of a sks"]


def test_the_clip_is_the_given_one_the_configs_or_the_one_beside_the_weights(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "evaluation_clip").mkdir(parents=True)
    unknown = InferenceDefaults()
    beside = str(tmp_path / "a" / "evaluation_clip")
    assert clip_for(None, unknown, tmp_path / "a" / "model.safetensors") == beside
    assert clip_for(None, unknown, str(tmp_path / "b" / "x.ckpt")) == str(tmp_path / "b" / "evaluation_clip")
    assert clip_for(None, InferenceDefaults(evaluation_clip=beside), tmp_path / "b" / "x.ckpt") == beside
    assert clip_for(str(tmp_path), InferenceDefaults(evaluation_clip=beside)) == str(tmp_path)
    assert clip_for("ViT-B-32/openai", unknown) == "ViT-B-32/openai"
    with pytest.raises(UserError, match="none at .*evaluation_clip; name a folder of one with --clip"):
        clip_for(None, unknown, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="there is none; name a folder"):
        clip_for(None, unknown)
    with pytest.raises(UserError, match="CLIP nowhere: no such folder"):
        clip_for("nowhere", unknown)


def test_the_clip_is_found_beside_the_checkpoint_that_a_config_names(tmp_path: Path) -> None:
    (tmp_path / "evaluation_clip").mkdir()
    config = OmegaConf.create({"model": {"params": {"ckpt_path": str(tmp_path / "model.safetensors")}}})
    checkpoint = model_setting(config, "params.ckpt_path")
    assert clip_for(None, inference_defaults(config), checkpoint) == str(tmp_path / "evaluation_clip")


@pytest.mark.slow
@pytest.mark.parametrize("with_photos", [True, False])
def test_the_sweep_measures_as_the_evaluation_does(
    with_photos: bool, model_files: ModelFiles, clip: Path, short_sweep: None
) -> None:
    (teddy,) = override_settings(read_concepts([model_files.teddy]), temperatures=[0.2])
    pipeline = PerfusionPipeline.from_config(model_files.config, device="cpu")
    pipeline.batch_size = 3
    encoder = ClipEncoder.from_path(clip)
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    photos = [Image.fromarray(pixels) for pixels in noise] if with_photos else None
    # Of these settings the sweep replaces the steps, the sampler and the size.
    settings = GenerationSettings(50, 2.0, "heun", height=32, width=16, global_locking=True)
    trials = BiasFinder(pipeline, encoder, settings, photos).sweep(teddy, [PROMPT])
    assert [trial.bias for trial in trials] == [0.3, 0.75, 2.0]

    settings = GenerationSettings(2, 2.0, auto_bias.SAMPLER, global_locking=True)

    def generated(prompt: str, seed: int, bias: float) -> list[Image.Image]:
        return list(pipeline.generate(requests_for([prompt], [seed]), replace(settings, bias=bias), [teddy]))

    references = photos or generated("a photo of a <teddy>", 1, bias=0.3)
    measured_against = References(encoder, as_batch(references), "teddy bear")
    for trial in trials:
        images = as_batch(generated(PROMPT, 0, trial.bias))
        batch = ImageBatch(images, ["a photo of a teddy bear outside"], measured_against)
        assert [trial.text] == pytest.approx(text_similarity(batch), abs=0.02)
        assert [trial.likeness] == pytest.approx(image_similarity(batch), abs=0.02)


def test_references_start_from_other_noise_than_the_images() -> None:
    assert not set(SEEDS) & set(REFERENCE_SEEDS)


@pytest.mark.slow
def test_the_script_reports_the_biases_that_it_finds_and_writes_them_to_the_images(
    generate: Generate, model_files: ModelFiles, clip: Path, short_sweep: None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    arguments = ("--concept", model_files.teddy, model_files.mug, "--prompt", "a <teddy> next to a <mug>",
                 "--n_samples", 1)
    first = generate(*arguments, "--bias", "auto", "--clip", clip)
    lines = [line for line in caplog.messages if line.startswith("bias of")]
    assert [line.split(":")[0] for line in lines] == ["bias of <teddy>", "bias of <mug>"]
    biases = [concept["bias"] for concept in read_metadata(image_paths(tmp_path / "out")[0])["concepts"]]
    assert lines[0].startswith(f"bias of <teddy>: {biases[0]:g} (text ") and "tried 0.5 to 2" in lines[0]
    assert np.array_equal(first, generate(*arguments, "--bias", *biases))


@pytest.mark.slow
def test_one_bias_may_be_given_and_the_other_found_with_photos(
    generate: Generate, model_files: ModelFiles, clip: Path, short_sweep: None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (24, 20), "red").save(tmp_path / "photos" / "0.png")
    generate("--concept", model_files.teddy, model_files.mug, "--prompt", PROMPT, "--n_samples", 1, "--bias", 0.6,
             "auto", "--clip", clip, "--photos", tmp_path / "photos")
    found = [line.split(":")[0] for line in caplog.messages if line.startswith("bias of")]
    assert found == ["bias of <mug>"]
    assert read_metadata(image_paths(tmp_path / "out")[0])["concepts"][0]["bias"] == 0.6


@pytest.mark.slow
@pytest.mark.parametrize("script", ["img2img", "inpaint"])
def test_the_other_scripts_find_biases_too(
    script: str, model_files: ModelFiles, short_sweep: None, tmp_path: Path
) -> None:
    shutil.copy(model_files.checkpoint, tmp_path)
    write_clip(tmp_path / "evaluation_clip")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    mask = ("--mask", tmp_path / "mask.png") if script == "inpaint" else ()
    run = script_generator(load_main(script), model_files.config, tmp_path)
    run("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1, "--init-img", tmp_path / "start.png",
        *mask, "--bias", "auto", "--ckpt", tmp_path / model_files.checkpoint.name)
    assert read_metadata(image_paths(tmp_path / "out")[0])["concepts"][0]["bias"] in (0.5, 0.75, 2.0)


@pytest.mark.parametrize(("arguments", "message"), [
    ("--bias auto", "--bias acts on learned concepts"),
    ("--bias automatic --concept {teddy}", "'automatic' is not a number"),
    ("--bias auto --concept {teddy}", "and there is none at {folder}/evaluation_clip; name a folder of one"),
    ("--bias auto --concept {teddy} --clip nowhere", "CLIP nowhere: no such folder"),
    ("--bias auto --concept {teddy} --photos nowhere", "--photos nowhere: no such folder"),
    ("--bias auto --concept {toy}", "--bias: concept <toy> ({toy}) was learned by Textual Inversion and has none"),
    ("--bias auto auto auto --concept {teddy} {mug}", "3 values of bias for 2 concepts"),
    ("--bias auto --concept {teddy} {mug} --photos {folder}", "can be of one concept only, and --bias auto is for 2"),
    ("--bias 0.5 --concept {teddy} --clip {folder}", "--clip requires --bias auto"),
    ("--concept {teddy} --photos {folder}", "--photos requires --bias auto")])
def test_what_cannot_be_balanced_is_refused_in_one_line(
    arguments: str, message: str, model_files: ModelFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"teddy": model_files.teddy, "mug": model_files.mug, "folder": model_files.folder,
             "toy": tmp_path / "toy.safetensors"}
    save_concepts(names["toy"], [FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, WIDTH))])
    given = [word.format(**names) for word in arguments.split()]
    base = ["--config", str(model_files.config), "--prompt", "a cat", "--outdir", str(tmp_path / "out"), "--device",
            "cpu"]
    error = error_line(load_main("txt2img"), [*base, *given], capsys)
    assert message.format(**names) in error and not (tmp_path / "out").exists()
