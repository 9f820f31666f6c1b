"""scripts/txt2img.py on a tiny model: a few times as a process, otherwise in this process to save time."""
from __future__ import annotations

import itertools
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

from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.inference.output_folder import read_metadata
from ldm.sampling.ddim import DDIM
from ldm.sampling.samplers import SAMPLERS
from ldm.util import instantiate_from_config


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("txt2img")


@pytest.mark.slow
def test_as_a_process_it_repeats_images_and_reports_their_files(
    generate: Generate, model_files: ModelFiles, tmp_path: Path
) -> None:
    arguments = ("--config", model_files.config, "--concept", model_files.teddy, model_files.mug, "--prompt", PROMPT,
                 "a <mug>", "--n_samples", 2, "--seed", 5, "--bias", 0.7, "--temperature", 0.15, 0.2, *QUICK)
    result = run_script("txt2img", *arguments, "--outdir", tmp_path / "out", cache=model_files.folder / "cache")
    assert result.returncode == 0, result.stderr
    written = image_paths(tmp_path / "out")
    assert [path.name for path in written] == [f"0000{number}.png" for number in range(4)]
    assert f"4 images: {written[0]} to 00003.png" in result.stdout
    assert f"{tmp_path / 'out' / 'grid-0000.png'}" in result.stdout
    assert f"<mug>: the mug of {model_files.mug}, bias 0.7, temperature 0.2\n" in result.stderr
    assert read_metadata(written[1])["prompt"] == PROMPT and read_metadata(written[3])["seed"] == 6
    assert [c["temperature"] for c in read_metadata(written[0])["concepts"]] == [0.15, 0.2]
    first = np.stack([read_pixels(path) for path in written])
    again = generate(*arguments)
    assert np.array_equal(first, again)
    assert len(image_paths(tmp_path / "out")) == 8 and (tmp_path / "out" / "grid-0001.png").is_file()
    assert max_difference(first[0], first[1]) > 20 and max_difference(first[0], first[2]) > 20


@pytest.mark.slow
def test_an_image_depends_on_its_own_seed_only(generate: Generate) -> None:
    four = generate("--prompt", "a cat", "a dog", "--n_samples", 4, "--seed", 3)
    iterated = generate("--prompt", "a cat", "--n_iter", 2, "--n_samples", 2, "--seed", 3)
    assert max_difference(four[:4], iterated) <= ROUNDING
    alone = generate("--prompt", "a dog", "--n_samples", 1, "--seed", 5)
    assert max_difference(four[6:7], alone) <= ROUNDING
    other_batches = generate("--prompt", "a cat", "a dog", "--seed", 3, "--batch_size", 3)
    assert max_difference(four, other_batches) <= ROUNDING
    assert max_difference(four[:4], four[4:]) > 20


@pytest.mark.slow
def test_a_concept_and_its_settings_change_the_image(generate: Generate, model_files: ModelFiles) -> None:
    concept = ("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1)
    local = generate(*concept)
    assert max_difference(local, generate("--prompt", "a photo of a teddy outside", "--n_samples", 1)) > 20
    for setting in (("--bias", 1.5), ("--temperature", 1.0), ("--global_locking",), ("--scale", 5),
                    ("--negative_prompt", "a mug"), ("--ddim_eta", 1)):
        assert max_difference(local, generate(*concept, *setting)) > ROUNDING, setting


@pytest.mark.slow
def test_a_concept_uses_its_own_layers_unless_all_are_requested(
    generate: Generate, model_files: ModelFiles, tmp_path: Path
) -> None:
    (concept,) = load_perfusion_concepts(model_files.teddy)
    last_layer = list(concept.target_outputs_v)[-1:]
    file = save_perfusion_concepts(tmp_path / "one_layer.safetensors", [replace(concept, used_layers=last_layer)], None)
    arguments = ("--prompt", PROMPT, "--n_samples", 1, "--concept")
    all_layers, one_layer = generate(*arguments, model_files.teddy), generate(*arguments, file, outdir="one")
    assert read_metadata(image_paths(tmp_path / "one")[0])["concepts"][0]["used_layers"] == last_layer
    assert max_difference(all_layers, one_layer) > ROUNDING
    assert max_difference(all_layers, generate(*arguments, file, "--all_layers")) <= ROUNDING


@pytest.mark.slow
def test_an_image_depends_only_on_the_concepts_that_its_prompts_name(
    generate: Generate, model_files: ModelFiles
) -> None:
    both = ("--concept", model_files.teddy, "--embedding_path", model_files.mug)
    batch = generate(*both, "--prompt", "a <mug> outside", PROMPT, "a cat", "--n_samples", 1, "--batch_size", 3)
    alone = [generate("--concept", model_files.mug, "--prompt", "a <mug> outside", "--n_samples", 1),
             generate("--concept", model_files.teddy, "--prompt", PROMPT, "--n_samples", 1),
             generate("--prompt", "a cat", "--n_samples", 1)]
    assert all(max_difference(ours, theirs[0]) <= ROUNDING for ours, theirs in zip(batch, alone, strict=True))
    with_concept = generate(*both, "--prompt", PROMPT, "--negative_prompt", "a <mug>", "--n_samples", 1)
    with_word = generate("--concept", model_files.teddy, "--prompt", PROMPT, "--negative_prompt", "a mug",
                         "--n_samples", 1)
    assert max_difference(with_concept[0], with_word[0]) > ROUNDING


@pytest.mark.slow
def test_every_sampler_generates_and_is_in_the_metadata(generate: Generate, tmp_path: Path) -> None:
    base = ("--prompt", "a cat", "--n_samples", 1)
    images = {name: generate(*base, "--sampler", name, "--steps", 12, outdir=name) for name in SAMPLERS}
    metadata = [read_metadata(image_paths(tmp_path / name)[0]) for name in SAMPLERS]
    assert [each["sampler"] for each in metadata] == list(SAMPLERS)
    assert [each["eta"] for each in metadata] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0.3]
    assert metadata[0]["num_inference_steps"] == 12
    for one, other in itertools.combinations(SAMPLERS, 2):
        assert max_difference(images[one], images[other]) > 0, (one, other)
    assert max_difference(images["plms"], generate(*base, "--plms", "--ddim_steps", 12)) == 0


