"""Unknown flags: the nearest known one, or what takes the place of another tool's flag, before anything is loaded."""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.cli import generation
from ldm.cli.other_tools import _ANSWERS, _NOT_NEEDED
from ldm.cli.parser import Parser
from ldm.cli.training import get_parser
from ldm.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def generation_parser() -> argparse.ArgumentParser:
    parser = Parser("generate")
    generation.add_generation_flags(parser, "outputs")
    return parser


def refusal(parser: argparse.ArgumentParser, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        parser.parse_known_args(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("build", "typed", "meant"), [
    (get_parser, "--max_step", "--max_steps"), (get_parser, "--max-steps", "--max_steps"),
    (get_parser, "--init_wrod", "--init_word"), (get_parser, "--resum=x", "--resume"),
    (get_parser, "--place", "--placeholder"), (get_parser, "--Data_Root", "--data_root"),
    (generation_parser, "--promt", "--prompt"), (generation_parser, "--negative-prompt", "--negative_prompt"),
    (generation_parser, "--temprature", "--temperature"), (generation_parser, "--n_sample", "--n_samples")])
def test_the_nearest_flag(build: Callable[[], argparse.ArgumentParser], typed: str, meant: str) -> None:
    text = refusal(build(), typed, "1")
    assert text.startswith(f"{typed.partition('=')[0]}: no such flag") and re.search(rf" {meant}(\?|$)", text), text


@pytest.mark.parametrize("flag", ["--train_data_dir", "--instance_data_dir", "--initializer_token", "--lr",
                                  "--placeholder_token", "--instance_prompt", "--pretrained_model_name_or_path",
                                  "--output_dir", "--resolution", "--max_train_steps", "--learning_rate", "--steps",
                                  "--train_batch_size", "--mixed_precision", "--checkpointing_steps", "--batch_size",
                                  "--resume_from_checkpoint", "--gradient_accumulation_steps", "--ckpt", "--xformers",
                                  "--train-batch-size", "--num_vectors_per_token"])
def test_training_flags_of_other_tools(flag: str) -> None:
    text = refusal(get_parser(), flag, "x")
    assert text.startswith(f"{flag} is a flag of other tools; ")


@pytest.mark.parametrize(("flag", "here"), [
    ("--num_inference_steps", "--ddim_steps"), ("--cfg-scale", "--scale"), ("--guidance_scale=7", "--scale"),
    ("--num_images", "--n_samples"), ("--prompt_file", "--from-file"), ("--model_id", "--ckpt"),
    ("--sampler_name", "--sampler"), ("--textual_inversion", "--concept"), ("--width", "--W"), ("--gpu", "--device"),
    ("--output_dir", "--outdir"), ("--lora_path", "--lora"), ("--embedding_manager_ckpt", "--concept"),
    ("--resolution", "--H or --W")])
def test_generation_flags_of_other_tools(flag: str, here: str) -> None:
    assert refusal(generation_parser(), flag, "x").endswith(f"; here it is {here}; see --help")


def test_what_no_flag_replaces() -> None:
    assert "leave it out, a concept is trained on the base model alone" in refusal(get_parser(), "--lora", "x")
    assert refusal(generation_parser(), "--zzz") == "--zzz: no such flag; see --help"
    assert "--data_root" not in refusal(generation_parser(), "--train_data_dir", "x")


def test_known_flags_and_values_pass() -> None:
    options, rest = get_parser().parse_known_args(["-n5", "--name=x", "--no-test", "true", "-t", "-s", "3", "a=-b"])
    assert (options.name, options.seed, rest) == ("x", 3, ["a=-b"])
    options = generation_parser().parse_args(["--prompt", "a -- b", "a --max_step", "--bias", "-1", "-0.5"])
    assert (options.prompt, options.bias) == (["a -- b", "a --max_step"], [-1, -0.5])


def test_the_table_names_each_flag_once_and_only_flags_that_exist() -> None:
    """An answer must be a flag of a command or a section of a config."""
    names = [name for row, _ in _ANSWERS for name in row.split()] + " ".join(_NOT_NEEDED.values()).split()
    assert sorted(names) == sorted(set(names))
    sources = "".join(path.read_text() for folder in ("ldm/cli", "scripts", "evaluation") for path in
                      (ROOT / folder).glob("*.py") if path.name != "other_tools.py") + (
        ROOT / "merge_embeddings.py").read_text()
    for _, answers in _ANSWERS:
        for answer in answers.split():
            known = f'"{answer}"' in sources or answer in ("--H", "--W")
            assert known or re.match(r"(model|data|lightning)\.", answer), answer


@pytest.mark.parametrize("argument", ["caf\udce9.ckpt", "--ckpt=\udcff"])
def test_arguments_that_are_not_in_utf8(argument: str) -> None:
    for parser in (get_parser(), generation_parser()):
        message = refusal(parser, "--seed", "1", argument)
        assert "is not in UTF-8; rename the file" in message
        message.encode("utf-8")
