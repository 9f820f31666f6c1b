"""--bias auto: the rule on curves with known answers, the sweep against the evaluation's own meter, and the scripts."""
from __future__ import annotations

import logging
import shutil
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

from evaluation.metrics.similarity import SimilarityMeter
from evaluation.sweeps.samples import Manner, Painter, as_batch, jobs_of
from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import FinetunedConcept, save_concepts
from ldm.inference import auto_bias
from ldm.inference.auto_bias import (
    REFERENCE_SEEDS,
    SEEDS,
    BiasFinder,
    Tried,
    about,
    balanced,
    clip_for,
    flat_measures,
    said,
)
from ldm.inference.output_folder import read_note
from ldm.inference.sampling import Sampling, latent_size, ready_concepts
from ldm.models.clip_encoder import ClipEncoder

BIASES = (0.4, 0.6, 0.8, 1.0)
NOISE = np.array([-1.0, 1.0, 0.0, 3.0])  # of single prompts, the same at all biases


def curve(texts: list[float], likenesses: list[float], noise: float = 1.0) -> list[Tried]:
    return [Tried(bias, text + noise * NOISE, likeness - noise * NOISE)
            for bias, text, likeness in zip(BIASES, texts, likenesses, strict=True)]


def concept(placeholder: str, super_category: str, bias: float = 0.75) -> Concept:
    return Concept(placeholder, super_category, torch.zeros(1, 2), torch.zeros(2), torch.zeros(2), {}, bias=bias)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over two biases, and the concept's own, of a seed each."""
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
    ([20, 30, 40, 60], [0.9, 0.7, 0.7, 0.1], 0.8),  # likeness is flat: what is closest to the usual bias
    ([20, 20.3, 20.6, 20.9], [70, 90, 80, 50], 0.6),  # text is flat: the most likeness
    ([20, 20.3, 20.6, 20.9], [90, 90, 89.5, 50], 0.8),  # or hardly less, and closest to the usual bias
    ([20] * 4, [50] * 4, 0.8)])
def test_the_balance_of_known_curves(texts: list[float], likenesses: list[float], bias: float) -> None:
    tried = curve(texts, likenesses)
    assert balanced(tried, usual=0.75).bias == balanced(tried[::-1], usual=0.75).bias == bias


def test_what_chance_would_do_is_no_difference() -> None:
    """Likeness ends 5 lower, but not in every prompt: its paired standard error is above half of that."""
    tried = curve([20, 30, 40, 60], [90, 88, 86, 85])
    assert balanced(tried, usual=0.4).bias == 0.6
    shaken = [*tried[:3], replace(tried[3], likenesses=tried[3].likenesses + np.array([-20.0, 20.0, 12.0, -12.0]))]
    assert balanced(shaken, usual=0.4).bias == 0.4


