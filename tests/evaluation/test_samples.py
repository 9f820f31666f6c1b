"""Images of one pipeline: the same as those of the script, whatever was generated before or beside them."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_files import (
    PROMPT,
    QUICK,
    ROUNDING,
    WIDTH,
    ModelFiles,
    load_main,
    max_difference,
    script_generator,
)
from PIL import Image

from evaluation.metrics.scoring import stack_images
from evaluation.sweeps.samples import generate_images, read_single_concept, save_images
from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import read_concepts
from ldm.data.images import from_tensor
from ldm.inference.output_folder import read_metadata
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest, requests_for
from ldm.inference.settings import GenerationSettings

SETTINGS = GenerationSettings(guidance_scale=2.0, num_inference_steps=3)  # the same as QUICK


@pytest.fixture(scope="module")
def pipeline(shared_model_files: ModelFiles) -> PerfusionPipeline:
    return PerfusionPipeline.from_config(shared_model_files.config, device="cpu")


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def finetuned_concept(base: str, weight: torch.Tensor, name: str) -> FinetunedConcept:
    """Return a concept with a word of two tokens and a weight of its own."""
    generator = torch.Generator().manual_seed(4)
    return FinetunedConcept("custom-diffusion", "<toy>", "mug", torch.randn(2, WIDTH, generator=generator),
                            {name: torch.randn(weight.shape, generator=generator)}, base=base)


@pytest.mark.slow
def test_images_equal_those_of_the_script(pipeline: PerfusionPipeline, model_files: ModelFiles, tmp_path: Path) -> None:
    run_script = script_generator(load_main("txt2img"), model_files.config, tmp_path)
    expected = run_script("--concept", model_files.teddy, "--prompt", PROMPT, "a cat", "--n_samples", 2, "--seed", 5,
                          "--bias", 0.5, "--temperature", 0.3, "--negative_prompt", "a dog", "--sampler", "euler_a",
                          "--ddim_eta", 0.5, "--global_locking", "--all_layers", *QUICK)
    settings = replace(SETTINGS, bias=0.5, temperature=0.3, sampler="euler_a", eta=0.5, global_locking=True,
                       all_layers=True)
    requests = requests_for([PROMPT, "a cat"], (5, 6), "a dog")
    images = generate_images(pipeline, requests, read_concepts([model_files.teddy]), settings)
    assert max_difference(levels(images), expected) <= ROUNDING


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(pipeline: PerfusionPipeline) -> None:
    requests = requests_for(["a cat", "a dog"], range(3))
    together = levels(generate_images(pipeline, requests, settings=SETTINGS))
    in_batches = levels(generate_images(pipeline, requests, settings=SETTINGS, batch_size=4))
    alone = levels(generate_images(pipeline, requests[4:5], settings=SETTINGS))
    assert max_difference(together, in_batches) <= ROUNDING
    assert max_difference(together[4], alone[0]) <= ROUNDING


@pytest.mark.slow
def test_concepts_of_any_method_leave_the_base_model_unchanged(pipeline: PerfusionPipeline, model_files: ModelFiles
                                                               ) -> None:
    def generate(prompt: str, *concepts: object, **changes: object) -> np.ndarray:
        settings = replace(SETTINGS, **changes)
        return levels(generate_images(pipeline, [GenerationRequest(prompt, 1)], concepts, settings))

    teddy, mug = read_concepts([model_files.teddy, model_files.mug])
    name, weight = next((name, weight) for name, weight in pipeline.model.model.diffusion_model.named_parameters()
                        if name.endswith("attn2.to_v.weight"))
    before, plain = generate(PROMPT, teddy), generate("a photo of a mug")
    toy = finetuned_concept(teddy.base, weight, name)
    assert max_difference(generate("a photo of a <toy>", toy), plain) > ROUNDING
    one, both, different = (generate("a <teddy> next to a <mug>", teddy, mug, bias=bias)
                            for bias in (0.4, (0.4, 0.4), (0.4, 2.0)))
    assert max_difference(one, both) == 0 and max_difference(both, different) > 0
    assert max_difference(generate(PROMPT, teddy), before) == 0
    assert max_difference(generate("a photo of a mug"), plain) == 0


def test_saved_images_hold_their_settings(pipeline: PerfusionPipeline, model_files: ModelFiles, tmp_path: Path) -> None:
    teddy, settings = read_concepts([model_files.teddy]), replace(SETTINGS, bias=0.6)
    requests = requests_for([PROMPT], (1, 2))
    images = generate_images(pipeline, requests, teddy, settings)
    output = save_images(images, requests, tmp_path, 2, teddy, pipeline.complete(settings), ["style", "style"])
    assert len(output.sheets) == 1 and [path.name for path in output.images] == ["00000.png", "00001.png"]
    metadata = read_metadata(output.images[1])
    assert [metadata[name] for name in ("prompt", "seed", "category", "num_inference_steps")] == [
        PROMPT, 2, "style", 3]
    assert metadata["concepts"][0]["bias"] == 0.6 and metadata["concepts"][0]["super_category"] == "teddy bear"
    save_images(images[:1], requests[:1], tmp_path / "plain", 1)
    assert "category" not in read_metadata(tmp_path / "plain" / "samples" / "00000.png")
    batch = stack_images(images)
    assert batch.shape == (2, 3, 16, 16)
    assert [from_tensor(pixels).tobytes() for pixels in batch] == [image.tobytes() for image in images]


@pytest.mark.parametrize(("prompt", "changes", "message"), [
    ("a <cup>", {}, "names <cup>"), (PROMPT, {"num_inference_steps": 101}, "101 sampling steps"),
    (PROMPT, {"eta": 0.5, "sampler": "dpm"}, "eta"),
    (PROMPT, {"bias": (0.1, 0.2)}, "2 values of bias for 1 concepts")])
def test_errors_name_what_cannot_be_generated(prompt: str, changes: dict[str, object], message: str,
                                              pipeline: PerfusionPipeline, model_files: ModelFiles) -> None:
    with pytest.raises(UserError, match=message):
        generate_images(pipeline, [GenerationRequest(prompt, 1)], read_concepts([model_files.teddy]),
                        replace(SETTINGS, **changes))


def test_only_one_concept_can_be_compared_with_photos(model_files: ModelFiles) -> None:
    assert read_single_concept([model_files.teddy]).placeholder == "<teddy>"
    with pytest.raises(UserError, match="holds <teddy>, <mug>, but the photos are of one subject"):
        read_single_concept([model_files.teddy, model_files.mug])
