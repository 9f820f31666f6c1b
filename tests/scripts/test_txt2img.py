"""The drawing script as a user runs it, on a tiny model: few times as a process, otherwise in this one to save time."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import (
    PROMPT,
    QUICK,
    ROOT,
    ROUNDING,
    Generate,
    Main,
    ModelFiles,
    error_line,
    image_paths,
    load_main,
    max_difference,
    read_pixels,
    run_script,
)
from omegaconf import OmegaConf
from PIL import Image

from ldm.common.errors import UserError
from ldm.concepts.concept import load_perfusion_concepts, save_perfusion_concepts
from ldm.inference import sampling as inference
from ldm.inference.output_folder import Album, read_note
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.util import instantiate_from_config

SCRIPT = ROOT / "scripts" / "txt2img.py"


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("txt2img")


def test_as_a_process_it_draws_the_same_again_and_says_where(generate: Generate, model_files: ModelFiles, tmp_path: Path) -> None:
    arguments = ("--config", model_files.config, "--concept", model_files.teddy, model_files.mug, "--prompt", PROMPT, "a <mug>",
                 "--n_samples", 2, "--seed", 5, "--bias", 0.7, "--temperature", 0.15, 0.2, *QUICK)
    result = run_script("txt2img", *arguments, "--outdir", tmp_path / "out", cache=model_files.folder / "cache")
    assert result.returncode == 0, result.stderr
    written = image_paths(tmp_path / "out")
    assert [path.name for path in written] == [f"0000{number}.png" for number in range(4)]
    assert f"4 pictures: {written[0]} to 00003.png" in result.stdout
    assert f"{tmp_path / 'out' / 'grid-0000.png'}" in result.stdout
    assert f"<mug>: the mug of {model_files.mug}, bias 0.7, temperature 0.2\n" in result.stderr
    assert read_note(written[1])["prompt"] == PROMPT and read_note(written[3])["seed"] == 6
    assert [c["temperature"] for c in read_note(written[0])["concepts"]] == [0.15, 0.2]
    first = np.stack([read_pixels(path) for path in written])
    again = generate(*arguments)
    assert np.array_equal(first, again)
    assert len(image_paths(tmp_path / "out")) == 8 and (tmp_path / "out" / "grid-0001.png").is_file()
    assert max_difference(first[0], first[1]) > 20 and max_difference(first[0], first[2]) > 20


def test_a_picture_depends_on_its_own_seed_only(generate: Generate) -> None:
    four = generate("--prompt", "a cat", "a dog", "--n_samples", 4, "--seed", 3)
    assert max_difference(four[:4], generate("--prompt", "a cat", "--n_iter", 2, "--n_samples", 2, "--seed", 3)) <= ROUNDING
    assert max_difference(four[6:7], generate("--prompt", "a dog", "--n_samples", 1, "--seed", 5)) <= ROUNDING
    assert max_difference(four, generate("--prompt", "a cat", "a dog", "--seed", 3, "--batch_size", 3)) <= ROUNDING
    assert max_difference(four[:4], four[4:]) > 20


def test_a_concept_changes_what_its_word_draws_and_settings_change_it(generate: Generate, model_files: ModelFiles) -> None:
    concept = ("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1)
    local = generate(*concept)
    assert max_difference(local, generate("--prompt", "a photo of a teddy outside", "--n_samples", 1)) > 20
    for setting in (("--bias", 1.5), ("--temperature", 1.0), ("--global_locking",), ("--scale", 5),
                    ("--negative_prompt", "a mug"), ("--ddim_eta", 1)):
        assert max_difference(local, generate(*concept, *setting)) > ROUNDING, setting


def test_a_concept_is_drawn_with_its_own_layers_or_with_all(generate: Generate, model_files: ModelFiles, tmp_path: Path) -> None:
    (concept,) = load_perfusion_concepts(model_files.teddy)
    some = save_perfusion_concepts(tmp_path / "some.safetensors",
                         [replace(concept, used_layers=list(concept.target_output_v)[-1:])], None)
    arguments = ("--prompt", PROMPT, "--n_samples", 1, "--concept")
    every, few = generate(*arguments, model_files.teddy), generate(*arguments, some, outdir="few")
    assert read_note(image_paths(tmp_path / "few")[0])["concepts"][0]["used_layers"] == list(concept.target_output_v)[-1:]
    assert max_difference(every, few) > ROUNDING
    assert max_difference(every, generate(*arguments, some, "--all_layers")) <= ROUNDING


def test_a_picture_depends_on_the_concepts_that_it_names_only(generate: Generate, model_files: ModelFiles) -> None:
    both = ("--concept", model_files.teddy, "--embedding_path", model_files.mug)
    batch = generate(*both, "--prompt", "a <mug> outside", PROMPT, "a cat", "--n_samples", 1, "--batch_size", 3)
    alone = [generate("--concept", model_files.mug, "--prompt", "a <mug> outside", "--n_samples", 1),
             generate("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1),
             generate("--prompt", "a cat", "--n_samples", 1)]
    assert all(max_difference(ours, theirs[0]) <= ROUNDING for ours, theirs in zip(batch, alone, strict=True))
    named = generate(*both, "--prompt", PROMPT, "--negative_prompt", "a <mug>", "--n_samples", 1)
    assert max_difference(named[0], generate("--concept", model_files.teddy, "--prompt", PROMPT, "--negative_prompt", "a mug",
                                "--n_samples", 1)[0]) > ROUNDING


def test_every_sampler_draws_and_its_name_and_eta_are_kept_in_the_picture(generate: Generate, tmp_path: Path) -> None:
    drawn = {name: generate("--prompt", "a cat", "--n_samples", 1, "--sampler", name, "--steps", 12, outdir=name)
             for name in SAMPLERS}
    notes = [read_note(image_paths(tmp_path / name)[0]) for name in SAMPLERS]
    assert [note["sampler"] for note in notes] == list(SAMPLERS)
    assert [note["ddim_eta"] for note in notes] == [0, 0, 0, 0, 0, 1] and notes[0]["ddim_steps"] == 12
    names = list(SAMPLERS)
    assert all(max_difference(drawn[one], drawn[other]) > 0 for one in names for other in names[:names.index(one)])
    assert max_difference(drawn["plms"], generate("--prompt", "a cat", "--n_samples", 1, "--plms", "--ddim_steps", 12)) == 0


def test_negative_prompts_are_for_all_prompts_or_one_for_each(generate: Generate, tmp_path: Path) -> None:
    both = ("--prompt", "a cat", "a dog", "--n_samples", 1)
    first = generate(*both, "--negative_prompt", "a mug", outdir="first")
    assert max_difference(first[:1], generate(*both, "--negative_prompt", "a mug", "a hat")[:1]) <= ROUNDING
    own = generate(*both, "--negative_prompt", "a mug", "a hat", outdir="own")
    assert max_difference(first[1], own[1]) > ROUNDING
    assert [read_note(path)["negative_prompt"] for path in image_paths(tmp_path / "own")] == ["a mug", "a hat"]


def test_pictures_are_made_from_an_original(model_files: ModelFiles) -> None:
    """Its masked part stays, and little strength changes little; what img2img and inpainting build on."""
    model = instantiate_from_config(OmegaConf.load(model_files.config).model).eval()
    encoded = inference.encode_once(inference.prompt_encoder(model, []), ["a cat", "a dog"])
    jobs = [inference.Job("a cat", seed, "a dog") for seed in (1, 2)]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for sampler in ("ddim", "heun"):
        sampling = inference.Sampling((8, 8), 10, scale=2.0, sampler=sampler)
        near, far, kept = (
            inference.draw_latents(model, encoded, jobs, sampling, inference.Original(latents, *how))
            for how in ((0.1,), (0.8,), (1.0, mask)))
        assert (near - latents).abs().mean() < (far - latents).abs().mean()
        assert torch.equal(kept[..., :4], latents[..., :4].expand(2, -1, -1, -1))
        assert (near[0] - near[1]).abs().max() > 0.01
    sampling = inference.Sampling((8, 8), 10, batch_size=1)
    assert len(list(inference.draw_pictures(model, encoded, jobs, sampling, inference.Original(latents, 0.3)))) == 2


def test_the_base_models_picture_is_the_samplers_own(generate: Generate, model_files: ModelFiles) -> None:
    config = OmegaConf.load(model_files.config)
    model = instantiate_from_config(config.model).eval()
    generator = torch.Generator().manual_seed(9)
    latents, _ = DDIMSampler(model).sample(
        3, 1, (4, 8, 12), model.cond_stage_model(["a cat"]), verbose=False, generators=[generator],
        unconditional_guidance_scale=2.0, unconditional_conditioning=model.cond_stage_model([""]))
    expected = model.decode_first_stage(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().movedim(0, -1).numpy()
    drawn = generate("--prompt", "a cat", "--n_samples", 1, "--seed", 9, "--H", 16, "--W", 24)
    assert drawn.shape == (1, 16, 24, 3) and expected.std() > 20
    assert max_difference(drawn[0], expected) <= ROUNDING
    assert max_difference(drawn, generate("--prompt", "a cat", "--n_samples", 1, "--seed", 9, "--W", 24, "--precision", "autocast",
                             "--ckpt", model_files.checkpoint)) <= 25


def test_equal_words_are_renamed_and_prompts_come_from_a_file(
    generate: Generate, model_files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa <teddy>\n\n  a <teddy-2> \n", encoding="utf8")
    caplog.set_level("INFO")
    both = generate("--concept", model_files.teddy, "--concept", model_files.teddy, "--from-file", tmp_path / "prompts.txt",
                "--n_samples", 1)
    assert len(both) == 2 and max_difference(both[:1], both[1:]) <= 2 * ROUNDING  # the same concept under two names
    assert f"<teddy-2> stands for the <teddy> of {model_files.teddy}\n" in caplog.text
    assert f"<teddy-2>: the teddy bear of {model_files.teddy}, bias 0.75" in caplog.text
    assert [read_note(path)["prompt"] for path in image_paths(tmp_path / "out")] == ["a <teddy>", "a <teddy-2>"]
    generate("--concept", model_files.teddy, "--prompt", "a cat", "--n_samples", 1)
    assert "<teddy> is loaded, but its word does not stand in the prompt" in caplog.text


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("--n_samples", "0"), "--n_samples: 0: must be 1 or more"),
    (("--n_samples", "two"), "'two' is no whole number"),
    (("--seed", "-1"), "-1: must be 0 or more"),
    (("--scale", "nan"), "nan: must be at least 0"),
    (("--ddim_eta", "1.5"), "must be at least 0 and at most 1"),
    (("--ddim_steps", "101"), "101 sampling steps: this model has 100"),
    (("--H", "30"), "height 30: this model draws multiples of 4 pixels; the nearest is 32"),
    (("--W", "2"), "width 2: .* the nearest is 4"),
    (("--concept", "{model_files}/teddy.safetensors", "--temperature", "0"), "0: must be above 0"),
    (("--concept", "{model_files}/teddy.safetensors", "--bias", "0.5", "0.6"), "2 values of bias for 1 concepts"),
    (("--concept", "{model_files}/base.safetensors"), "not a concept"),
    (("--concept", "{model_files}/foreign.safetensors"), "was trained on base model 000000000000"),
    (("--bias", "0.7"), "--bias acts on learned concepts; .*--concept"),
    (("--plms", "--ddim_eta", "0.5"), "PLMS adds no noise"),
    (("--sampler", "heun", "--ddim_eta", "0.5"), "Heun adds no noise, so eta must be 0, not 0.5"),
    (("--all_layers",), "--all_layers acts on learned concepts; .*--concept"),
    (("--sampler", "ddpm"), "--sampler: invalid choice: 'ddpm'"),
    (("--sampler", "dpm", "--plms"), "--plms: not allowed with argument --sampler"),
    (("--steps", "0"), "0: must be 1 or more"),
    (("--prompt", "a dog", "--negative_prompt", "a", "b", "c"), "3 of them for 2 prompts; give one for all"),
    (("--scale", "1", "--negative_prompt", "ugly"), "--scale 1 is none"),
    (("--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
    (("--config", "{model_files}/text/config.json"), "describes no model"),
    (("--config", "{model_files}/base.safetensors"), "not readable as a config"),
    (("--ckpt", "nowhere.ckpt"), "--ckpt nowhere.ckpt: no such file"),
    (("--ckpt", "{model_files}/teddy.safetensors"), "does not fit this config"),
    (("--outdir", "{model_files}/base.yaml"), "base.yaml is no folder"),
    (("--from-file", "nowhere.txt"), "nowhere.txt: no such file"),
    (("--device", "abacus"), "no such device"),
    (("--prompt", "a <mug>"), "names <mug>, but no loaded concept .*--concept"),
    (("--negative_prompt", "<mug>"), "names <mug>"),
    (("--prompt", "word " * 15), "15 tokens, but the text encoder takes 14"),
    (("--prompts", "typo"), "unrecognized arguments: --prompts"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0])[-40:] for mistake in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(
    main: Main, model_files: ModelFiles, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ("--prompt", "a cat", "--config", str(model_files.config), "--outdir", str(tmp_path / "out"), *QUICK)
    error = error_line(main, [*base, *(argument.format(model_files=model_files.folder) for argument in arguments)], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_help_and_typing_mistakes_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = f"""if True:
        import runpy, sys
        sys.argv = ["txt2img.py", *sys.argv[1:]]
        try: runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        finally: assert "torch" not in sys.modules"""
    for arguments, status, said in ((["--help"], 0, "--global_locking"), (["--n_iter", "0"], 2, "must be 1 or more"),
                                    ([], 2, "nothing to draw")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                              cwd=ROOT)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        assert said in done.stdout + done.stderr


def test_sheets_of_an_album_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.inference.output_folder.ROWS", 2)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00041.png").touch()
    (tmp_path / "samples" / "mine.png").touch()
    album = Album(tmp_path, columns=2)
    for number in range(5):
        album.add(Image.new("RGB", (16, 16)), "a prompt", {"number": number, "word": "<émile>"})
    album.finish_sheet()
    album.finish_sheet()
    assert [path.name for path in album.pictures] == [f"000{number}.png" for number in range(42, 47)]
    assert [path.name for path in album.sheets] == ["grid-0000.png", "grid-0001.png"]
    assert read_note(album.pictures[4]) == {"number": 4, "word": "<émile>"}
    assert json.loads(Image.open(album.pictures[0]).text["perfusion"])["number"] == 0


def test_models_without_prompts_are_refused(model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.load(model_files.config)
    monkeypatch.setattr(inference, "load_model", lambda *_: torch.nn.Identity())
    with pytest.raises(UserError, match="LatentDiffusion of this config reads no prompts"):
        inference.load_base(config, None, "cpu")
