"""Weights of words in prompts: the notation, and what the weights do, against formulas written out here."""
from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers.model_files import ModelFiles
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.concepts.prompt_weights import check_syntax, parse_prompt, parse_weights, plain_text, restore_mean
from ldm.inference import PerfusionPipeline
from ldm.inference.encoding import EncodedPrompts
from ldm.inference.requests import GenerationRequest

PLAIN = "a photo of a <teddy> on the beach"


@pytest.mark.parametrize(("prompt", "expected"), [
    ("plain text, 16:9 and 5-10", [("plain text, 16:9 and 5-10", 1)]),
    ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
    ("((red)) [cat] [[sea]]", [("red", 1.21), (" ", 1), ("cat", 1 / 1.1), (" ", 1), ("sea", 1 / 1.21)]),
    ("(cat:1.3), (sea : .5)", [("cat", 1.3), (", ", 1), ("sea ", 0.5)]),
    ("((a:2) b [c])", [("a", 2.2), (" b ", 1.1), ("c", 1)]),
    ("(a:b:1.2)", [("a:b", 1.2)]),
    (r"\(brown\) \[dog\] \\", [("(brown) [dog] \\", 1)]),
    ("(open to the end", [("open to the end", 1.1)]),
    ("a) b] :)", [("a) b] :)", 1)]),
    ("(a](b)", [("a]", 1.1), ("b", 1.1 * 1.1)]),
    ("a (:1.3) b", [("a  b", 1)]),
    ("", [("", 1)]),
    ("(<my-Teddy>:1.3) [V]", [("<my-Teddy>", 1.3), (" [V]", 1)]),
    ("(a [V] dog:1.2)", [("a [V] dog", 1.2)]),
])
def test_the_notation(prompt: str, expected: list[tuple[str, float]]) -> None:
    parts = parse_weights(prompt, ["<my-teddy>", "[v]"])
    assert [part.text for part in parts] == [text for text, _ in expected]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in expected])
    assert plain_text(prompt, ["<my-teddy>", "[v]"]) == "".join(text for text, _ in expected)


def test_a_prompt_without_weights_stays_one_text() -> None:
    assert parse_prompt(PLAIN) == PLAIN and parse_prompt(r"a \(b\)") == "a (b)"


@pytest.mark.parametrize(("prompt", "name"), [
    ("a [dog:cat:0.5]", "prompt editing"), ("a [dog:10]", "prompt editing"), ("a [dog::.5] b", "prompt editing"),
    ("[a [b] c : d : 0.3]", "prompt editing"), ("a [dog|cat]", "alternation"), ("a dog BREAK a beach", "BREAK"),
    ("a dog AND a beach", "AND"), ("a <lora:foo:0.8>", "<lora:foo:0.8>"), ("a <hypernet:x:1>", "hypernetwork"),
    ("a <LyCO:x>", "<LyCO:x>"), ("embedding:foo cat", "embedding:foo"), ("(embedding:foo.pt:1.2)", "ComfyUI"),
    ("a {red|blue} dog", "random choice"), ("a dog++", "Compel"), ("(a dog)1.3", "Compel"), ("(dog:1,3)", "comma"),
])
def test_what_is_not_supported_is_refused_by_name(prompt: str, name: str) -> None:
    with pytest.raises(UserError, match="which is not supported") as refusal:
        check_syntax(prompt)
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompt", [
    "a dog (in the snow)", "A DOG AND A CAT ON A [v]", "break and", "ratio 16:9", r"a \[dog:0.5\]", "a <my-teddy>",
    "[V] dog", "a well-lit -- photo", "<lora:x> a"])
def test_other_text_is_not_refused(prompt: str) -> None:
    check_syntax(prompt, ["[V]", "<lora:x>"])


def test_the_mean_is_restored_unless_it_cannot_be() -> None:
    encoding = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[-1.0, 0.5], [1.0, 1.0]]])
    weights = restore_mean(encoding, torch.tensor([[1.0, 3.0], [8.0, 1.0]]))
    assert weights[0].tolist() == pytest.approx([12 / 30, 3 * 12 / 30])
    assert weights[1].tolist() == [8.0, 1.0]  # the weighted mean is below zero, that of the prompt above


