"""CUDA graphs of the U-Net and the text encoder: the same results as without graphs.

Without a GPU the tests use stand-ins for graphs, which write to the same memory in every step as real graphs do.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import graph_stand_ins
from helpers.graphed_unets import UNetInputs, frozen_unet, relative_error, unet_inputs
from helpers.oracles import randomize
from helpers.tiny_models import WIDTH, write_text_tower
from torch import Tensor, nn

from ldm.modules.context import PromptContext
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.fast.cuda_graphs import (
    MAX_TRAINING_GRAPHS,
    PROMPT_MULTIPLE,
    CopyGradient,
    GraphedUNet,
    flatten_context,
)
from ldm.modules.fast.sixteen_bits import to_sixteen_bits

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on CUDA only")
ROUNDING = 0.05  # relative error of bfloat16; attention sums gradients in another order


@pytest.mark.slow
@pytest.mark.parametrize("with_concept", [False, True])
def test_rebuilt_contexts_give_the_same_result(with_concept: bool) -> None:
    inputs = unet_inputs(with_concept)
    context = inputs.context()
    tensors, layout = flatten_context(context)
    rebuilt = layout.rebuild(tensors)
    assert isinstance(rebuilt, PromptContext) and rebuilt.concept_count == with_concept
    unet = frozen_unet()
    expected = unet(inputs.x, inputs.timesteps, context=context)
    assert torch.equal(unet(inputs.x, inputs.timesteps, context=rebuilt), expected)


def test_plain_encodings_are_rebuilt_as_tensors() -> None:
    encoding = torch.randn(1, 2, 3)
    tensors, layout = flatten_context(encoding)
    assert tensors == [encoding] and layout.rebuild(tensors) is encoding


def test_contexts_with_the_same_layers_have_equal_layouts() -> None:
    inputs = unet_inputs(True, 1), unet_inputs(True, 2), unet_inputs(False)
    first, second, other = (flatten_context(one.context())[1] for one in inputs)
    assert first == second and hash(first) == hash(second)
    assert first != other


def test_gradients_are_copies() -> None:
    memory = torch.ones(3)

    class GraphStandIn(torch.autograd.Function):
        """Returns its gradient in the same memory each time, like a graph."""

        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            return memory.detach()

    parameter = nn.Parameter(torch.zeros(3))
    for value in (1.0, 10.0):
        memory.fill_(value)
        GraphStandIn.apply(CopyGradient.apply(parameter)).backward()
    assert parameter.grad.tolist() == [11.0] * 3


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout"):
        GraphedUNet(nn.Sequential(nn.Dropout(0.1)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CUDA, if there is a GPU, and the CPU with stand-ins for graphs."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph_stand_ins.make_graphed_callables)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_stand_ins.Graph)
    return request.param


def sixteen_bit_unet(device: str, monkeypatch: pytest.MonkeyPatch, checkpointing: bool = False) -> nn.Module:
    unet = frozen_unet(checkpointing).to(device)
    to_sixteen_bits(unet, torch.bfloat16)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph_stand_ins.recording(graph, unet))
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("with_concept", [False, True])
def test_training_accumulates_the_same_gradients(device: str, with_concept: bool, checkpointing: bool,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch, checkpointing)
    graphed = GraphedUNet(unet)
    inputs = unet_inputs(with_concept, device=device)
    for _ in range(3):  # the first iteration captures the graph
        actual, expected = (_two_steps(call, inputs) for call in (graphed, unet))
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < ROUNDING
        inputs.x.normal_()
    assert len(graphed.training_graphs.graphs) == 1


def _two_steps(call: GraphedUNet | nn.Module, inputs: UNetInputs) -> list[Tensor]:
    """Return the outputs of two steps, and the gradients accumulated over both."""
    outputs = []
    for shift in (0, 100):
        with torch.autocast(inputs.x.device.type, torch.bfloat16):
            outputs.append(call(inputs.x + shift / 100, (inputs.timesteps + shift) % 1000, context=inputs.context()))
        outputs[-1].square().mean().backward()
    return [*(output.detach() for output in outputs), *inputs.take_gradients()]


@pytest.mark.slow
def test_sampling_gives_the_same_results(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed = GraphedUNet(unet)
    graphs = set()
    cases = [unet_inputs(with_concept, seed, device=device) for seed, with_concept in enumerate((True, False, True))]
    contexts = [inputs.context(cache=True) for inputs in cases]
    for index in (0, 1, 2, 0):  # each sampling has other prompts; the last one has those of the first
        inputs, context = cases[index], contexts[index]
        with torch.no_grad():
            plain = inputs.context()
            actual = [graphed(inputs.x + n, inputs.timesteps // (n + 1), context) for n in range(4)]
            expected = [unet(inputs.x + n, inputs.timesteps // (n + 1), context=plain) for n in range(4)]
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) < ROUNDING
        graphs.add(graphed.sampling_graph.graph)
    assert len(graphs) == 1 and None not in graphs and not graphed.training_graphs.graphs


@pytest.mark.slow
def test_sampling_works_after_one_that_ran_out_of_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed, capture = GraphedUNet(unet), torch.cuda.graph

    def run_out_of_memory(graph: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for seed in (1, 2):
        inputs = unet_inputs(with_concept=True, seed=seed, device=device)
        context = inputs.context(cache=True)
        monkeypatch.setattr(torch.cuda, "graph", run_out_of_memory if seed == 1 else capture)
        with torch.no_grad():
            actual = [graphed(inputs.x, inputs.timesteps, context)]
            if seed == 1:
                with pytest.raises(torch.OutOfMemoryError):
                    graphed(inputs.x, inputs.timesteps, context)
            else:
                actual += [graphed(inputs.x, inputs.timesteps, context) for _ in range(2)]
            expected = unet(inputs.x, inputs.timesteps, context=inputs.context())
        assert all(relative_error(one, expected) < ROUNDING for one in actual)
    assert graphed.sampling_graph.graph is not None


@pytest.mark.slow
def test_each_shape_has_its_own_sampling_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed, graphs = GraphedUNet(unet), []
    for side in (8, 16):
        prompts = unet_inputs(with_concept=True, device=device)
        x = prompts.x.repeat(1, 1, side // 8, side // 8)
        with torch.no_grad():
            context = prompts.context(cache=True)
            actual = [graphed(x, prompts.timesteps, context) for _ in range(3)]
            expected = unet(x, prompts.timesteps, context=prompts.context())
        graphs.append(graphed.sampling_graph.graph)
        assert all(relative_error(one, expected) < ROUNDING for one in actual)
    assert graphs[0] is not graphs[1] and None not in graphs


def test_prompts_that_are_not_cached_are_not_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, inputs = GraphedUNet(sixteen_bit_unet(device, monkeypatch)), unet_inputs(with_concept=True, device=device)
    with torch.no_grad():
        first, second = (graphed(inputs.x, inputs.timesteps, inputs.context()) for _ in range(2))
    assert torch.equal(first, second) and graphed.sampling_graph is None


@pytest.mark.slow
def test_shapes_beyond_the_limit_run_without_a_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed = GraphedUNet(unet)
    for tokens in range(1, MAX_TRAINING_GRAPHS + 3):
        inputs = unet_inputs(with_concept=False, device=device)
        encoding = inputs.encoding.detach()[:, :1].repeat(1, tokens, 1).requires_grad_()
        actual = graphed(inputs.x, inputs.timesteps, encoding)
        assert relative_error(actual, unet(inputs.x, inputs.timesteps, context=encoding)) < ROUNDING
    assert len(graphed.training_graphs.graphs) == MAX_TRAINING_GRAPHS


@pytest.fixture
def encoder(device: str, tmp_path: Path) -> FrozenCLIPEmbedder:
    encoder = FrozenCLIPEmbedder(write_text_tower(tmp_path), max_length=16)
    randomize(encoder.transformer, 3)
    return encoder.to(device)


def test_word_vectors_get_the_same_gradients(encoder: FrozenCLIPEmbedder) -> None:
    vector = nn.Parameter(torch.randn(1, WIDTH, device=encoder.device))

    def encode(prompts: list[str]) -> list[Tensor]:
        """Return the encodings of two batches of prompts, and the accumulated gradient."""
        encodings = []
        for ending in ("", " in the snow"):
            tokens = encoder.tokenize([prompt + ending for prompt in prompts], ["<it>"])
            encodings.append(encoder.encode_tokens(tokens, vector))
            encodings[-1].square().mean().backward()
        gradient, vector.grad = vector.grad, None
        return [*(encoding.detach() for encoding in encodings), gradient]

    prompts = ["a <it>", "the <it> beside a <it>", *(f"{word} <it>" for word in ("red", "new", "old"))]
    counts = (1, PROMPT_MULTIPLE + 1, PROMPT_MULTIPLE - 1, PROMPT_MULTIPLE, 1)
    expected = [encode(prompts[:count]) for count in counts]
    encoder.enable_fast_inference()
    for count, results in zip(counts, expected, strict=True):
        for one, other in zip(encode(prompts[:count]), results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    batch_sizes = {shapes[1][0][0] for shapes in encoder.graphs.training_graphs.graphs}
    assert batch_sizes == {1, PROMPT_MULTIPLE, 2 * PROMPT_MULTIPLE}


def test_prompts_without_a_gradient_are_not_captured(encoder: FrozenCLIPEmbedder) -> None:
    tokens, vector = encoder.tokenize(["a <it>"], ["<it>"]), torch.randn(1, WIDTH, device=encoder.device)
    expected = encoder.encode_tokens(tokens, vector)
    encoder.enable_fast_inference()
    assert torch.equal(encoder.encode_tokens(tokens, vector), expected)
    assert not encoder.graphs.training_graphs.graphs
