"""A new method is one class in a file of its own: nothing else has to know of it."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, write_base, write_photos
from helpers.training_setup import run_main
from omegaconf import OmegaConf

from ldm.common.files import load_metadata
from ldm.concepts.storage import load_concepts
from ldm.inference.pipeline import PerfusionPipeline
from ldm.modules.context import PromptContext
from ldm.personalization.textual_inversion import TextualInversion

MAX_NORM = 0.5  # of the start


class NormConstrainedInversion(TextualInversion):
    """Textual Inversion whose vectors never grow beyond a part of their start's norm."""

    method = "norm-constrained-inversion"
    method_name = "Norm-constrained Inversion"

    def prompt_context(self, prompts: list[str]) -> PromptContext:
        with torch.no_grad():
            for concept in self.concepts:
                limit = MAX_NORM * concept.start.norm(dim=-1, keepdim=True)
                concept.vectors.mul_((limit / concept.vectors.norm(dim=-1, keepdim=True)).clamp(max=1.0))
        return super().prompt_context(prompts)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run of two steps on a tiny model."""
    folder = tmp_path_factory.mktemp("new method")
    write_base(folder)
    write_photos(folder)
    model = tiny_models.latent_diffusion_config(
        folder, "perfusion.Perfusion", super_category="cat", placeholder=WORD, ckpt_path=str(folder / "base.ckpt"))
    model["target"] = f"{__name__}.NormConstrainedInversion"
    photos = {"target": "ldm.data.personalized.PersonalizedBase", "params": {
        "data_root": str(folder / "photos"), "size": 16, "placeholder_token": WORD,
        "templates": list(tiny_models.TEMPLATES)}}
    previews = {"target": "ldm.training.concept_callbacks.BeforeDuringAfter",
                "params": {"prompts": ["a {}"], "num_inference_steps": 2}}
    config = {"model": model, "data": {"target": "main.DataModuleFromConfig", "params": {
        "batch_size": 2, "train": photos}}, "lightning": {"callbacks": {"previews": previews}}}
    OmegaConf.save(OmegaConf.create(config), folder / "method.yaml")
    run_main(["--base", str(folder / "method.yaml"), "-l", str(folder / "logs"), "--max_steps", "2", "--accelerator",
              "cpu"])
    (logdir,) = (folder / "logs").iterdir()
    return logdir


@pytest.mark.slow
def test_it_trains_and_is_saved_under_its_name(logdir: Path) -> None:
    path = logdir / "concept.safetensors"
    (concept,) = load_concepts(path)
    assert load_metadata(path)["personalization"]["method"] == "norm-constrained-inversion"
    assert (concept.placeholder, concept.super_category, concept.steps) == (WORD, "cat", 2)
    assert "Norm-constrained Inversion" in concept.summary
    assert (logdir / "images" / "before_during_after.png").is_file()


@pytest.mark.slow
def test_its_concept_can_be_generated_with(logdir: Path) -> None:
    (config,) = (logdir / "configs").glob("*-project.yaml")
    pipe = PerfusionPipeline.from_pretrained(config, device="cpu")
    pipe.load_concepts(logdir / "concept.safetensors")
    images = {word: pipe(f"a {word}", seed=1, num_inference_steps=2).images[0] for word in (WORD, "cat")}
    assert images[WORD].size == (16, 16) and images[WORD].tobytes() != images["cat"].tobytes()