# On a tiny model


@pytest.fixture(scope="module")
def shared_model(shared_model_files: ModelFiles) -> Any:
    return PerfusionPipeline.from_pretrained(shared_model_files.config, device="cpu").model


@pytest.fixture
def pipeline(shared_model: Any, model_files: ModelFiles) -> PerfusionPipeline:
    pipeline = PerfusionPipeline(shared_model, OmegaConf.load(model_files.config))
    pipeline.load_concepts(model_files.teddy)
    return pipeline


def keys_values(pipeline: PerfusionPipeline, encoded: EncodedPrompts, prompt: str) -> torch.Tensor:
    """Return the keys and values of all layers for one prompt, as the sampler gets them."""
    context, _ = encoded.for_requests([GenerationRequest(prompt, 1)])
    layers = pipeline.prompt_encoder(pipeline.concepts).text_layers
    with torch.no_grad():
        return torch.cat([*map(torch.cat, (context.keys_values(name, layer.to_k, layer.to_v)
                                           for name, layer in layers.items()))], -1)


def test_a_weight_multiplies_the_keys_and_values_of_its_tokens(pipeline: PerfusionPipeline) -> None:
    weighted = "a photo of a (<teddy>:1.5) on the [beach]"
    plain = pipeline.encode([PLAIN], pipeline.concepts)
    encoded = pipeline.encode([PLAIN, weighted], pipeline.concepts)
    expected = torch.ones(pipeline.model.cond_stage_model.max_length)
    expected[5], expected[8] = 1.5, 1 / 1.1  # "<start> a photo of a <teddy> on the beach"
    means = [(plain.context.encoding[plain.rows[PLAIN]] * weights).mean() for weights in (1, expected[:, None])]
    factor = means[0] / means[1] if means[0] / means[1] > 0 else 1
    before = keys_values(pipeline, plain, PLAIN)
    assert torch.allclose(keys_values(pipeline, encoded, weighted), before * (expected * factor)[:, None], atol=1e-5)
    assert torch.allclose(keys_values(pipeline, encoded, PLAIN), before, atol=1e-6)


def test_a_plain_prompt_is_encoded_to_the_bit(pipeline: PerfusionPipeline) -> None:
    encoder = pipeline.model.cond_stage_model
    prompts = ["a dog, 16:9", "a cat", ""]
    encoded = pipeline.encode(prompts, [])
    assert encoded.weights is None
    assert torch.equal(encoded.select(prompts).encoding, encoder.encode_tokens(encoder.tokenize(prompts)))


def test_weights_can_be_switched_off(pipeline: PerfusionPipeline) -> None:
    encoder, prompt = pipeline.model.cond_stage_model, "a (cat:1.3)"
    literal = pipeline.encode([prompt], [], prompt_weights=False).select([prompt]).encoding
    assert torch.equal(literal, encoder.encode_tokens(encoder.tokenize([prompt])))
    weighted = pipeline.encode([prompt], []).context
    assert torch.equal(weighted.encoding[:1], encoder.encode_tokens(encoder.tokenize(["a cat"])))


@pytest.mark.slow
def test_images_follow_the_weights_and_a_line_tells_them(
    pipeline: PerfusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    quick: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 1}

    def image(prompt: str, **settings: Any) -> np.ndarray:
        return np.asarray(pipeline(prompt, **quick, **settings).images[0], dtype=int)

    plain = image("a {} on the beach")
    assert np.abs(image("a (<teddy>:1.0) on the beach") - plain).max() <= 1
    assert np.abs(image("a (<teddy>:1.6) on the beach") - plain).max() > 3
    assert "weights of words in the prompts: <teddy> 1.6; write brackets" in caplog.text
    with pytest.raises(UserError, match="BREAK"):
        image("a {} BREAK a cat")
    caplog.clear()
    image("a {} BREAK (a cat)", prompt_weights=False)
    assert "weights of words" not in caplog.text
