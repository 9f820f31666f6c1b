"""The bundled model with a second text encoder, a pooled vector and sizes grafted on, which all change nothing.

The second encoder has random weights. The columns of W_K and W_V that read it are zero, and so is the last layer of the
embedding of the vector. What is left is the bundled model in the shape of Stable Diffusion XL.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.oracles import randomize
from torch import Tensor

from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.concept import Concept
from ldm.inference.encoding import base_model_of
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.attention import name_text_layers
from ldm.modules.covariance_files import load_covariance
from ldm.modules.edit import project_inputs
from ldm.modules.encoders.prompts import PromptEncoder, word_vector
from ldm.modules.rank_one import dual_vectors, invert_covariance, similarity
from ldm.util import instantiate_from_config

MINI = PROJECT_ROOT / "models" / "mini"
WIDTH, SECOND_WIDTH, POOLED, FEATURES, LENGTH = 128, 128, 20, 16, 32
PROMPT, OTHERS = "a photo of a <my-teddy> on the beach", ("a photo of a dog in the forest", "a teapot on a table")
SETTINGS = GenerationSettings(num_inference_steps=3, guidance_scale=2.0)
CLIP_G = {"embed_dim": POOLED,
          "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
          "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": SECOND_WIDTH, "heads": 2, "layers": 3}}


def grafted_pipeline(mini: PerfusionPipeline, folder: Path) -> PerfusionPipeline:
    """Return a pipeline of the bundled model in the shape of Stable Diffusion XL."""
    config = mini.config.copy()
    params = config.model.params
    params.update({"conditioning_key": "crossattn-adm", "ckpt_path": None})
    params.unet_config.params.update({"context_dim": WIDTH + SECOND_WIDTH, "num_classes": "sequential",
                                      "adm_in_channels": POOLED + 6 * FEATURES})
    (folder / "clip_g.json").write_text(json.dumps(CLIP_G))
    encoders = "ldm.modules.encoders.modules"
    second = {"arch": str(folder / "clip_g.json"), "max_length": LENGTH, "layer": "penultimate",
              "always_return_pooled": True, "legacy": False}
    sizes = [{"target": f"{encoders}.ConcatTimestepEmbedderND", "input_key": key, "params": {"outdim": FEATURES}}
             for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")]
    params.cond_stage_config = {"target": f"{encoders}.GeneralConditioner", "params": {"emb_models": [
        {**params.cond_stage_config, "input_key": "txt"},
        {"target": f"{encoders}.FrozenOpenCLIPEmbedder2", "input_key": "txt", "params": second}, *sizes]}}
    model = instantiate_from_config(config.model).eval().requires_grad_(False)
    randomize(model, 1, scale=0.2)
    wide = model.state_dict()
    model.load_state_dict({key: grafted(wide[key], value) for key, value in renamed(mini.model.state_dict()).items()},
                          strict=False)
    for parameter in model.model.diffusion_model.label_emb[0][2].parameters():
        parameter.zero_()
    model.to(memory_format=torch.channels_last)  # as models are loaded: sums are then rounded alike
    model.cond_stage_model.zeroes_unconditional = False  # the bundled model was trained on the empty prompt
    return PerfusionPipeline(model, config)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("cond_stage_model.", "conditioner.embedders.0."): value for key, value in state.items()}


def grafted(wide: Tensor, narrow: Tensor) -> Tensor:
    """Return `narrow` in the shape of `wide`, with zero columns where it has none."""
    if wide.shape == narrow.shape:
        return narrow
    return torch.nn.functional.pad(narrow, (0, wide.shape[-1] - narrow.shape[-1]))


@pytest.fixture(scope="module")
def mini() -> PerfusionPipeline:
    return PerfusionPipeline.from_pretrained(MINI, device="cpu")


@pytest.fixture(scope="module")
def wide(mini: PerfusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> PerfusionPipeline:
    return grafted_pipeline(mini, tmp_path_factory.mktemp("grafted"))


def latents(pipeline: PerfusionPipeline, prompt: str, concepts: Sequence[Concept] = ()) -> Tensor:
    """Return the latents of one image, (1, C, h, w), after a few steps."""
    requests = [GenerationRequest(prompt, 3)]
    encoded = pipeline.encode([prompt, ""], concepts)
    return pipeline.latents(encoded, requests, pipeline.complete(SETTINGS))


def encoding_of(encoder: PromptEncoder, word: str, vectors: Tensor | None = None) -> Tensor:
    """Return the encoding (d,) of a word in the test's prompt."""
    tokens = encoder.tokenize([PROMPT.replace("<my-teddy>", word)], [word])
    return encoder.encode_tokens(tokens, vectors)[tokens >= encoder.vocabulary_size][0]


