"""Vectors in place of tokens, against a loop over lists."""
from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.concepts.embedding_insertion import insert_vectors, replace_token


def insert_by_lists(tokens: list[int], embedded: list[Tensor], token: int, vectors: Tensor) -> tuple[list, list]:
    new_tokens, new_embedded = [], []
    for old, embedding in zip(tokens, embedded, strict=True):
        new_tokens += [token] * len(vectors) if old == token else [old]
        new_embedded += list(vectors) if old == token else [embedding]
    return new_tokens[:len(tokens)], new_embedded[:len(tokens)]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
       count=st.integers(1, 8))
def test_vectors_are_inserted_and_the_rest_moves_right(rows: list[list[int]], count: int) -> None:
    tokens, vectors = torch.tensor(rows), torch.randn(count, 2)
    embedded = torch.randn(len(rows), 6, 2)
    before = embedded.clone()
    new_tokens, new_embedded = insert_vectors(tokens, embedded, 3, vectors)
    for row, (expected_tokens, expected) in enumerate(insert_by_lists(list(r), list(e), 3, vectors)
                                                      for r, e in zip(rows, embedded, strict=True)):
        assert new_tokens[row].tolist() == expected_tokens
        assert torch.equal(new_embedded[row], torch.stack(expected))
    assert torch.equal(embedded, before)
    if count == 1:
        assert torch.equal(replace_token(tokens, embedded, 3, vectors), new_embedded)


def test_gradients_reach_the_vectors_that_are_used() -> None:
    vectors = torch.zeros(3, 2, requires_grad=True)
    _, embedded = insert_vectors(torch.tensor([[1, 7, 2, 7]]), torch.zeros(1, 4, 2), 7, vectors)
    embedded.sum().backward()
    assert vectors.grad.tolist() == [[1, 1], [1, 1], [1, 1]]  # the second occurrence does not fit any more
