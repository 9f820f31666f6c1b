"""Calling networks by graphs: contexts taken apart and put together, and the same numbers, by stand-ins for graphs or,
where there is a GPU, by real ones."""
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
from ldm.modules.fast.cuda_graphs import MOST_SHAPES, PROMPTS, GraphedUNet, OwnGradient, unpacked
from ldm.modules.fast.sixteen_bits import to_sixteen_bits

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on CUDA only")
ROUNDING = 0.05  # of bfloat16; attention adds gradients up in an order of its own


@pytest.mark.parametrize("edited", [False, True])
def test_contexts_are_put_together_as_they_were(edited: bool) -> None:
    given = unet_inputs(edited)
    context = given.context()
    tensors, rebuilt = unpacked(context)
    again = rebuilt(tensors)
    assert isinstance(again, PromptContext) and again.concept_count == edited
    unet = frozen_unet()
    assert torch.equal(unet(given.x, given.timesteps, context=again), unet(given.x, given.timesteps, context=context))


def test_plain_encodings_stay_plain() -> None:
    encoding = torch.randn(1, 2, 3)
    tensors, rebuilt = unpacked(encoding)
    assert tensors == [encoding] and rebuilt(tensors) is encoding


def test_contexts_of_one_kind_are_alike() -> None:
    first, second, other = (unpacked(one.context())[1] for one in (unet_inputs(True, 1), unet_inputs(True, 2), unet_inputs(False)))
    assert first == second and hash(first) == hash(second)
    assert first != other


