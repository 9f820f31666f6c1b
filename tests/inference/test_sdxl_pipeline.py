"""Images of a small Stable Diffusion XL with concepts: both towers, the pooled vector, sizes, images to start from."""
from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdxl
import torch
from helpers.tiny_clips import write_clip
from PIL import Image
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.inference import GenerationRequest, GenerationSettings, PerfusionPipeline, auto_bias

PROMPT, PLAIN = "a photo of a <toy> in the snow", "a photo of a bear in the snow"
QUICK = {"num_inference_steps": 2, "sampler": "ddim", "seed": 1}


@pytest.fixture(scope="module")
def model() -> Any:
    return sdxl.small_model()


@pytest.fixture(scope="module")
def concepts(model: Any) -> list[Concept]:
    return [sdxl.small_concept(model), sdxl.small_concept(model, "<pot>", "cup", seed=1)]


@pytest.fixture
def pipeline(model: Any, concepts: list[Concept]) -> PerfusionPipeline:
    pipeline = PerfusionPipeline(model, sdxl.small_config())
    pipeline.load_concepts(*concepts)
    return pipeline


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.slow
def test_a_word_is_one_learned_word_of_each_tower_in_diffusers(model: Any, concepts: list[Concept]) -> None:
    """Textual Inversion there adds a row to each table; a concept whose pooled vector sees it must encode the same."""
    theirs, concept = sdxl.as_diffusers(model), concepts[0]
    for part, tower, tokenizer in zip(concept.embedding.split([sdxl.WIDTH_L, sdxl.WIDTH_G], 1),
                                      (theirs.text_encoder, theirs.text_encoder_2),
                                      (theirs.tokenizer, theirs.tokenizer_2), strict=True):
        theirs.load_textual_inversion(part, token="<toy>", text_encoder=tower, tokenizer=tokenizer)
    encoder = model.cond_stage_model
    ours = encoder.encode_with_pooled(encoder.tokenize([PROMPT], ["<toy>"]), concept.embedding)
    with torch.no_grad():
        encoding, _, pooled, _ = theirs.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    assert torch.allclose(ours[0], encoding, atol=1e-4) and torch.allclose(ours[1], pooled, atol=1e-4)


def test_the_pooled_vector_sees_what_each_concept_says(pipeline: PerfusionPipeline, concepts: list[Concept]) -> None:
    encoder, prompt = pipeline.model.cond_stage_model, "a <toy> beside a <pot>"

    def pooled(*choices: str) -> Tensor:
        chosen = [replace(concept, pooled=choice) for concept, choice in zip(concepts, choices, strict=True)]
        return pipeline.encode([prompt], chosen).select([prompt]).pooled

    def with_vectors(*vectors: Tensor) -> Tensor:
        tokens = encoder.tokenize([prompt], ["<toy>", "<pot>"])
        return encoder.encode_with_pooled(tokens, torch.cat(vectors))[1]

    words = [encoder.embed_pieces(encoder.word_pieces(word)) for word in ("bear", "cup")]
    own = [concept.embedding for concept in concepts]
    plain = encoder.encode_with_pooled(encoder.tokenize(["a bear beside a cup"]))[1]
    assert torch.allclose(pooled("super_category", "super_category"), plain, atol=1e-4)
    assert torch.allclose(pooled("concept", "concept"), with_vectors(*own), atol=1e-4)
    assert torch.allclose(pooled("concept", "super_category"), with_vectors(own[0], words[1]), atol=1e-4)
    assert not torch.allclose(pooled("concept", "concept"), plain, atol=0.1)


@pytest.mark.slow
def test_a_concept_that_a_prompt_does_not_name_changes_nothing(pipeline: PerfusionPipeline) -> None:
    together = pipeline([PLAIN, PROMPT, "a <toy> beside a <pot>"], batch_size=3, **QUICK).images
    alone = pipeline([PLAIN, PROMPT, "a <toy> beside a <pot>"], batch_size=1, **QUICK).images
    pipeline.unload_concepts()
    base = pipeline(PLAIN, **QUICK).images
    assert np.abs(pixels(together) - pixels(alone)).max() <= 1
    assert np.abs(pixels(together[:1]) - pixels(base)).max() <= 1
    assert np.abs(pixels(together[:1]) - pixels(together[1:2])).max() > 8


