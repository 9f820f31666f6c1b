"""CUDA graphs of U-Nets that also read a vector, and of encoders with several towers, with stand-ins for graphs."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sdxl
import torch
from helpers import graph_stand_ins
from helpers.graphed_unets import relative_error
from helpers.oracles import randomize
from helpers.tiny_models import WIDTH, unet_config
from torch import Tensor, nn

from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.context import PromptContext
from ldm.modules.fast.cuda_graphs import GraphedUNet
from ldm.modules.fast.sixteen_bits import to_sixteen_bits
from ldm.util import instantiate_from_config

VECTOR = 6
ROUNDING = 0.03  # relative error of bfloat16; a wrong vector changes the output by 0.07


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> DiffusionWrapper:
    """Return a frozen U-Net that reads a vector, in 16 bits and with graphs, as `enable_fast_inference` makes it."""
    config = unet_config(num_classes="sequential", adm_in_channels=VECTOR, channel_mult=[1])
    wrapper = DiffusionWrapper(config, "crossattn-adm")
    randomize(wrapper, scale=0.1).eval().requires_grad_(False)
    unet = wrapper.diffusion_model
    randomize(unet.label_emb, scale=1.0)  # so that the vector changes the output by far more than rounding does
    to_sixteen_bits(unet, torch.bfloat16)
    wrapper.graphs = GraphedUNet(unet)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph_stand_ins.make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_stand_ins.Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph_stand_ins.recording(graph, unet))
    return wrapper


def prompts(seed: int, cache: bool = False) -> PromptContext:
    generator = torch.Generator().manual_seed(seed)
    encoding, vector = torch.randn(2, 5, WIDTH, generator=generator), torch.randn(2, VECTOR, generator=generator)
    return replace(PromptContext.plain(encoding, cache), vector=vector)


def test_sampling_steps_read_the_vector_of_their_prompts(wrapper: DiffusionWrapper) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 500])
    contexts, outputs = [prompts(seed, cache=True) for seed in (1, 2)], []
    with torch.no_grad():
        for index in (0, 1, 0):  # the graph of the first prompts' sampling serves the others
            context = contexts[index]
            expected = wrapper.diffusion_model(x, t, context=context.encoding, y=context.vector)
            outputs += [wrapper(x, t, c_crossattn=[context]) for _ in range(3)]
            assert all(relative_error(output, expected) < ROUNDING for output in outputs[-3:])
    assert wrapper.graphs.sampling_graph.graph.replays > 3 and relative_error(outputs[0], outputs[3]) > 2 * ROUNDING
    assert torch.equal(contexts[0].vector, prompts(1).vector)  # the graph has a copy of its own


def test_training_steps_read_the_vector_and_return_its_gradient(wrapper: DiffusionWrapper) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7, 500])
    for seed in (1, 2, 3):
        gradients = []
        for graphs in (wrapper.graphs, None):
            context = prompts(seed)
            context.encoding.requires_grad_()
            context.vector.requires_grad_()
            call = wrapper if graphs else lambda x, t, c_crossattn: wrapper.diffusion_model(
                x, t, context=c_crossattn[0], y=c_crossattn[0].vector)
            call(x, t, c_crossattn=[context]).float().square().mean().backward()
            gradients.append((context.encoding.grad, context.vector.grad))
        for graphed, plain in zip(*gradients, strict=True):
            assert plain.abs().max() > 0 and relative_error(graphed, plain) < ROUNDING
    assert len(wrapper.graphs.training_graphs.graphs) == 1


def test_a_vector_given_on_its_own_needs_no_context(wrapper: DiffusionWrapper) -> None:
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7, 500]), prompts(1)
    with torch.no_grad():
        expected = wrapper(x, t, c_crossattn=[context])
        assert torch.equal(wrapper(x, t, c_crossattn=[context.encoding], c_adm=context.vector), expected)
        replaced = replace(context, weights={"out.0.bias": torch.ones(32, dtype=torch.bfloat16)})
        weighted = wrapper(x, t, c_crossattn=[replaced])
    assert relative_error(weighted, expected) > ROUNDING


@pytest.mark.slow
def test_both_towers_run_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pooled encoding continues from what the graph returns, and both get the same gradients as without graphs."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph_stand_ins.make_graphed_callables)
    encoder: Any = randomize(instantiate_from_config(sdxl.small_config().model.params.cond_stage_config), scale=0.3)
    vector = nn.Parameter(torch.randn(1, encoder.embedding_width))
    tokens = encoder.tokenize(["a <it>", "the <it> and a cat"], ["<it>"])

    def encode() -> list[Tensor]:
        encoding, pooled = encoder.encode_with_pooled(tokens, vector)
        (encoding.square().mean() + pooled.square().mean()).backward()
        gradient, vector.grad = vector.grad, None
        return [encoding.detach(), pooled.detach(), gradient]

    expected = encode()
    encoder.enable_fast_inference()
    for one, other in zip(encode(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert [len(tower.graphs.training_graphs.graphs) for tower in encoder.towers] == [1, 1]
