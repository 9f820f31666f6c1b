"""A small Stable Diffusion XL from photos to an evaluation: covariance, training, resuming, merging, images, scores."""
from __future__ import annotations

from pathlib import Path

import pytest
import sdxl
import torch
from helpers.evaluation_files import read_rows, write_evaluation_files
from helpers.model_files import image_paths, load_main
from helpers.training_setup import in_project_root, process_output, resume_run, run_main
from omegaconf import OmegaConf

import merge_embeddings
from evaluation import clip_eval
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts
from scripts import compute_covariance

pytestmark = pytest.mark.slow
CAPTIONS = ("a cat in a red box", "the dog and a cup", "a bear on a bike", "some houses near rivers", "old men drink")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and weights of the small model, a config that trains on it, photos, a CLIP and a covariance."""
    path = write_evaluation_files(tmp_path_factory.mktemp("run"), "a {} outside\n")
    config, weights = sdxl.write_small_model(path)
    small, training = sdxl.small_config(), OmegaConf.load(PROJECT_ROOT / "configs" / "perfusion-sd-xl.yaml")
    for name in ("image_size", "unet_config", "first_stage_config", "cond_stage_config"):
        training.model.params[name] = small.model.params[name]
    training.model.params.unet_config.params.use_checkpoint = True
    training.data.params.train.params.size = sdxl.SIDE
    previews = training.lightning.callbacks.previews.params
    previews.prompts, previews.num_inference_steps = ["a {}"], 1
    training.lightning.trainer.accumulate_grad_batches = 2
    OmegaConf.save(training, path / "train.yaml")
    (path / "captions.txt").write_text("\n".join(CAPTIONS))
    compute_covariance.main(["--config", str(config), "--ckpt", str(weights), "--captions",
                             str(path / "captions.txt"), "--output", str(path / "covariance.safetensors")])
    return path


def training_flags(folder: Path, logs: str, placeholder: str) -> list[str]:
    return ["--base", str(folder / "train.yaml"), "--actual_resume", str(folder / "model.safetensors"),
            "--data_root", str(folder / "photos"), "--masks", str(folder / "masks"), "--init_word", "cat",
            "--placeholder", placeholder, "--max_steps", "1", "--precision", "32-true", "-l", str(folder / logs),
            f"model.params.covariance={folder / 'covariance.safetensors'}"]


def only(folder: Path) -> Path:
    (child,) = folder.iterdir()
    return child


def load_one(logdir: Path) -> Concept:
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    return concept


def test_from_photos_to_scores(folder: Path) -> None:
    # Train by main.py, then resume.
    output = process_output("main.py", *training_flags(folder, "first", "<toy>"))
    first = only(folder / "first")
    assert "nan" not in output.lower() and (first / "images" / "before_during_after.png").is_file()
    before = load_one(first)
    resume_run(first, "--max_steps", 2)
    toy = load_one(first)
    assert (before.steps, toy.steps) == (1, 2) and not torch.equal(before.embedding, toy.embedding)
    assert toy.word_parts == {"clip_l": sdxl.WIDTH_L, "clip_g": sdxl.WIDTH_G} and toy.dual is not None

    # A second concept, with a word that stays, in a few layers.
    with in_project_root():
        run_main([*training_flags(folder, "second", "<pot>"), "model.params.embedding_lr=0",
                  "model.params.trained_layers=[output_blocks.0.1,output_blocks.1.1]"])
    pot = load_one(only(folder / "second"))
    assert len(pot.target_outputs_v) == 4 < len(toy.target_outputs_v)

    # Merge them and generate with both.
    both = folder / "both.safetensors"
    merge_embeddings.main(["--manager_ckpts", str(first / "concept.safetensors"),
                           str(only(folder / "second") / "concept.safetensors"), "--output_path", str(both)])
    model = ["--config", str(folder / "config.yaml"), "--device", "cpu"]
    load_main("txt2img")([*model, "--ckpt", str(folder / "model.safetensors"), "--concept", str(both), "--prompt",
                          "a <toy> next to a <pot>", "--steps", "2", "--n_samples", "1", "--outdir",
                          str(folder / "images")])
    assert len(image_paths(folder / "images")) == 1

    # Measure one of them.
    clip_eval.main([*model, "--ckpt", str(folder / "model.safetensors"), "--concept",
                    str(first / "concept.safetensors"), "--photos", str(folder / "photos"), "--clip",
                    str(folder / "clip"), "--segmenter", "none", "--prompts", str(folder / "prompts.txt"), "--seeds",
                    "1", "--ddim_steps", "2", "--outdir", str(folder / "scores")])
    (row,) = read_rows(folder / "scores" / "similarities.csv")
    assert float(row["text_similarity"]) != 0
