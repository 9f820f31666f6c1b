"""Recorded attention against the formula, and against pictures drawn without a recording."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.oracles import randomize
from torch import Tensor, nn

from ldm.inference.sampling import EncodedPrompts, Job, Sampling, draw_latents
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.modules.attention import PerfusionCrossAttention, name_text_layers
from ldm.modules.attention_maps import AttentionMaps, attention_probabilities, map_size, recorded_attention
from ldm.modules.context import PromptContext

LATENTS = (8, 8)
EVALUATIONS = {"plms": 5, "heun": 7}  # of the U-Net in four steps, where not one each


def test_probabilities_are_what_the_fused_attention_weighs_values_by() -> None:
    layer = randomize(PerfusionCrossAttention(16, 10, heads=3, dim_head=8), scale=0.7)
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
    """Stands in for a U-Net: attends to a text at two sizes, and to the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = (PerfusionCrossAttention(4, 3, heads=1, dim_head=4) for _ in range(2))
        self.itself = PerfusionCrossAttention(4, heads=1, dim_head=4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.fine(self.itself(x), context), self.coarse(x[:, ::4], context)


def test_the_last_rows_and_the_words_tokens_are_recorded_and_nothing_afterwards() -> None:
    unet = randomize(TwoLayers(), scale=1.0)
    x, context = torch.randn(4, 32, 4), torch.randn(4, 5, 3)
    words = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    expected = unet(x, context)
    with recorded_attention(unet, words, (4, 8)) as maps:
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


def test_hooks_go_when_drawing_fails() -> None:
    unet = TwoLayers()
    with pytest.raises(ValueError, match="32 positions are no halved map of 9x9 latents"), \
            recorded_attention(unet, torch.ones(1, 5), (9, 9)):
        unet(torch.randn(1, 32, 4), torch.randn(1, 5, 3))
    assert not any(module._forward_hooks for module in unet.modules())


def test_maps_have_the_latents_proportions() -> None:
    assert map_size(64 * 96, (64, 96)) == (64, 96)
    assert map_size(8 * 12, (64, 96)) == (8, 12)
    for positions, latents in ((97, (64, 96)), (24, (9, 12)), (4 * 64 * 96, (64, 96))):
        with pytest.raises(ValueError, match=f"{positions} positions"):
            map_size(positions, latents)


def test_groups_are_means_of_consecutive_evaluations() -> None:
    maps = AttentionMaps({"one": [torch.full((2, 4, 4), float(value)) for value in range(7)]})
    assert maps.grouped(3)["one"].shape == (2, 3, 4, 4)
    assert maps.grouped(3)["one"][1, :, 0, 0].tolist() == [1.0, 3.5, 5.5]
    with pytest.raises(ValueError, match="7 evaluations cannot make 8 groups"):
        maps.grouped(8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = tmp_path_factory.mktemp("model")
    return tiny_models.build_model(folder, unet_config=tiny_models.unet_config()).eval()


def encoded(model: nn.Module, **weights: Tensor) -> EncodedPrompts:
    encoding = model.cond_stage_model(["a cat on the beach", ""])
    return EncodedPrompts(PromptContext.plain(encoding, cache=True, weights=weights), {"a cat on the beach": 0, "": 1})


JOBS = [Job("a cat on the beach", seed) for seed in (1, 2)]
WORDS = torch.zeros(2, 16).index_fill(1, torch.tensor([2]), 1.0)  # start, a, cat


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_draws_another_picture_while_it_is_recorded(model: nn.Module, sampler: str, scale: float) -> None:
    sampling = Sampling(LATENTS, steps=4, scale=scale, sampler=sampler)
    unrecorded = draw_latents(model, encoded(model), JOBS, sampling)
    with recorded_attention(model.model.diffusion_model, WORDS, LATENTS) as maps:
        assert torch.equal(draw_latents(model, encoded(model), JOBS, sampling), unrecorded)
    assert list(maps.layers) == list(name_text_layers(model.model.diffusion_model))
    for layer in maps.layers.values():
        assert len(layer) == EVALUATIONS.get(sampler, 4)
        assert all(one.shape[0] == 2 and one.min() > 0 and one.max() < 1 and one.dtype == torch.float32
                   for one in layer)
    assert {tuple(layer[0].shape[1:]) for layer in maps.layers.values()} == {(8, 8), (4, 4)}


def test_a_pictures_maps_are_those_of_its_own_prompt(model: nn.Module) -> None:
    sampling = Sampling(LATENTS, steps=3, scale=3.0)
    together, alone = (
        _maps_of(model, jobs, sampling, WORDS[:len(jobs)]) for jobs in (JOBS, JOBS[1:]))
    for name, layer in together.items():
        assert torch.allclose(layer[1], alone[name][0], atol=1e-5)
    every = _maps_of(model, JOBS, sampling, torch.ones(2, 16))
    assert all(torch.allclose(layer, torch.ones_like(layer)) for layer in every.values())


def test_weights_that_come_with_prompts_are_those_that_attend(model: nn.Module) -> None:
    """As in Custom Diffusion and DreamBooth: a key projection of nothing attends evenly."""
    layers = name_text_layers(model.model.diffusion_model)
    zeros = {f"{name}.to_k.weight": torch.zeros_like(layer.to_k.weight) for name, layer in layers.items()}
    maps = _maps_of(model, JOBS, Sampling(LATENTS, steps=3, scale=3.0), WORDS, **zeros)
    assert all(torch.allclose(layer, torch.full_like(layer, 1 / 16)) for layer in maps.values())


def _maps_of(model: nn.Module, jobs: list[Job], sampling: Sampling, words: Tensor, **weights: Tensor
             ) -> dict[str, Tensor]:
    with recorded_attention(model.model.diffusion_model, words, sampling.latent_size) as maps:
        draw_latents(model, encoded(model, **weights), jobs, sampling)
    return maps.grouped(3)