def test_gradients_are_copies() -> None:
    place = torch.ones(3)

    class IntoOnePlace(torch.autograd.Function):
        """A graph, as far as gradients are concerned."""

        @staticmethod
        def forward(context: object, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(context: object, gradient: Tensor) -> Tensor:
            return place.detach()

    learned = nn.Parameter(torch.zeros(3))
    for number in (1.0, 10.0):
        place.fill_(number)
        IntoOnePlace.apply(OwnGradient.apply(learned)).backward()
    assert learned.grad.tolist() == [11.0] * 3


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout"):
        GraphedUNet(nn.Sequential(nn.Dropout(0.1)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where there are graphs, or on the CPU what behaves like them."""
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_training_adds_up_the_same_gradients(device: str, edited: bool, checkpointing: bool,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch, checkpointing)
    graphed = GraphedUNet(unet)
    given = unet_inputs(edited, device=device)
    for _ in range(3):  # the first of them captures
        found, exact = (_two_steps(call, given) for call in (graphed, unet))
        for one, other in zip(found, exact, strict=True):
            assert relative_error(one, other) < ROUNDING
        given.x.normal_()
    assert len(graphed.training.graphs) == 1


def _two_steps(call: GraphedUNet | nn.Module, given: UNetInputs) -> list[Tensor]:
    outputs = []
    for shift in (0, 100):
        with torch.autocast(given.x.device.type, torch.bfloat16):
            outputs.append(call(given.x + shift / 100, (given.timesteps + shift) % 1000, context=given.context()))
        outputs[-1].square().mean().backward()
    return [*(output.detach() for output in outputs), *given.take_gradients()]


def test_sampling_draws_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed = GraphedUNet(unet)
    graphs = set()
    cases = [unet_inputs(edited, seed, device=device) for seed, edited in enumerate((True, False, True))]
    contexts = [given.context(cache=True) for given in cases]
    for number in (0, 1, 2, 0):  # a second sampling has prompts of its own, the last has those of the first
        given, context = cases[number], contexts[number]
        with torch.no_grad():
            plain = given.context()
            found = [graphed(given.x + n, given.timesteps // (n + 1), context) for n in range(4)]
            exact = [unet(given.x + n, given.timesteps // (n + 1), context=plain) for n in range(4)]
        for one, other in zip(found, exact, strict=True):
            assert relative_error(one, other) < ROUNDING
        graphs.add(graphed.sampling.graph)
    assert len(graphs) == 1 and None not in graphs and not graphed.training.graphs


def test_a_sampling_after_one_that_memory_was_too_short_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed, capture = GraphedUNet(unet), torch.cuda.graph

    def short_of_memory(graph: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for seed in (1, 2):
        given = unet_inputs(edited=True, seed=seed, device=device)
        context = given.context(cache=True)
        monkeypatch.setattr(torch.cuda, "graph", short_of_memory if seed == 1 else capture)
        with torch.no_grad():
            found = [graphed(given.x, given.timesteps, context)]
            if seed == 1:
                with pytest.raises(torch.OutOfMemoryError):
                    graphed(given.x, given.timesteps, context)
            else:
                found += [graphed(given.x, given.timesteps, context) for _ in range(2)]
            exact = unet(given.x, given.timesteps, context=given.context())
        assert all(relative_error(one, exact) < ROUNDING for one in found)
    assert graphed.sampling.graph is not None


def test_samplings_of_another_shape_get_another_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed, graphs = GraphedUNet(unet), []
    for side in (8, 16):
        prompts = unet_inputs(edited=True, device=device)
        x = prompts.x.repeat(1, 1, side // 8, side // 8)
        with torch.no_grad():
            context = prompts.context(cache=True)
            found = [graphed(x, prompts.timesteps, context) for _ in range(3)]
            exact = unet(x, prompts.timesteps, context=prompts.context())
        graphs.append(graphed.sampling.graph)
        assert all(relative_error(one, exact) < ROUNDING for one in found)
    assert graphs[0] is not graphs[1] and None not in graphs


def test_prompts_that_may_not_come_again_are_not_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, given = GraphedUNet(sixteen_bit_unet(device, monkeypatch)), unet_inputs(edited=True, device=device)
    with torch.no_grad():
        first, second = (graphed(given.x, given.timesteps, given.context()) for _ in range(2))
    assert torch.equal(first, second) and graphed.sampling is None


def test_shapes_beyond_the_first_ones_are_computed_all_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sixteen_bit_unet(device, monkeypatch)
    graphed = GraphedUNet(unet)
    for tokens in range(1, MOST_SHAPES + 3):
        given = unet_inputs(edited=False, device=device)
        encoding = given.encoding.detach()[:, :1].repeat(1, tokens, 1).requires_grad_()
        found = graphed(given.x, given.timesteps, encoding)
        assert relative_error(found, unet(given.x, given.timesteps, context=encoding)) < ROUNDING
    assert len(graphed.training.graphs) == MOST_SHAPES


@pytest.fixture
def encoder(device: str, tmp_path: Path) -> FrozenCLIPEmbedder:
    made = FrozenCLIPEmbedder(write_text_tower(tmp_path), max_length=16)
    randomize(made.transformer, 3)
    return made.to(device)


def test_word_vectors_get_the_same_gradients(encoder: FrozenCLIPEmbedder) -> None:
    vector = nn.Parameter(torch.randn(1, WIDTH, device=encoder.device))

    def learned(prompts: list[str]) -> list[Tensor]:
        """Encodings of two batches of prompts, and the sum of the gradients."""
        encoded = []
        for place in ("", " in the snow"):
            tokens = encoder.tokenize([prompt + place for prompt in prompts], ["<it>"])
            encoded.append(encoder.encode_tokens(tokens, vector))
            encoded[-1].square().mean().backward()
        found, vector.grad = vector.grad, None
        return [*(one.detach() for one in encoded), found]

    prompts = ["a <it>", "the <it> beside a <it>", *(f"{word} <it>" for word in ("red", "new", "old"))]
    counts = (1, PROMPTS + 1, PROMPTS - 1, PROMPTS, 1)
    exact = [learned(prompts[:count]) for count in counts]
    encoder.enable_fast_inference()
    for count, expected in zip(counts, exact, strict=True):
        for one, other in zip(learned(prompts[:count]), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert {key[1][0][0] for key in encoder.graphs.training.graphs} == {1, PROMPTS, 2 * PROMPTS}


def test_prompts_are_not_captured_without_a_gradient(encoder: FrozenCLIPEmbedder) -> None:
    tokens, vector = encoder.tokenize(["a <it>"], ["<it>"]), torch.randn(1, WIDTH, device=encoder.device)
    expected = encoder.encode_tokens(tokens, vector)
    encoder.enable_fast_inference()
    assert torch.equal(encoder.encode_tokens(tokens, vector), expected)
    assert not encoder.graphs.training.graphs
