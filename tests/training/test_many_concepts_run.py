"""Runs of main.py that learn several of the bundled examples at once: their flags, and their files."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.training_setup import FEW_IMAGES, ROOT, load_state, resume_run, train_main
from omegaconf import DictConfig

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.training.config import read_config

EXAMPLES = ROOT / "models" / "mini" / "examples"
TWO = ("--data_root", EXAMPLES / "teddy", EXAMPLES / "teapot", "--init_word", "teddy bear", "teapot")
QUICK = (*TWO, "--max_steps", 3, "data.params.batch_size=2", *FEW_IMAGES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_main(tmp_path_factory.mktemp("two"), *QUICK)


@pytest.mark.slow
def test_each_concept_has_its_file_and_previews(run: Path) -> None:
    for name, category in (("teddy", "teddy bear"), ("teapot", "teapot")):
        (concept,) = load_perfusion_concepts(run / f"{name}.safetensors")
        assert (concept.placeholder, concept.super_category, concept.steps) == (f"<{name}>", category, 3)
        assert sorted(path.name for path in (run / "images" / name).iterdir()) == [
            "before_during_after.png", "masks.png"]
    assert not (run / "concept.safetensors").exists() and not list((run / "images").glob("*.png"))
    assert len(list((run / "masks").iterdir())) == sum(len(list((EXAMPLES / n).iterdir())) for n in ("teddy", "teapot"))


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_concepts(run: Path, tmp_path: Path) -> None:
    logdir = train_main(tmp_path, *QUICK, "lightning.callbacks.ctrl_c.target=helpers.training_setup.InterruptAt",
                   "lightning.callbacks.ctrl_c.params.batch=1")
    assert load_state(logdir)["global_step"] == 2
    resume_run(logdir, "lightning.callbacks.ctrl_c.params.batch=-1")
    for name in ("teddy", "teapot"):
        assert (logdir / f"{name}.safetensors").read_bytes() == (run / f"{name}.safetensors").read_bytes()
    ours, theirs = load_state(logdir)["state_dict"], load_state(run)["state_dict"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# Flags


def read(*arguments: object) -> DictConfig:
    base = ("--base", ROOT / "configs" / "perfusion.yaml")
    return read_config(parse_training_options([*map(str, base), *map(str, arguments)]))


def test_words_and_folders_of_several_concepts_reach_model_and_data() -> None:
    config = read(*TWO, "model.params.bias=0.5")
    train = config.data.params.train.params
    assert list(train.data_root) == [str(EXAMPLES / "teddy"), str(EXAMPLES / "teapot")]
    assert list(train.placeholder_token) == list(config.model.params.placeholder) == ["<teddy>", "<teapot>"]
    assert list(config.model.params.super_category) == ["teddy bear", "teapot"] and config.model.params.bias == 0.5
    config = read("--data_root", "my cats/", "b", "--init_word", "cat", "--placeholder_string", "<x>", "<y>", "--masks",
                  "m", "n")
    assert list(config.data.params.train.params.mask_root) == ["m", "n"] and config.model.params.super_category == "cat"
    assert list(config.model.params.placeholder) == ["<x>", "<y>"]
    named = read("--data_root", "my cats/", "b", "--init_word", "cat").model.params.placeholder
    assert list(named) == ["<my-cats>", "<b>"]


def test_a_single_concept_is_described_without_lists() -> None:
    config = read("--data_root", "photos", "--init_word", "cat", "--placeholder", "<x>", "model.params.bias=0.5")
    assert config.data.params.train.params.data_root == "photos" and config.model.params.super_category == "cat"
    assert config.model.params.placeholder == "<x>" and config.model.params.bias == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (TWO[:3], "2 subjects; say what they are"),
    ((*TWO, "--placeholder", "<a>"), r"placeholder_token: 1 of them \(<a>\) for 2 folders of photos"),
    ((*TWO, "--placeholder", "<a>", "<A>"), "<a> is given twice"), ((*TWO, "cat"), "3 super-categories"),
    ((*TWO, "--masks", EXAMPLES / "teddy"), "mask_root: 1 of them .* for 2 folders"),
    ((*TWO, "data.params.concepts_per_batch=0"), "concepts_per_batch 0"),
])
def test_mistakes_raise_a_user_error_of_one_line(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        train_main(tmp_path, "--max_steps", 1, *arguments)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_config_that_trains_no_concept_takes_one_folder() -> None:
    with pytest.raises(UserError, match="does not train concepts"):
        read("--base", ROOT / "configs" / "mini" / "autoencoder.yaml", "--data_root", "a", "b")