@pytest.mark.slow
def test_every_setting_of_concepts_acts(pipeline: PerfusionPipeline) -> None:
    plain = pixels(pipeline(PROMPT, **QUICK).images)
    for settings in ({"global_locking": True}, {"bias": 0.2}, {"temperature": 0.5}, {"guidance_scale": 1.0},
                     {"negative_prompt": "a <pot>"}, {"negative_prompt": "blurry"}, {"original_size": (900, 20)},
                     {"crop": (500, 0)}, {"target_size": (300, 900)}):
        assert np.abs(pixels(pipeline(PROMPT, **QUICK, **settings).images) - plain).max() > 1, settings
    weighted = pipeline("a photo of a (<toy>:1.5) in the [snow]", **QUICK).images
    assert np.abs(pixels(weighted) - plain).max() > 1


def test_weights_of_words_leave_the_pooled_vector_alone(pipeline: PerfusionPipeline, concepts: list[Concept]) -> None:
    texts = [PROMPT, PROMPT.replace("<toy>", "(<toy>:1.4)")]
    requests = [GenerationRequest(text, 1) for text in texts]
    plain, weighted = (pipeline.encode([text, ""], concepts).for_requests([request])
                       for text, request in zip(texts, requests, strict=True))
    assert torch.allclose(plain[0].pooled, weighted[0].pooled, atol=1e-5)
    assert not torch.allclose(plain[0].projected, weighted[0].projected, atol=1e-2)
    assert not plain[1].encoding.any() and not plain[1].pooled.any()  # the empty negative prompt


@pytest.mark.slow
def test_images_start_from_images(pipeline: PerfusionPipeline) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8))
    mask = Image.new("L", (32, 48))
    mask.paste(255, (16, 0, 32, 48))
    weak = pixels(pipeline(PROMPT, image=photo, strength=0.5, height=24, **QUICK).images)
    strong = pixels(pipeline(PROMPT, image=photo, strength=1.0, height=24, **QUICK).images)
    inpainted = pixels(pipeline(PROMPT, image=photo, mask_image=mask, mask_border=0, height=24, **QUICK).images)
    assert weak.shape == inpainted.shape == (1, 24, 16, 3) and np.abs(weak - strong).max() > 8
    shown = pixels([photo.resize((16, 24), Image.Resampling.LANCZOS)])
    assert np.abs(inpainted - shown)[:, :, :6].max() <= 2 < np.abs(inpainted - shown)[:, :, 10:].max()


@pytest.mark.slow
def test_the_bias_is_found(pipeline: PerfusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BIASES": (0.5, 0.9), "STEPS": 1, "MAX_PROMPTS": 2}.items():
        monkeypatch.setattr(auto_bias, name, value)
    settings = pipeline.complete(GenerationSettings(bias="auto"))
    found = pipeline.resolve_auto_bias(replace(settings, bias=("auto", 0.5)), [PROMPT], str(write_clip(tmp_path)))
    assert found.bias[1] == 0.5 and 0 < found.bias[0] < 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"height": 20}, "height 20: this model generates multiples of 8 pixels; the nearest is 16"),
    ({"crop": (0, -1)}, "crop .0, -1. must be two whole numbers of pixels, top and left, each 0 or more"),
    ({"target_size": (0, 16)}, "target_size .0, 16. must be two whole numbers of pixels, height and width"),
    ({"original_size": (16, 16, 16)}, "original_size .16, 16, 16. must be two whole numbers"),
    ({"original_size": 1024}, "original_size 1024 must be two whole numbers"),
    ({"original_size": (10.5, 16)}, "must be two whole numbers"),
])
def test_sizes_that_cannot_be_are_told(pipeline: PerfusionPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        pipeline(PROMPT, **QUICK, **settings)
    assert "\n" not in str(error.value)


def test_models_without_sizes_refuse_them(pipeline: PerfusionPipeline) -> None:
    config = sdxl.small_config(cond_stage_config={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"})
    with pytest.raises(UserError, match="crop: this model does not read sizes"):
        PerfusionPipeline(pipeline.model, config).complete(GenerationSettings(crop=(1, 2)))


@pytest.mark.parametrize(("height", "width", "is_told"), [(None, None, False), (8, 32, False), (32, 32, True)])
def test_other_proportions_of_the_same_area_are_no_warning(
    pipeline: PerfusionPipeline, height: int | None, width: int | None, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.warn_about([GenerationRequest(PROMPT, 1)], GenerationSettings(height=height, width=width))
    assert any("was trained on images of" in record.message for record in caplog.records) == is_told
