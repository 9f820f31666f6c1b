"""Contexts: the edit reaches a layer as Eq. 3 says, batches join without mixing concepts, caches are used."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ldm.modules.context import Edit, PromptContext, locked_keys
from ldm.modules.rank_one import invert_covariance

WIDTH, TOKENS = 6, 4
INNER = {"input_blocks.1.1.attn2": 5, "middle_block.1.attn2": 8}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def layers() -> dict[str, SimpleNamespace]:
    torch.manual_seed(0)
    return {
        name: SimpleNamespace(to_k=nn.Linear(WIDTH, p, bias=False), to_v=nn.Linear(WIDTH, p, bias=False))
        for name, p in INNER.items()
    }


@pytest.fixture(scope="module")
def inverse() -> Tensor:
    sample = draw(50, WIDTH, seed=1)
    return invert_covariance(sample.T @ sample / 50)


def edit_of(layers: dict[str, SimpleNamespace], count: int, seed: int) -> Edit:
    return Edit(
        target_inputs=draw(count, WIDTH, seed=seed),
        biases=torch.full((count,), 0.6),
        temperatures=torch.full((count,), 0.2),
        target_outputs_v={name: draw(count, p, seed=seed + 1) for name, p in INNER.items()},
        target_outputs_k=locked_keys(layers, draw(count, WIDTH, seed=seed + 2)),
    )


def keys_values(context: PromptContext, layers: dict[str, SimpleNamespace]) -> list[Tensor]:
    return [x for name, layer in layers.items() for x in context.keys_values(name, layer.to_k, layer.to_v)]


def assert_rows(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def equation_3(edit: Edit, encoding: Tensor, inverse: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    """One concept in float64."""
    e, i, metric, w = (x.detach().double() for x in (encoding, edit.target_inputs[0], inverse, weight))
    s = (e @ metric @ i) / (i @ metric @ i)
    opened = torch.sigmoid((s - edit.biases[0].double()) / edit.temperatures[0].double())
    return ((e - s[..., None] * i) @ w.T + opened[..., None] * output.double()).float()


def test_plain_context_is_the_plain_projection(layers: dict[str, SimpleNamespace]) -> None:
    encoding = draw(2, TOKENS, WIDTH)
    context = PromptContext.plain(encoding)
    assert (context.shape, context.batch_size, context.concept_count) == ((2, TOKENS, WIDTH), 2, 0)
    assert (context.device, context.dtype) == (encoding.device, torch.float32)
    for name, layer in layers.items():
        key, value = context.keys_values(name, layer.to_k, layer.to_v)
        assert torch.equal(key, layer.to_k(encoding))
        assert torch.equal(value, layer.to_v(encoding))


def test_local_locking_edits_keys_and_values_by_equation_3(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding = edit_of(layers, 1, seed=10), draw(2, TOKENS, WIDTH)
    context = edit.context(encoding, inverse)
    for name, layer in layers.items():
        key, value = context.keys_values(name, layer.to_k, layer.to_v)
        locked = layer.to_k.weight.detach() @ draw(1, WIDTH, seed=12)[0]
        expected = equation_3(edit, encoding, inverse, layer.to_k.weight, locked)
        torch.testing.assert_close(key, expected, rtol=1e-4, atol=1e-5)
        expected = equation_3(edit, encoding, inverse, layer.to_v.weight, edit.target_outputs_v[name][0])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_gated_projection_takes_out_as_much_as_its_gate_is_open(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding = replace(edit_of(layers, 1, seed=10), projections=["gated"]), draw(2, TOKENS, WIDTH)
    context = edit.context(encoding, inverse)
    e, i, metric = (x.double() for x in (encoding, edit.target_inputs[0], inverse))
    s = (e @ metric @ i) / (i @ metric @ i)
    opened = torch.sigmoid((s - 0.6) / 0.2)[..., None]
    assert opened.min() < 0.3 < opened.max()
    for name, layer in layers.items():
        _, value = context.keys_values(name, layer.to_k, layer.to_v)
        expected = (e - opened * s[..., None] * i) @ layer.to_v.weight.detach().double().T
        expected += opened * edit.target_outputs_v[name][0].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("projections", "same_as"), [
    (("gated", "gated"), "plain"), (("full", "gated"), "full"), (("full", "full"), "full")])
def test_behind_shut_gates_only_a_full_projection_changes_a_prompt(
    layers: dict[str, SimpleNamespace], inverse: Tensor, projections: tuple[str, ...], same_as: str
) -> None:
    """And one full projection among several is that of all."""
    shut = replace(edit_of(layers, 2, seed=10), biases=torch.full((2,), 1e3))
    encoding = draw(2, TOKENS, WIDTH)
    alike = {"plain": PromptContext.plain(encoding), "full": shut.context(encoding, inverse)}
    found = keys_values(replace(shut, projections=projections).context(encoding, inverse), layers)
    assert_rows(found, keys_values(alike[same_as], layers))
    other = keys_values(alike[{"plain": "full", "full": "plain"}[same_as]], layers)
    assert not torch.allclose(found[0], other[0], atol=1e-2)


@pytest.mark.parametrize("projection", ["full", "gated"])
def test_concepts_that_do_not_act_on_a_prompt_leave_no_trace_of_themselves(
    layers: dict[str, SimpleNamespace], inverse: Tensor, projection: str
) -> None:
    both = replace(edit_of(layers, 2, seed=10), projections=[projection] * 2)
    first = replace(both, **{name: getattr(both, name)[:1] for name in
                             ("target_inputs", "biases", "temperatures", "projections")},
                    target_outputs_v={name: o[:1] for name, o in both.target_outputs_v.items()},
                    target_outputs_k={name: o[:1] for name, o in both.target_outputs_k.items()})
    encoding, acting = draw(2, TOKENS, WIDTH), torch.tensor([[True, False], [False, False]])
    context = both.context(encoding, inverse).mask_concepts(acting, both.target_inputs, inverse, both.projections)
    alone = first.context(encoding[:1], inverse)
    assert_rows(keys_values(context.select([0]), layers), keys_values(alone, layers))
    assert_rows(keys_values(context.select([1]), layers), keys_values(PromptContext.plain(encoding[1:]), layers))


def test_global_locking_takes_all_keys_from_the_super_category(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding, super_encoding = edit_of(layers, 2, seed=10), draw(2, TOKENS, WIDTH), draw(2, TOKENS, WIDTH, seed=3)
    locally = edit.context(encoding, inverse)
    globally = edit.context(encoding, inverse, super_encoding)
    for name, layer in layers.items():
        key, value = globally.keys_values(name, layer.to_k, layer.to_v)
        torch.testing.assert_close(key, layer.to_k(super_encoding))
        assert torch.equal(value, locally.keys_values(name, layer.to_k, layer.to_v)[1])
    with pytest.raises(ValueError, match="super_encoding"):
        edit.context(encoding, inverse, super_encoding[:, 1:])


def test_gradients_reach_the_encoding_and_the_values_only(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding = edit_of(layers, 1, seed=10), draw(1, TOKENS, WIDTH).requires_grad_()
    edit.target_outputs_v = {name: nn.Parameter(o) for name, o in edit.target_outputs_v.items()}
    sum(x.square().sum() for x in keys_values(edit.context(encoding, inverse), layers)).backward()
    assert encoding.grad.abs().sum() > 0
    assert all(o.grad.abs().sum() > 0 for o in edit.target_outputs_v.values())
    assert not any(o.requires_grad for o in edit.target_outputs_k.values())


@pytest.mark.parametrize("locked_globally", [False, True])
def test_cat_keeps_every_prompt_as_it_was(
    layers: dict[str, SimpleNamespace], inverse: Tensor, locked_globally: bool
) -> None:
    encodings = [draw(n, TOKENS, WIDTH, seed=20 + n) for n in (1, 2, 3, 1)]
    one, other = edit_of(layers, 2, seed=10), edit_of(layers, 1, seed=30)
    stead = draw(2, TOKENS, WIDTH, seed=40) if locked_globally else None
    parts = [
        PromptContext.plain(encodings[0]),
        one.context(encodings[1], inverse, stead),
        other.context(encodings[2], inverse),
        one.context(encodings[3], inverse),
    ]
    whole = PromptContext.cat(parts)
    assert whole.batch_size == 7
    assert whole.concept_count == 3  # those of `one` are not there twice
    assert torch.equal(whole.encoding, torch.cat(encodings))
    expected = [torch.cat(rows) for rows in zip(*(keys_values(part, layers) for part in parts), strict=True)]
    assert_rows(keys_values(whole, layers), expected)
    assert_rows(keys_values(PromptContext.cat(parts[::-1]).select([6, 4, 5, 1, 2, 3, 0]), layers), expected)


def test_cat_of_plain_contexts_stays_plain(layers: dict[str, SimpleNamespace]) -> None:
    encoding = draw(2, TOKENS, WIDTH)
    whole = PromptContext.cat([PromptContext.plain(encoding[:1]), PromptContext.plain(encoding[1:])])
    assert whole.concept_count == 0
    assert_rows(keys_values(whole, layers), keys_values(PromptContext.plain(encoding), layers))


@pytest.mark.parametrize("stead", [False, True])
def test_repeat_and_select(layers: dict[str, SimpleNamespace], inverse: Tensor, stead: bool) -> None:
    edit, encoding = edit_of(layers, 2, seed=10), draw(3, TOKENS, WIDTH)
    context = edit.context(encoding, inverse, draw(3, TOKENS, WIDTH, seed=3) if stead else None)
    full = keys_values(context, layers)
    assert_rows(keys_values(context.repeat(2), layers), [x.repeat(2, 1, 1) for x in full])
    assert context.repeat(2).concept_count == 2
    for rows in (slice(1, None), [2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True])):
        assert_rows(keys_values(context.select(rows), layers), [x[rows] for x in full])


def test_cache_computes_each_layer_once(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    edit, encoding = edit_of(layers, 1, seed=10), draw(1, TOKENS, WIDTH)
    cached, fresh = edit.context(encoding, inverse, cache=True), edit.context(encoding, inverse)
    first, again = keys_values(cached, layers), keys_values(cached, layers)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert_rows(first, keys_values(fresh, layers))
    assert keys_values(fresh, layers)[0] is not keys_values(fresh, layers)[0]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("globally", [False, True])
def test_all_layers_at_once_are_the_layers_one_by_one(layers: dict[str, SimpleNamespace], inverse: Tensor, count: int,
                                                      globally: bool) -> None:
    encoding, instead = draw(2, TOKENS, WIDTH), draw(2, TOKENS, WIDTH, seed=3) if globally else None

    def context(cache: bool = False) -> PromptContext:
        if not count:
            return PromptContext.plain(encoding, cache)
        return edit_of(layers, count, seed=10).context(encoding, inverse, instead, cache)

    expected = keys_values(context(), layers)
    fresh, cached = context(), context(cache=True)
    assert_rows(keys_values(fresh.with_keys_values(layers), layers), expected)
    assert fresh.with_keys_values(layers) is not fresh, "what is learned changes, so that nothing is to stay"
    assert cached.with_keys_values(layers) is cached.with_keys_values(layers) is cached
    assert_rows(keys_values(cached, layers), expected)


def test_what_is_made_of_a_cached_context_starts_empty(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    context = edit_of(layers, 1, seed=10).context(draw(2, TOKENS, WIDTH), inverse, cache=True)
    full = keys_values(context, layers)
    assert_rows(keys_values(context.select(slice(1)), layers), [x[:1] for x in full])
    joined = PromptContext.cat([context, context])
    assert joined.cache
    assert not PromptContext.cat([context, PromptContext.plain(draw(1, TOKENS, WIDTH))]).cache
    assert_rows(keys_values(joined, layers), [x.repeat(2, 1, 1) for x in full])


def test_to_changes_every_tensor(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    context = edit_of(layers, 2, seed=10).context(draw(1, TOKENS, WIDTH), inverse, draw(1, TOKENS, WIDTH, seed=3))
    moved = context.to(torch.float64)
    assert moved.dtype == torch.float64
    tables = (*moved.target_outputs_v.values(), *moved.target_outputs_k.values())
    everything = (moved.projected, moved.gates, moved.key_projected, moved.key_gates, *tables)
    assert all(tensor.dtype == torch.float64 for tensor in everything)
    assert context.to("meta").device.type == "meta"
    assert context.dtype == torch.float32


def test_half_precision_model(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    """Concepts and C^-1 stay in float32 where the model runs in half."""
    edit, encoding = edit_of(layers, 1, seed=10), draw(1, TOKENS, WIDTH)
    context = edit.context(encoding.bfloat16(), inverse)
    layer = layers["middle_block.1.attn2"]
    half = [nn.Linear(WIDTH, 8, bias=False).bfloat16() for _ in range(2)]
    half[0].weight.data.copy_(layer.to_k.weight)
    half[1].weight.data.copy_(layer.to_v.weight)
    found = context.keys_values("middle_block.1.attn2", *half)
    expected = edit.context(encoding, inverse).keys_values("middle_block.1.attn2", layer.to_k, layer.to_v)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


def test_layer_that_no_concept_knows_is_named(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    context = edit_of(layers, 1, seed=10).context(draw(1, TOKENS, WIDTH), inverse)
    layer = next(iter(layers.values()))
    with pytest.raises(ValueError, match=r"output_blocks\.3.*middle_block"):
        context.keys_values("output_blocks.3", layer.to_k, layer.to_v)
    with pytest.raises(ValueError, match=r"output_blocks\.3.*middle_block"):
        context.with_keys_values({**layers, "output_blocks.3": layer})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_inputs": torch.empty(0, WIDTH)}, "J >= 1"),
        ({"biases": torch.zeros(3)}, "biases"),
        ({"temperatures": torch.tensor([0.1, 0.0])}, "above 0"),
        ({"target_outputs_k": {}}, "keys or for values only"),
        ({"projections": ("gated",)}, "2 of full, gated"),
        ({"projections": ("gated", "half")}, "half"),
        ({"target_outputs_v": {name: torch.zeros(1, p) for name, p in INNER.items()}}, "must be"),
    ],
)
def test_edit_whose_parts_do_not_fit_is_refused(
    layers: dict[str, SimpleNamespace], change: dict[str, object], message: str
) -> None:
    parts = {**vars(edit_of(layers, 2, seed=10)), **change}
    with pytest.raises(ValueError, match=message):
        Edit(**parts)


def test_an_edit_does_not_wait_for_an_accelerator() -> None:
    """Tensors that say nothing, as if on a GPU: whatever had to look at one would fail, as it does on the CPU."""

    def edited(device: str) -> PromptContext:
        with FakeTensorMode():
            target, output = torch.empty(1, WIDTH, device=device), torch.empty(1, 5, device=device)
            edit = Edit(target, target[0, :1], target[0, :1], {"layer": output}, {"layer": output})
            return edit.context(torch.empty(2, TOKENS, WIDTH, device=device), torch.empty(WIDTH, WIDTH, device=device))

    assert edited("cuda").gates.shape == (2, TOKENS, 1)
    with pytest.raises(DataDependentOutputException):
        edited("cpu")


def test_locked_keys_are_those_of_the_super_category(layers: dict[str, SimpleNamespace]) -> None:
    inputs = draw(2, WIDTH, seed=5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        keys = locked_keys(layers, inputs)
    for name, layer in layers.items():
        torch.testing.assert_close(keys[name], inputs.detach() @ layer.to_k.weight.detach().T)
        assert not keys[name].requires_grad
