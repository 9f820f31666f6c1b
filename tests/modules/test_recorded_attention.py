"""Recorded attention against the formula, and against latents that were sampled without recording."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.oracles import randomize
from torch import Tensor, nn

from ldm.inference.encoding import UNCONDITIONAL, EncodedPrompts
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings
from ldm.modules.attention import CrossAttention, name_text_layers
from ldm.modules.attention_maps import AttentionMaps, attention_probabilities, map_size, record_attention
from ldm.modules.context import PromptContext
from ldm.sampling.samplers import SAMPLERS

LATENTS = (8, 8)
EVALUATIONS = {"plms": 5, "heun": 7, "dpmpp_sde": 7}  # of the U-Net in four steps; other samplers need four


def test_probabilities_are_the_weights_of_the_fused_attention() -> None:
    layer = randomize(CrossAttention(16, 10, heads=3, dim_head=8), scale=0.7)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 10)
    keys, values = layer.keys_values(context)
    shares = attention_probabilities(layer.to_q(x), keys, heads=3)
    assert shares.shape == (2, 3, 9, 5) and torch.allclose(shares.sum(-1), torch.ones(2, 3, 9))
    attended = [shares[:, head] @ values[..., 8 * head:8 * head + 8] for head in range(3)]
    assert torch.allclose(layer.to_out(torch.cat(attended, -1)), layer(x, context), atol=1e-5)


def test_probabilities_of_two_tokens_are_a_sigmoid_in_any_precision() -> None:
    query, key = torch.tensor([[[2.0, 0, 1, 1]]]), torch.tensor([[[3.0, 5, 0, 0], [1, 5, 2, 0]]])
    expected = [1 / (1 + math.exp(-difference / math.sqrt(2))) for difference in (2 * (3 - 1), -2.0)]
    with torch.autocast("cpu", torch.bfloat16):
        shares = attention_probabilities(query.bfloat16(), key.bfloat16(), heads=2)
    assert shares.dtype == torch.float32
    assert torch.allclose(shares[0, :, 0, 0], torch.tensor(expected), atol=1e-6)


class TwoLayers(nn.Module):
    """Stands in for a U-Net: cross-attention at two sizes, and self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = (CrossAttention(4, 3, heads=1, dim_head=4) for _ in range(2))
        self.self_attention = CrossAttention(4, heads=1, dim_head=4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.fine(self.self_attention(x), context), self.coarse(x[:, ::4], context)


def test_the_tokens_of_the_word_are_recorded_in_the_last_rows_until_the_context_closes() -> None:
    unet = randomize(TwoLayers(), scale=1.0)
    x, context = torch.randn(4, 32, 4), torch.randn(4, 5, 3)
    words = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = unet(x, context)
    with record_attention(unet, words, (4, 8)) as maps:
        outputs = unet(x, context)
    unet(x, context)
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert {name: [tuple(one.shape) for one in layer] for name, layer in maps.layers.items()} == {
        "fine": [(2, 4, 8)], "coarse": [(2, 2, 4)]}
    scores = unet.coarse.to_q(x[:, ::4]) @ unet.coarse.to_k(context).mT / 2
    shares = scores.softmax(-1)
    (recorded,) = maps.layers["coarse"]
    assert torch.allclose(recorded[0].flatten(), shares[2, :, 1] + shares[2, :, 2], atol=1e-6)
    assert torch.allclose(recorded[1].flatten(), shares[3, :, 4], atol=1e-6)


def test_hooks_are_removed_after_an_error() -> None:
    unet = TwoLayers()
    with pytest.raises(ValueError, match="32 positions do not fit 9x9 latents"), \
            record_attention(unet, torch.ones(1, 5), (9, 9)):
        unet(torch.randn(1, 32, 4), torch.randn(1, 5, 3))
    assert not any(module._forward_hooks for module in unet.modules())


def test_maps_have_the_proportions_of_the_latents() -> None:
    assert map_size(64 * 96, (64, 96)) == (64, 96)
    assert map_size(8 * 12, (64, 96)) == (8, 12)
    for positions, latents in ((97, (64, 96)), (24, (9, 12)), (4 * 64 * 96, (64, 96))):
        with pytest.raises(ValueError, match=f"{positions} positions do not fit"):
            map_size(positions, latents)


def test_groups_are_means_of_consecutive_evaluations() -> None:
    maps = AttentionMaps({"one": [torch.full((2, 4, 4), float(value)) for value in range(7)]})
    assert maps.grouped(3)["one"].shape == (2, 3, 4, 4)
    assert maps.grouped(3)["one"][1, :, 0, 0].tolist() == [1.0, 3.5, 5.5]
    with pytest.raises(ValueError, match="7 evaluations cannot make 8 groups"):
        maps.grouped(8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> PerfusionPipeline:
    folder: Path = tmp_path_factory.mktemp("model")
    return PerfusionPipeline(tiny_models.build_model(folder, unet_config=tiny_models.unet_config()).eval())


PROMPT = "a cat on the beach"
REQUESTS = [GenerationRequest(PROMPT, seed) for seed in (1, 2)]
WORDS = torch.zeros(2, 16).index_fill(1, torch.tensor([2]), 1.0)  # start, a, cat


def sample(pipeline: PerfusionPipeline, requests: list[GenerationRequest], settings: GenerationSettings,
           **weights: Tensor) -> Tensor:
    """Sample latents, with `weights` in place of those of the U-Net."""
    encoding = pipeline.model.cond_stage_model([PROMPT, ""])
    context = PromptContext.plain(encoding, cache=True, weights=weights)
    encoded = EncodedPrompts(context, {PROMPT: 0, UNCONDITIONAL: 1})
    return pipeline.latents(encoded, requests, pipeline.complete(settings))


def mean_maps(pipeline: PerfusionPipeline, requests: list[GenerationRequest], words: Tensor, **weights: Tensor
              ) -> dict[str, Tensor]:
    """Return the maps of three steps with guidance, each a group of its own."""
    settings = GenerationSettings(num_inference_steps=3, guidance_scale=3.0)
    with record_attention(pipeline.model.model.diffusion_model, words, LATENTS) as maps:
        sample(pipeline, requests, settings, **weights)
    return maps.grouped(3)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recording_does_not_change_what_a_sampler_returns(pipeline: PerfusionPipeline, sampler: str, scale: float
                                                          ) -> None:
    unet = pipeline.model.model.diffusion_model
    settings = GenerationSettings(num_inference_steps=4, guidance_scale=scale, sampler=sampler)
    unrecorded = sample(pipeline, REQUESTS, settings)
    with record_attention(unet, WORDS, LATENTS) as maps:
        assert torch.equal(sample(pipeline, REQUESTS, settings), unrecorded)
    assert list(maps.layers) == list(name_text_layers(unet))
    for layer in maps.layers.values():
        assert len(layer) == EVALUATIONS.get(sampler, 4)
        assert all(one.shape[0] == 2 and one.min() > 0 and one.max() < 1 and one.dtype == torch.float32
                   for one in layer)
    assert {tuple(layer[0].shape[1:]) for layer in maps.layers.values()} == {(8, 8), (4, 4)}


@pytest.mark.slow
def test_the_maps_of_an_image_do_not_depend_on_its_batch(pipeline: PerfusionPipeline) -> None:
    together, alone = (mean_maps(pipeline, requests, WORDS[:len(requests)]) for requests in (REQUESTS, REQUESTS[1:]))
    for name, layer in together.items():
        assert torch.allclose(layer[1], alone[name][0], atol=1e-5)
    all_tokens = mean_maps(pipeline, REQUESTS, torch.ones(2, 16))
    assert all(torch.allclose(layer, torch.ones_like(layer)) for layer in all_tokens.values())


def test_weights_that_come_with_prompts_are_used(pipeline: PerfusionPipeline) -> None:
    """As with Custom Diffusion and DreamBooth. A key projection of zeros attends to all tokens evenly."""
    layers = name_text_layers(pipeline.model.model.diffusion_model)
    zeros = {f"{name}.to_k.weight": torch.zeros_like(layer.to_k.weight) for name, layer in layers.items()}
    maps = mean_maps(pipeline, REQUESTS, WORDS, **zeros)
    assert all(torch.allclose(layer, torch.full_like(layer, 1 / 16)) for layer in maps.values())
