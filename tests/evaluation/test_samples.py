"""Pictures drawn by one loaded model: the same as those of the drawing script, whatever was drawn before or beside."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import PROMPT, QUICK, ROUNDING, WIDTH, ModelFiles, load_main, max_difference, script_generator
from omegaconf import OmegaConf
from PIL import Image

from evaluation.sweeps.samples import Manner, Painter, as_batch, jobs_of, keep, sampling_of
from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.data.images import from_tensor
from ldm.inference.output_folder import read_note
from ldm.inference.sampling import Job, ready_concepts

FEW = Manner(scale=2.0, steps=3)  # as QUICK


@pytest.fixture(scope="module")
def painter(shared_model_files: ModelFiles) -> Painter:
    return Painter.load(shared_model_files.config, device="cpu")


def levels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


def tuned(base: str, weight: torch.Tensor, name: str) -> FinetunedConcept:
    """A concept that draws by a word of two tokens and a weight of its own."""
    numbers = torch.Generator().manual_seed(4)
    return FinetunedConcept("custom-diffusion", "<toy>", "mug", torch.randn(2, WIDTH, generator=numbers),
                        {name: torch.randn(weight.shape, generator=numbers)}, base=base)


def test_it_draws_what_the_script_draws(painter: Painter, model_files: ModelFiles, tmp_path: Path) -> None:
    script = script_generator(load_main("txt2img"), model_files.config, tmp_path)
    wanted = script("--concept", model_files.teddy, "--prompt", PROMPT, "a cat", "--n_samples", 2, "--seed", 5, "--bias", 0.5,
                    "--temperature", 0.3, "--negative_prompt", "a dog", "--sampler", "euler_a", "--ddim_eta", 0.5,
                    "--global_locking", "--all_layers", *QUICK)
    manner = replace(FEW, bias=0.5, temperature=0.3, sampler="euler_a", eta=0.5, global_locking=True, all_layers=True)
    drawn = painter.draw(jobs_of([PROMPT, "a cat"], (5, 6), "a dog"), ready_concepts([model_files.teddy]), manner)
    assert painter.size == (16, 16) and max_difference(levels(drawn), wanted) <= ROUNDING


def test_a_picture_does_not_depend_on_those_beside_it(painter: Painter) -> None:
    jobs = jobs_of(["a cat", "a dog"], range(3))
    assert [job.seed for job in jobs] == [0, 1, 2] * 2 and jobs[3] == Job("a dog", 0)
    together = levels(painter.draw(jobs, manner=FEW))
    few = Painter(painter.config, painter.model, batch_size=4)
    assert max_difference(together, levels(few.draw(jobs, manner=FEW))) <= ROUNDING
    assert max_difference(together[4], levels(few.draw(jobs[4:5], manner=FEW))[0]) <= ROUNDING


def test_concepts_come_and_go(painter: Painter, model_files: ModelFiles) -> None:
    """Of any method, and the base model is left as it was."""
    teddy, jobs = ready_concepts([model_files.teddy]), [Job(PROMPT, 1)]
    name, weight = next((name, weight) for name, weight in painter.model.model.diffusion_model.named_parameters()
                        if name.endswith("attn2.to_v.weight"))
    before = levels(painter.draw(jobs, teddy, FEW))
    plain = levels(painter.draw([Job("a photo of a mug", 1)], manner=FEW))
    toy = [tuned(teddy[0].base, weight, name)]
    assert max_difference(levels(painter.draw([Job("a photo of a <toy>", 1)], toy, FEW)), plain) > ROUNDING
    both = ready_concepts([model_files.teddy, model_files.mug])
    two = [Job("a <teddy> next to a <mug>", 1)]
    apart_biases = [levels(painter.draw(two, both, replace(FEW, bias=bias))) for bias in (0.4, (0.4, 0.4), (0.4, 2.0))]
    assert max_difference(*apart_biases[:2]) == 0 and max_difference(*apart_biases[1:]) > 0
    assert max_difference(levels(painter.draw(jobs, teddy, FEW)), before) == 0
    assert max_difference(levels(painter.draw([Job("a photo of a mug", 1)], manner=FEW)), plain) == 0


def test_pictures_are_kept_with_what_made_them(painter: Painter, model_files: ModelFiles, tmp_path: Path) -> None:
    teddy, manner = ready_concepts([model_files.teddy]), replace(FEW, bias=0.6)
    jobs = jobs_of([PROMPT], (1, 2))
    drawn = painter.draw(jobs, teddy, manner)
    album = keep(drawn, jobs, tmp_path, 2, teddy, manner, ["style", "style"])
    assert len(album.sheets) == 1 and [path.name for path in album.pictures] == ["00000.png", "00001.png"]
    note = read_note(album.pictures[1])
    assert (note["prompt"], note["seed"], note["category"], note["steps"]) == (PROMPT, 2, "style", 3)
    assert note["concepts"][0]["bias"] == 0.6 and note["concepts"][0]["super_category"] == "teddy bear"
    keep(drawn[:1], jobs[:1], tmp_path / "plain", 1)
    assert "category" not in read_note(tmp_path / "plain" / "samples" / "00000.png")
    assert as_batch(drawn).shape == (2, 3, 16, 16)
    assert [from_tensor(pixels).tobytes() for pixels in as_batch(drawn)] == [one.tobytes() for one in drawn]


@pytest.mark.parametrize(("job", "manner", "said"), [
    (Job("a <cup>", 1), FEW, "names <cup>"), (Job(PROMPT, 1), replace(FEW, steps=101), "101 sampling steps"),
    (Job(PROMPT, 1), replace(FEW, eta=0.5, sampler="dpm"), "eta"),
    (Job(PROMPT, 1), replace(FEW, bias=(0.1, 0.2)), "2 values of bias for 1 concepts")])
def test_what_cannot_be_drawn_is_named(job: Job, manner: Manner, said: str, painter: Painter, model_files: ModelFiles) -> None:
    with pytest.raises(UserError, match=said):
        painter.draw([job], ready_concepts([model_files.teddy]), manner)


def test_whether_a_manner_is_possible_is_known_without_weights(model_files: ModelFiles) -> None:
    config = OmegaConf.load(model_files.config)
    assert sampling_of(config, FEW).latent_size == (8, 8)
    with pytest.raises(UserError, match="sampling steps"):
        sampling_of(config, replace(FEW, steps=0))