@pytest.mark.slow
def test_negative_prompts_are_one_for_all_prompts_or_one_for_each(generate: Generate, tmp_path: Path) -> None:
    both = ("--prompt", "a cat", "a dog", "--n_samples", 1)
    first = generate(*both, "--negative_prompt", "a mug", outdir="first")
    assert max_difference(first[:1], generate(*both, "--negative_prompt", "a mug", "a hat")[:1]) <= ROUNDING
    own = generate(*both, "--negative_prompt", "a mug", "a hat", outdir="own")
    assert max_difference(first[1], own[1]) > ROUNDING
    assert [read_metadata(path)["negative_prompt"] for path in image_paths(tmp_path / "own")] == ["a mug", "a hat"]


@pytest.mark.slow
def test_an_image_of_the_base_model_equals_the_samplers_output(generate: Generate, model_files: ModelFiles) -> None:
    config = OmegaConf.load(model_files.config)
    model = instantiate_from_config(config.model).eval()
    generator = torch.Generator().manual_seed(9)
    latents, _ = DDIM(model).sample(
        3, 1, (4, 8, 12), model.cond_stage_model(["a cat"]), verbose=False, generators=[generator],
        unconditional_guidance_scale=2.0, unconditional_conditioning=model.cond_stage_model([""]))
    expected = model.decode_first_stage(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().movedim(0, -1).numpy()
    base = ("--prompt", "a cat", "--n_samples", 1, "--seed", 9, "--W", 24)
    images = generate(*base, "--H", 16)
    assert images.shape == (1, 16, 24, 3) and expected.std() > 20
    assert max_difference(images[0], expected) <= ROUNDING
    sixteen_bits = generate(*base, "--precision", "autocast", "--ckpt", model_files.checkpoint)
    assert max_difference(images, sixteen_bits) <= 25


@pytest.mark.slow
def test_equal_placeholders_are_renamed_and_prompts_come_from_a_file(
    generate: Generate, model_files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa <teddy>\n\n  a <teddy-2> \n", encoding="utf8")
    caplog.set_level("INFO")
    both = generate("--concept", model_files.teddy, "--concept", model_files.teddy, "--from-file",
                    tmp_path / "prompts.txt", "--n_samples", 1)
    assert len(both) == 2
    assert max_difference(both[:1], both[1:]) <= 2 * ROUNDING  # the same concept under two names
    assert f"<teddy-2> stands for the <teddy> of {model_files.teddy}\n" in caplog.text
    assert f"<teddy-2>: the teddy bear of {model_files.teddy}, bias 0.75" in caplog.text
    prompts = [read_metadata(path)["prompt"] for path in image_paths(tmp_path / "out")]
    assert prompts == ["a <teddy>", "a <teddy-2>"]
    generate("--concept", model_files.teddy, "--prompt", "a cat", "--n_samples", 1)
    assert "<teddy> is loaded, but its word does not occur in the prompt" in caplog.text


@pytest.mark.slow
def test_slots_and_files_of_the_evaluation_name_the_concept(
    generate: Generate, model_files: ModelFiles, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\n[style]\na sketch of a {}\n", encoding="utf8")
    generate("--concept", model_files.teddy, "--prompt", "a {} (in the snow)", "--from-file", tmp_path / "prompts.txt",
             "--n_samples", 1, "--negative_prompt", "two {}")
    metadata = [read_metadata(path) for path in image_paths(tmp_path / "out")]
    assert [each["prompt"] for each in metadata] == ["a <teddy> (in the snow)", "a sketch of a <teddy>"]
    assert metadata[0]["negative_prompt"] == "two <teddy>" and metadata[0]["prompt_weights"] is True
    generate("--prompt", "a cat BREAK (a dog:1.3)", "--no_prompt_weights", "--n_samples", 1)
    assert read_metadata(image_paths(tmp_path / "out")[-1])["prompt_weights"] is False


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("--n_samples", "0"), "--n_samples: 0: must be 1 or more"),
    (("--n_samples", "two"), "'two' is not a whole number"),
    (("--seed", "-1"), "-1: must be 0 or more"),
    (("--scale", "nan"), "nan: must be at least 0"),
    (("--ddim_eta", "1.5"), "must be at least 0 and at most 1"),
    (("--ddim_steps", "101"), "101 sampling steps: this model has 100"),
    (("--prompt", "a {{}}"), r"'a \{\}' has a \{\}, which stands for the concept's word, but none is loaded"),
    (("--prompt", "a dog <lora:foo:0.8>"), "has <lora:foo:0.8>, a tag of other tools"),
    (("--prompt", "a [dog:cat:0.5]"), "prompt editing during sampling, which is not supported"),
    (("--H", "30"), "height 30: this model generates multiples of 4 pixels; the nearest is 32"),
    (("--W", "2"), "width 2: .* the nearest is 4"),
    (("--concept", "{model_files}/teddy.safetensors", "--temperature", "0"), "0: must be above 0"),
    (("--concept", "{model_files}/teddy.safetensors", "--bias", "0.5", "0.6"), "2 values of bias for 1 concepts"),
    (("--concept", "{model_files}/base.safetensors"), "not a concept"),
    (("--concept", "{model_files}/foreign.safetensors"), "which is another model; load the model it was trained on"),
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
    (("--config", "{model_files}/base.safetensors"), "is a safetensors file, not a config"),
    (("--ckpt", "nowhere.ckpt"), "--ckpt nowhere.ckpt: no such file"),
    (("--ckpt", "{model_files}/teddy.safetensors"), "is a concept of this project, not a base model"),
    (("--outdir", "{model_files}/base.yaml"), "base.yaml is not a folder"),
    (("--from-file", "nowhere.txt"), "nowhere.txt: no such file"),
    (("--device", "abacus"), "no such device"),
    (("--prompt", "a <mug>"), "names <mug>, but no loaded concept .*--concept"),
    (("--negative_prompt", "<mug>"), "names <mug>"),
    (("--prompt", "word " * 15), "15 tokens, but the text encoder takes 14"),
    (("--prompts", "typo"), "--prompts is a flag of other tools; here it is --from-file"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0])[-40:] for mistake in MISTAKES])