@pytest.fixture(scope="module")
def concept(mini: PerfusionPipeline) -> Concept:
    """A concept on the bundled model, as training might leave it: near a teddy bear, with other values."""
    encoder, generator = mini.model.cond_stage_model, torch.Generator().manual_seed(5)
    start = word_vector(encoder, "teddy bear")
    embedding = start + 0.1 * start.norm() * torch.randn(start.shape, generator=generator) / WIDTH**0.5
    super_input, target_input = encoding_of(encoder, "<x>", start), encoding_of(encoder, "<x>", embedding)
    values = project_inputs(name_text_layers(mini.model.model.diffusion_model), super_input[None], "to_v")
    inverse = invert_covariance(load_covariance(MINI / "covariance.safetensors"))
    return Concept(
        placeholder="<my-teddy>", super_category="teddy bear", embedding=embedding, target_input=target_input,
        super_input=super_input, dual=dual_vectors(target_input[None], inverse)[0],
        target_outputs_v={name: value[0] + 0.5 * value[0].norm() * torch.randn(value[0].shape, generator=generator)
                          / len(value[0])**0.5 for name, value in values.items()},
        bias=0.6, projection="gated")


def lifted(concept: Concept, encoder: PromptEncoder, dual: Tensor) -> Concept:
    """Return the concept on the grafted model: its word and inputs in the second encoder are the super-category's."""
    second = word_vector(encoder, concept.super_category)[:, WIDTH:]
    word = torch.cat([concept.embedding, second], -1)
    padding = encoding_of(encoder, "<x>", word)[WIDTH:]
    return replace(concept, embedding=word, word_parts=dict(encoder.word_parts), dual=dual,
                   target_input=torch.cat([concept.target_input, padding]),
                   super_input=torch.cat([concept.super_input, padding]))


def test_images_are_those_of_the_bundled_model(mini: PerfusionPipeline, wide: PerfusionPipeline) -> None:
    for prompt in OTHERS:
        expected = latents(mini, prompt)
        torch.testing.assert_close(latents(wide, prompt), expected, rtol=0, atol=1e-6)  # in fact the same bits


def test_a_concept_lifted_with_a_padded_dual_gives_the_same_image(mini: PerfusionPipeline, wide: PerfusionPipeline,
                                                                  concept: Concept) -> None:
    """A dual of zeros in the second encoder reads the first one only; so does every layer."""
    encoder = wide.model.cond_stage_model
    padded = torch.cat([concept.dual, torch.zeros(SECOND_WIDTH)])
    wide_concept = replace(lifted(concept, encoder, padded), base=base_model_of(wide.model).fingerprint)
    expected = latents(mini, PROMPT, [concept])
    assert (expected - latents(mini, PROMPT.replace("<my-teddy>", "teddy bear"))).abs().max() > 0.1
    torch.testing.assert_close(latents(wide, PROMPT, [wide_concept]), expected, rtol=0, atol=1e-5)


def test_a_block_diagonal_covariance_averages_the_similarities_by_energy(wide: PerfusionPipeline, concept: Concept
                                                                         ) -> None:
    """If the encoders' outputs were not correlated: s = (E_1 s_1 + E_2 s_2) / (E_1 + E_2), of energies E."""
    encoder = wide.model.cond_stage_model
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for width in (WIDTH, SECOND_WIDTH):
        root = torch.randn(width, width, generator=generator)
        blocks.append(invert_covariance(root @ root.mT + torch.eye(width)))
    target = lifted(concept, encoder, torch.empty(0)).target_input[None]
    encoding = encoder.encode_tokens(encoder.tokenize([*OTHERS, PROMPT.replace("<my-teddy>", "cat")]))
    together = similarity(encoding, target, dual_vectors(target, torch.block_diag(*blocks)))
    energies, alone = [], []
    for block, own, part in zip(blocks, target.split([WIDTH, SECOND_WIDTH], -1),
                                encoding.split([WIDTH, SECOND_WIDTH], -1), strict=True):
        dual = dual_vectors(own, block)
        energies.append((own * dual).sum())
        alone.append(similarity(part, own, dual))
    expected = (energies[0] * alone[0] + energies[1] * alone[1]) / sum(energies)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
