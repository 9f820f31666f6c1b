"""scripts/stable_txt2img.py: one generator for all images, and words of embeddings.pt."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import (
    ROUNDING,
    Generate,
    Main,
    ModelFiles,
    error_line,
    image_paths,
    load_main,
    max_difference,
    script_generator,
)
from torch import nn

from ldm.inference.pipeline import PerfusionPipeline

SIZE = ("--H", 16, "--W", 16, "--f", 2)


@pytest.fixture(scope="module")
def main() -> Main:
    return load_main("stable_txt2img")


@pytest.fixture
def cat(model_files: ModelFiles, tmp_path: Path) -> Path:
    """A file of Textual Inversion in which "*" has the embedding of "cat"."""
    encoder = PerfusionPipeline.from_pretrained(model_files.config, device="cpu").model.cond_stage_model
    words = nn.ParameterDict({"*": nn.Parameter(encoder.token_table[encoder.word_pieces("cat")].clone())})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}, tmp_path / "embeddings.pt")
    return tmp_path / "embeddings.pt"


@pytest.mark.slow
def test_a_placeholder_generates_what_its_word_does(
    generate: Generate, model_files: ModelFiles, cat: Path
) -> None:
    arguments = ("--ckpt", model_files.checkpoint, *SIZE, "--n_samples", 2, "--n_iter", 1)
    expected = generate(*arguments, "--prompt", "a photo of a cat")
    shown = generate(*arguments, "--prompt", "a photo of a *", "--embedding_path", cat)
    assert shown.shape == (2, 16, 16, 3) and max_difference(shown, expected) <= ROUNDING
    assert max_difference(expected, generate(*arguments, "--prompt", "a photo of a dog")) > 10
    assert max_difference(expected[0], expected[1]) > 10


@pytest.mark.slow
def test_the_other_scripts_read_the_file_too(model_files: ModelFiles, cat: Path, tmp_path: Path) -> None:
    generate = script_generator(load_main("txt2img"), model_files.config, tmp_path)
    expected = generate("--n_samples", 1, "--prompt", "a photo of a cat")
    shown = generate("--n_samples", 1, "--prompt", "a photo of a *", "--embedding_path", cat)
    assert max_difference(shown, expected) <= ROUNDING


@pytest.mark.slow
def test_batches_of_a_file_start_from_the_same_noise_if_it_is_fixed(
    generate: Generate, model_files: ModelFiles, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na mug\n")
    arguments = ("--ckpt", model_files.checkpoint, *SIZE, "--n_samples", 2, "--from-file", tmp_path / "prompts.txt",
                 "--n_iter", 2, "--plms")
    images = generate(*arguments, "--fixed_code")
    assert len(images) == 6 and max_difference(images[:3], images[3:]) <= ROUNDING
    assert max_difference(images[0], images[2]) > 0
    assert np.array_equal(images, generate(*arguments, "--fixed_code", "--seed", 42))
    assert max_difference(generate(*arguments)[:3], generate(*arguments)[3:]) > 10


@pytest.mark.slow
def test_images_and_grids_can_be_left_out(main: Main, model_files: ModelFiles, tmp_path: Path) -> None:
    arguments = ["--config", model_files.config, "--ckpt", model_files.checkpoint, "--device", "cpu", *SIZE,
                 "--ddim_steps", 1, "--n_iter", 1, "--n_samples", 1]
    for flag, counts in (("--skip_grid", (1, 0)), ("--skip_save", (0, 1))):
        folder = tmp_path / flag
        main([*map(str, arguments), "--outdir", str(folder), flag])
        assert (len(image_paths(folder)), len(list(folder.glob("*.png")))) == counts


def test_mistakes_are_reported_in_one_line(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in error_line(main, ["--device", "cpu"], capsys)  # no weights at the public default
    assert "--from-file" in error_line(main, ["--from-file", "/none.txt"], capsys)
    assert "retrieval-augmented generation is left out" in error_line(lambda _: load_main("knn2img")(), [], capsys)