def test_mistakes_are_reported_in_one_line_before_anything_is_written(
    main: Main, model_files: ModelFiles, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ("--prompt", "a cat", "--config", str(model_files.config), "--outdir", str(tmp_path / "out"), *QUICK)
    given = [argument.format(model_files=model_files.folder) for argument in arguments]
    error = error_line(main, [*base, *given], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


NO_ARGUMENTS = {"txt2img": 'no prompt; give --prompt "a photo of a dog" or --from-file FILE',
                "img2img": "the following arguments are required: --init-img",
                "inpaint": "the following arguments are required: --init-img"}


@pytest.mark.slow
@pytest.mark.parametrize("script", NO_ARGUMENTS)
def test_help_and_typing_mistakes_need_no_torch(script: str, tmp_path: Path) -> None:
    file = str(ROOT / "scripts" / f"{script}.py")
    code = f"""if True:
        import runpy, sys
        sys.argv = [{file!r}, *sys.argv[1:]]
        try: runpy.run_path({file!r}, run_name="__main__")
        finally: assert "torch" not in sys.modules"""
    for arguments, status, message in ((["--help"], 0, "--global_locking"), (["--n_iter", "0"], 2, "must be 1 or more"),
                                       ([], 2, NO_ARGUMENTS[script])):
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                                 cwd=tmp_path)
        assert (process.returncode, "Traceback" in process.stderr) == (status, False), process.stderr
        assert message in process.stdout + process.stderr


@pytest.mark.slow
def test_the_readmes_command_works_from_any_directory(tmp_path: Path) -> None:
    """The bundled model is found, and images go to ./outputs of the working directory."""
    command = [sys.executable, str(ROOT / "scripts" / "txt2img.py"), "--prompt", "a photo of a dog on the beach",
               "--n_samples", "1", "--device", "cpu", "--steps", "2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (image,) = image_paths(tmp_path / "outputs" / "txt2img-samples")
    assert read_metadata(image)["guidance_scale"] == 2.0  # what suits the bundled model, by its config
    assert read_pixels(image).shape == (64, 64, 3)
    assert "1 image: outputs/txt2img-samples/samples/00000.png" in process.stdout
