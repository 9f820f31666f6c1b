"""Prompt contexts: layers compute Eq. 3, joined batches do not mix concepts, and caches are used."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ldm.modules.context import PromptContext
from ldm.modules.edit import Edit, locked_keys
from ldm.modules.rank_one import dual_vectors, invert_covariance

WIDTH, TOKENS = 6, 4
INNER = {"input_blocks.1.1.attn2": 5, "middle_block.1.attn2": 8}


def randn(*shape: int, seed: int = 0) -> Tensor:
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
    sample = randn(50, WIDTH, seed=1)
    return invert_covariance(sample.T @ sample / 50)


def make_edit(layers: dict[str, SimpleNamespace], inverse: Tensor, count: int, seed: int) -> Edit:
    targets = randn(count, WIDTH, seed=seed)
    return Edit(
        target_inputs=targets,
        duals=dual_vectors(targets, inverse),
        biases=torch.full((count,), 0.6),
        temperatures=torch.full((count,), 0.2),
        target_outputs_v={name: randn(count, p, seed=seed + 1) for name, p in INNER.items()},
        target_outputs_k=locked_keys(layers, randn(count, WIDTH, seed=seed + 2)),
    )


def all_keys_values(context: PromptContext, layers: dict[str, SimpleNamespace]) -> list[Tensor]:
    return [x for name, layer in layers.items() for x in context.keys_values(name, layer.to_k, layer.to_v)]


def assert_rows(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def equation_3(edit: Edit, encoding: Tensor, inverse: Tensor, weight: Tensor, output: Tensor) -> Tensor:
    """Evaluate Eq. 3 for one concept in float64."""
    e, i, metric, w = (x.detach().double() for x in (encoding, edit.target_inputs[0], inverse, weight))
    s = (e @ metric @ i) / (i @ metric @ i)
    gates = torch.sigmoid((s - edit.biases[0].double()) / edit.temperatures[0].double())
    return ((e - s[..., None] * i) @ w.T + gates[..., None] * output.double()).float()


def test_a_plain_context_is_the_plain_projection(layers: dict[str, SimpleNamespace]) -> None:
    encoding = randn(2, TOKENS, WIDTH)
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
    edit, encoding = make_edit(layers, inverse, 1, seed=10), randn(2, TOKENS, WIDTH)
    context = edit.context(encoding)
    for name, layer in layers.items():
        key, value = context.keys_values(name, layer.to_k, layer.to_v)
        locked = layer.to_k.weight.detach() @ randn(1, WIDTH, seed=12)[0]
        expected = equation_3(edit, encoding, inverse, layer.to_k.weight, locked)
        torch.testing.assert_close(key, expected, rtol=1e-4, atol=1e-5)
        expected = equation_3(edit, encoding, inverse, layer.to_v.weight, edit.target_outputs_v[name][0])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_gated_projection_removes_the_concept_as_far_as_its_gate_is_open(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding = replace(make_edit(layers, inverse, 1, seed=10), projections=["gated"]), randn(2, TOKENS, WIDTH)
    context = edit.context(encoding)
    e, i, metric = (x.double() for x in (encoding, edit.target_inputs[0], inverse))
    s = (e @ metric @ i) / (i @ metric @ i)
    gates = torch.sigmoid((s - 0.6) / 0.2)[..., None]
    assert gates.min() < 0.3 < gates.max()
    for name, layer in layers.items():
        _, value = context.keys_values(name, layer.to_k, layer.to_v)
        expected = (e - gates * s[..., None] * i) @ layer.to_v.weight.detach().double().T
        expected += gates * edit.target_outputs_v[name][0].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("projections", "same_as"), [
    (("gated", "gated"), "plain"), (("full", "gated"), "full"), (("full", "full"), "full")])
def test_with_closed_gates_only_a_full_projection_changes_a_prompt(
    layers: dict[str, SimpleNamespace], inverse: Tensor, projections: tuple[str, ...], same_as: str
) -> None:
    """One full projection among several makes all of them full."""
    closed = replace(make_edit(layers, inverse, 2, seed=10), biases=torch.full((2,), 1e3))
    encoding = randn(2, TOKENS, WIDTH)
    expected = {"plain": PromptContext.plain(encoding), "full": closed.context(encoding)}
    found = all_keys_values(replace(closed, projections=projections).context(encoding), layers)
    assert_rows(found, all_keys_values(expected[same_as], layers))
    other = all_keys_values(expected[{"plain": "full", "full": "plain"}[same_as]], layers)
    assert not torch.allclose(found[0], other[0], atol=1e-2)


@pytest.mark.parametrize("projection", ["full", "gated"])
def test_masked_concepts_have_no_effect_on_a_prompt(
    layers: dict[str, SimpleNamespace], inverse: Tensor, projection: str
) -> None:
    both = replace(make_edit(layers, inverse, 2, seed=10), projections=[projection] * 2)
    first = replace(both, **{name: getattr(both, name)[:1] for name in
                             ("target_inputs", "duals", "biases", "temperatures", "projections")},
                    target_outputs_v={name: o[:1] for name, o in both.target_outputs_v.items()},
                    target_outputs_k={name: o[:1] for name, o in both.target_outputs_k.items()})
    encoding, acting = randn(2, TOKENS, WIDTH), torch.tensor([[True, False], [False, False]])
    context = both.context(encoding).mask_concepts(acting, both.target_inputs, both.duals, both.projections)
    alone = first.context(encoding[:1])
    assert_rows(all_keys_values(context.select([0]), layers), all_keys_values(alone, layers))
    plain = PromptContext.plain(encoding[1:])
    assert_rows(all_keys_values(context.select([1]), layers), all_keys_values(plain, layers))


def test_global_locking_computes_all_keys_from_the_super_category(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit = make_edit(layers, inverse, 2, seed=10)
    encoding, super_encoding = randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH, seed=3)
    locally = edit.context(encoding)
    globally = edit.context(encoding, super_encoding)
    for name, layer in layers.items():
        key, value = globally.keys_values(name, layer.to_k, layer.to_v)
        torch.testing.assert_close(key, layer.to_k(super_encoding))
        assert torch.equal(value, locally.keys_values(name, layer.to_k, layer.to_v)[1])
    with pytest.raises(ValueError, match="super_encoding"):
        edit.context(encoding, super_encoding[:, 1:])


def test_gradients_reach_the_encoding_and_the_values_only(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    edit, encoding = make_edit(layers, inverse, 1, seed=10), randn(1, TOKENS, WIDTH).requires_grad_()
    edit.target_outputs_v = {name: nn.Parameter(o) for name, o in edit.target_outputs_v.items()}
    sum(x.square().sum() for x in all_keys_values(edit.context(encoding), layers)).backward()
    assert encoding.grad.abs().sum() > 0
    assert all(o.grad.abs().sum() > 0 for o in edit.target_outputs_v.values())
    assert not any(o.requires_grad for o in edit.target_outputs_k.values())


@pytest.mark.parametrize("locked_globally", [False, True])
def test_cat_keeps_every_prompt_as_it_was(
    layers: dict[str, SimpleNamespace], inverse: Tensor, locked_globally: bool
) -> None:
    encodings = [randn(n, TOKENS, WIDTH, seed=20 + n) for n in (1, 2, 3, 1)]
    one, other = make_edit(layers, inverse, 2, seed=10), make_edit(layers, inverse, 1, seed=30)
    super_encoding = randn(2, TOKENS, WIDTH, seed=40) if locked_globally else None
    parts = [
        PromptContext.plain(encodings[0]),
        one.context(encodings[1], super_encoding),
        other.context(encodings[2]),
        one.context(encodings[3]),
    ]
    joined = PromptContext.cat(parts)
    assert joined.batch_size == 7
    assert joined.concept_count == 3  # the concepts of `one` are not repeated
    assert torch.equal(joined.encoding, torch.cat(encodings))
    expected = [torch.cat(rows) for rows in zip(*(all_keys_values(part, layers) for part in parts), strict=True)]
    assert_rows(all_keys_values(joined, layers), expected)
    assert_rows(all_keys_values(PromptContext.cat(parts[::-1]).select([6, 4, 5, 1, 2, 3, 0]), layers), expected)


def test_cat_of_plain_contexts_stays_plain(layers: dict[str, SimpleNamespace]) -> None:
    encoding = randn(2, TOKENS, WIDTH)
    joined = PromptContext.cat([PromptContext.plain(encoding[:1]), PromptContext.plain(encoding[1:])])
    assert joined.concept_count == 0
    assert_rows(all_keys_values(joined, layers), all_keys_values(PromptContext.plain(encoding), layers))


@pytest.mark.parametrize("globally", [False, True])
def test_repeat_and_select(layers: dict[str, SimpleNamespace], inverse: Tensor, globally: bool) -> None:
    edit, encoding = make_edit(layers, inverse, 2, seed=10), randn(3, TOKENS, WIDTH)
    context = edit.context(encoding, randn(3, TOKENS, WIDTH, seed=3) if globally else None)
    full = all_keys_values(context, layers)
    assert_rows(all_keys_values(context.repeat(2), layers), [x.repeat(2, 1, 1) for x in full])
    assert context.repeat(2).concept_count == 2
    for rows in (slice(1, None), [2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True])):
        assert_rows(all_keys_values(context.select(rows), layers), [x[rows] for x in full])


def test_a_cache_computes_each_layer_once(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    edit, encoding = make_edit(layers, inverse, 1, seed=10), randn(1, TOKENS, WIDTH)
    cached, fresh = edit.context(encoding, cache=True), edit.context(encoding)
    first, again = all_keys_values(cached, layers), all_keys_values(cached, layers)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert_rows(first, all_keys_values(fresh, layers))
    assert all_keys_values(fresh, layers)[0] is not all_keys_values(fresh, layers)[0]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("globally", [False, True])
def test_computing_all_layers_at_once_equals_one_by_one(layers: dict[str, SimpleNamespace], inverse: Tensor, count: int,
                                                      globally: bool) -> None:
    encoding, super_encoding = randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH, seed=3) if globally else None

    def context(cache: bool = False) -> PromptContext:
        if not count:
            return PromptContext.plain(encoding, cache)
        return make_edit(layers, inverse, count, seed=10).context(encoding, super_encoding, cache)

    expected = all_keys_values(context(), layers)
    fresh, cached = context(), context(cache=True)
    assert_rows(all_keys_values(fresh.with_keys_values(layers), layers), expected)
    assert fresh.with_keys_values(layers) is not fresh, "in training nothing may be cached"
    assert cached.with_keys_values(layers) is cached.with_keys_values(layers) is cached
    assert_rows(all_keys_values(cached, layers), expected)


def test_contexts_derived_from_a_cached_one_have_an_empty_cache(
    layers: dict[str, SimpleNamespace], inverse: Tensor
) -> None:
    context = make_edit(layers, inverse, 1, seed=10).context(randn(2, TOKENS, WIDTH), cache=True)
    full = all_keys_values(context, layers)
    assert_rows(all_keys_values(context.select(slice(1)), layers), [x[:1] for x in full])
    joined = PromptContext.cat([context, context])
    assert joined.cache
    assert not PromptContext.cat([context, PromptContext.plain(randn(1, TOKENS, WIDTH))]).cache
    assert_rows(all_keys_values(joined, layers), [x.repeat(2, 1, 1) for x in full])


def test_to_changes_every_tensor(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    context = make_edit(layers, inverse, 2, seed=10).context(randn(1, TOKENS, WIDTH), randn(1, TOKENS, WIDTH, seed=3))
    moved = context.to(torch.float64)
    assert moved.dtype == torch.float64
    tables = (*moved.target_outputs_v.values(), *moved.target_outputs_k.values())
    everything = (moved.projected, moved.gates, moved.key_projected, moved.key_gates, *tables)
    assert all(tensor.dtype == torch.float64 for tensor in everything)
    assert context.to("meta").device.type == "meta"
    assert context.dtype == torch.float32


def test_a_half_precision_model_with_concepts_in_float32(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    """Concepts and C^-1 stay in float32 if the model runs in half precision."""
    edit, encoding = make_edit(layers, inverse, 1, seed=10), randn(1, TOKENS, WIDTH)
    context = edit.context(encoding.bfloat16())
    layer = layers["middle_block.1.attn2"]
    half = [nn.Linear(WIDTH, 8, bias=False).bfloat16() for _ in range(2)]
    half[0].weight.data.copy_(layer.to_k.weight)
    half[1].weight.data.copy_(layer.to_v.weight)
    found = context.keys_values("middle_block.1.attn2", *half)
    expected = edit.context(encoding).keys_values("middle_block.1.attn2", layer.to_k, layer.to_v)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


def test_a_layer_without_target_outputs_is_refused(layers: dict[str, SimpleNamespace], inverse: Tensor) -> None:
    context = make_edit(layers, inverse, 1, seed=10).context(randn(1, TOKENS, WIDTH))
    layer = next(iter(layers.values()))
    with pytest.raises(ValueError, match=r"output_blocks\.3.*middle_block"):
        context.keys_values("output_blocks.3", layer.to_k, layer.to_v)
    with pytest.raises(ValueError, match=r"output_blocks\.3.*middle_block"):
        context.with_keys_values({**layers, "output_blocks.3": layer})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_inputs": torch.empty(0, WIDTH)}, "J >= 1"),
        ({"duals": torch.zeros(1, WIDTH)}, "duals must have the shape"),
        ({"biases": torch.zeros(3)}, "biases"),
        ({"temperatures": torch.tensor([0.1, 0.0])}, "above 0"),
        ({"target_outputs_k": {}}, "keys or for values only"),
        ({"projections": ("gated",)}, "2 of full, gated"),
        ({"projections": ("gated", "half")}, "half"),
        ({"target_outputs_v": {name: torch.zeros(1, p) for name, p in INNER.items()}}, "must be"),
    ],
)
def test_an_edit_with_mismatched_parts_is_refused(
    layers: dict[str, SimpleNamespace], inverse: Tensor, change: dict[str, object], message: str
) -> None:
    parts = {**vars(make_edit(layers, inverse, 2, seed=10)), **change}
    with pytest.raises(ValueError, match=message):
        Edit(**parts)


def test_an_edit_does_not_synchronize_with_an_accelerator() -> None:
    """Fake tensors fail if their values are read, as an edit does on the CPU; on a GPU it must not read any."""

    def fake_context(device: str) -> PromptContext:
        with FakeTensorMode():
            target, output = torch.empty(1, WIDTH, device=device), torch.empty(1, 5, device=device)
            edit = Edit(target, target, target[0, :1], target[0, :1], {"layer": output}, {"layer": output})
            return edit.context(torch.empty(2, TOKENS, WIDTH, device=device))

    assert fake_context("cuda").gates.shape == (2, TOKENS, 1)
    with pytest.raises(DataDependentOutputException):
        fake_context("cpu")


def test_locked_keys_come_from_the_super_category(layers: dict[str, SimpleNamespace]) -> None:
    inputs = randn(2, WIDTH, seed=5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        keys = locked_keys(layers, inputs)
    for name, layer in layers.items():
        torch.testing.assert_close(keys[name], inputs.detach() @ layer.to_k.weight.detach().T)
        assert not keys[name].requires_grad


# What a prompt has as a whole


def whole_prompts(seed: int, count: int = 2) -> PromptContext:
    plain = PromptContext.plain(randn(count, TOKENS, WIDTH, seed=seed), pooled=randn(count, 3, seed=seed))
    return replace(plain, vector=randn(count, 5, seed=seed))


def test_pooled_and_vector_follow_their_prompts() -> None:
    one, other = whole_prompts(1), whole_prompts(2)
    joined = PromptContext.cat([one, other])
    assert torch.equal(joined.vector, torch.cat([one.vector, other.vector]))
    assert torch.equal(joined.pooled[2:], other.pooled) and torch.equal(one.repeat(3).vector[4:], one.vector)
    chosen = joined.select([3, 0])
    assert torch.equal(chosen.vector, torch.stack([other.vector[1], one.vector[0]]))
    assert torch.equal(chosen.pooled, torch.stack([other.pooled[1], one.pooled[0]]))
    moved = joined.to(torch.float64)
    assert moved.vector.dtype == moved.pooled.dtype == torch.float64
    weighted = joined.scale_tokens(torch.full((4, TOKENS), 2.0))
    assert torch.equal(weighted.projected, 2 * joined.projected)
    assert torch.equal(weighted.vector, joined.vector) and torch.equal(weighted.pooled, joined.pooled)


@pytest.mark.parametrize("name", ["pooled", "vector"])
def test_prompts_with_and_without_a_vector_are_not_joined(name: str) -> None:
    with pytest.raises(ValueError, match=f"some of these prompts have a {name}, others have none"):
        PromptContext.cat([whole_prompts(1), replace(whole_prompts(2), **{name: None})])


def test_copies_for_graphs_have_a_vector_of_their_own() -> None:
    one, other = whole_prompts(1), whole_prompts(2)
    copied = one.clone_cached()
    copied.copy_cached_from(other)
    assert torch.equal(copied.vector, other.vector) and torch.equal(one.vector, whole_prompts(1).vector)