def test_noise_alone_seldom_passes_for_a_change() -> None:
    """Of curves that are nothing but noise a few in a hundred are told from flat ones; by a t distribution of 3 degrees
    of freedom 7 in 100 are above 2."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(300):
        tried = [Tried(bias, *rng.normal(0, 20, (2, 4))) for bias in BIASES]
        passed += 2 - len(flat_measures(tried))
    assert passed / 600 < 0.1


def test_changes_the_wrong_way_are_none() -> None:
    assert flat_measures(curve([40, 35, 30, 20], [50, 60, 70, 90])) == ["text", "likeness"]
    assert flat_measures(curve([20, 30, 35, 40], [90, 70, 60, 50])) == []
    assert flat_measures(curve([20, 60, 60, 20], [90, 50, 50, 90])) == ["text", "likeness"]  # the ends are the same


def test_pictures_of_a_prompt_count_as_one() -> None:
    """Two prompts that go opposite ways say nothing, however many pictures of each there are."""
    low, high = np.zeros(40), np.repeat([12.0, -8.0], 20)
    tried = [Tried.of_pictures(bias, values, -values, prompts=2) for bias, values in ((0.4, low), (1.0, high))]
    assert tried[1].texts.tolist() == [12.0, -8.0] and tried[1].text == 2.0
    assert flat_measures(tried) == ["text", "likeness"]
    alone = [Tried.of_pictures(bias, values, -values, prompts=40) for bias, values in ((0.4, low), (1.0, high + 3))]
    assert flat_measures(alone) == []


def test_the_choice_is_said_in_one_line() -> None:
    toy = concept("<toy>", "mug")
    tried = curve([20, 30, 35, 40], [90, 70, 60, 50], noise=0)
    assert said(toy, tried[1], tried) == "bias of <toy>: 0.6 (text 30.0, likeness 70.0; tried 0.4 to 1)"
    flat = curve([20] * 4, [50] * 4, noise=0)
    assert said(toy, flat[0], flat).endswith("tried 0.4 to 1; text and likeness hardly change, so it keeps its own)")
    assert said(toy, tried[0], curve([20] * 4, [90, 70, 60, 50])).endswith("; text hardly changes)")


def test_a_concept_is_drawn_alone_in_the_first_prompts_that_name_it() -> None:
    toy, cup = concept("<toy>", "owl"), concept("<cup>", "mug")
    given = ["a cat", "a <cup> next to a <Toy>", "a <cup>", "a <cup>", "a <toy> outside", "a <toy> inside"]
    plain = [f"a photo of a <cup>{where}" for where in ("", " on the beach", " in the snow", " in a garden")]
    assert about(toy, [toy, cup], given)[:3] == ["a mug next to a <Toy>", "a <toy> outside", "a <toy> inside"]
    assert about(toy, [toy, cup], given * 2)[3:] == ["a photo of a <toy>"]
    assert about(cup, [toy, cup], given) == ["a <cup> next to an owl", "a <cup>", *plain[:2]]
    assert about(cup, [cup], ["a <cup>"]) == ["a <cup>", *plain[:3]]
    assert about(cup, [cup], []) == plain
    assert len(about(cup, [cup], [f"a <cup> {number}" for number in range(9)])) == 4


def test_placeholders_that_contain_each_other_are_told_apart() -> None:
    toy, bear = concept("sks", "owl"), concept("sks-2", "teddy bear")
    assert about(bear, [toy, bear], ["a sks-2 on a sks"])[0] == "a sks-2 on an owl"
    assert about(toy, [toy, bear], ["a sks-2", "a sks on a sks-2"])[:2] == ["a sks on a teddy bear", "a photo of a sks"]


def test_the_usual_clip_lies_beside_the_base_model(tmp_path: Path) -> None:
    config = OmegaConf.create({"model": {"params": {"ckpt_path": str(tmp_path / "a" / "model.safetensors")}}})
    for folder in ("a", "b"):
        (tmp_path / folder / "evaluation_clip").mkdir(parents=True)
    assert clip_for(None, config, None) == str(tmp_path / "a" / "evaluation_clip")
    assert clip_for(None, config, tmp_path / "b" / "x.ckpt") == str(tmp_path / "b" / "evaluation_clip")
    assert clip_for(str(tmp_path), config, None) == str(tmp_path) and clip_for("ViT-B-32/openai", config, None)
    with pytest.raises(UserError, match="none at .*evaluation_clip; name a folder of one with --clip"):
        clip_for(None, config, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="there is none; name a folder"):
        clip_for(None, OmegaConf.create({"model": {}}), None)
    with pytest.raises(UserError, match="CLIP nowhere: no such folder"):
        clip_for("nowhere", config, None)


@pytest.mark.parametrize("with_photos", [True, False])
def test_the_sweep_measures_as_the_evaluation_does(with_photos: bool, model_files: ModelFiles, clip: Path, quick: None) -> None:
    (teddy,) = ready_concepts([model_files.teddy], temperatures=[0.2])
    painter, eyes = Painter.load(model_files.config, device="cpu"), ClipEncoder.from_path(clip)
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    photos = [Image.fromarray(one) for one in noise] if with_photos else None
    quick_ones = Sampling(latent_size(painter.config, 32, 16), steps=50, scale=2.0, sampler="heun", batch_size=3)
    finder = BiasFinder(painter.model, painter.config, quick_ones, eyes, photos, global_locking=True)
    tried = finder.sweep(teddy, [PROMPT])
    assert [one.bias for one in tried] == [0.3, 0.75, 2.0]

    manner = Manner(scale=2.0, steps=2, sampler=auto_bias.SAMPLER, global_locking=True)
    alike = photos or painter.draw(jobs_of(["a photo of a <teddy>"], [1]), [teddy], replace(manner, bias=0.3))
    meter = SimilarityMeter(eyes, as_batch(alike), "teddy bear")
    for one in tried:
        drawn = painter.draw(jobs_of([PROMPT], [0]), [teddy], replace(manner, bias=one.bias))
        (found,) = meter(as_batch(drawn), ["a photo of a teddy bear outside"])
        assert (one.text, one.likeness) == pytest.approx((found.text, found.image), abs=0.02)


def test_no_picture_is_compared_with_its_own_noise() -> None:
    assert not set(SEEDS) & set(REFERENCE_SEEDS)


def test_the_script_finds_says_and_keeps_the_bias(generate: Generate, model_files: ModelFiles, clip: Path, quick: None, tmp_path: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked = ("--concept", model_files.teddy, model_files.mug, "--prompt", "a <teddy> next to a <mug>", "--n_samples", 1)
    first = generate(*asked, "--bias", "auto", "--clip", clip)
    lines = [line for line in caplog.messages if line.startswith("bias of")]
    assert [line.split(":")[0] for line in lines] == ["bias of <teddy>", "bias of <mug>"]
    biases = [concept["bias"] for concept in read_note(image_paths(tmp_path / "out")[0])["concepts"]]
    assert lines[0].startswith(f"bias of <teddy>: {biases[0]:g} (text ") and "tried 0.5 to 2" in lines[0]
    assert np.array_equal(first, generate(*asked, "--bias", *biases))


def test_one_bias_is_given_and_the_other_found_by_photos(generate: Generate, model_files: ModelFiles, clip: Path, quick: None,
                                                         tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (24, 20), "red").save(tmp_path / "photos" / "0.png")
    generate("--concept", model_files.teddy, model_files.mug, "--prompt", PROMPT, "--n_samples", 1, "--bias", 0.6, "auto", "--clip",
         clip, "--photos", tmp_path / "photos")
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("bias of")] == ["bias of <mug>"]
    assert read_note(image_paths(tmp_path / "out")[0])["concepts"][0]["bias"] == 0.6


@pytest.mark.parametrize("script", ["img2img", "inpaint"])
def test_the_other_scripts_know_it_too(script: str, model_files: ModelFiles, quick: None, tmp_path: Path) -> None:
    shutil.copy(model_files.checkpoint, tmp_path)
    write_clip(tmp_path / "evaluation_clip")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "start.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    mask = ("--mask", tmp_path / "mask.png") if script == "inpaint" else ()
    run = script_generator(load_main(script), model_files.config, tmp_path)
    run("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1, "--init-img", tmp_path / "start.png", *mask,
        "--bias", "auto", "--ckpt", tmp_path / model_files.checkpoint.name)
    assert read_note(image_paths(tmp_path / "out")[0])["concepts"][0]["bias"] in (0.5, 0.75, 2.0)


@pytest.mark.parametrize(("arguments", "message"), [
    ("--bias auto", "--bias acts on learned concepts"),
    ("--bias automatic --concept {teddy}", "'automatic' is no number"),
    ("--bias auto --concept {teddy}", "and there is none at {folder}/evaluation_clip; name a folder of one"),
    ("--bias auto --concept {teddy} --clip nowhere", "CLIP nowhere: no such folder"),
    ("--bias auto --concept {teddy} --photos nowhere", "--photos nowhere: no such folder"),
    ("--bias auto --concept {toy}", "--bias: concept <toy> ({toy}) was learned by Textual Inversion and has none"),
    ("--bias auto auto auto --concept {teddy} {mug}", "3 values of bias for 2 concepts"),
    ("--bias auto --concept {teddy} {mug} --photos {folder}", "can be of one concept only, and --bias auto is for 2"),
    ("--bias 0.5 --concept {teddy} --clip {folder}", "--clip goes with --bias auto"),
    ("--concept {teddy} --photos {folder}", "--photos goes with --bias auto")])
def test_what_cannot_be_balanced_is_refused_in_one_line(arguments: str, message: str, model_files: ModelFiles, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    names = {"teddy": model_files.teddy, "mug": model_files.mug, "folder": model_files.folder, "toy": tmp_path / "toy.safetensors"}
    save_concepts(names["toy"], [FinetunedConcept("textual-inversion", "<toy>", "mug", torch.zeros(1, WIDTH))])
    given = [word.format(**names) for word in arguments.split()]
    said_so = error_line(load_main("txt2img"), ["--config", str(model_files.config), "--prompt", "a cat", "--outdir",
                                             str(tmp_path / "out"), "--device", "cpu", *given], capsys)
    assert message.format(**names) in said_so and not (tmp_path / "out").exists()
