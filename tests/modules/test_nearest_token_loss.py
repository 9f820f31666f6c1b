"""The nearest-token loss in closed form."""
from __future__ import annotations

import math

import pytest
import torch

from ldm.modules.losses.nearest_token import nearest_token_loss


def test_it_is_the_formula() -> None:
    predicted = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 1.0, 0]])
    tokens = torch.eye(3) * 5
    labels = torch.tensor([0, 1, 1])
    # The nearest token has cosine 1, the next one 0; a prediction of another label has cosine 0, and the equal label of
    # the last two does not count.
    positive = math.exp(2) + 1
    first, others = -math.log(positive / (positive + 2)), -math.log(positive / (positive + 1))
    loss = nearest_token_loss(predicted, tokens, labels, nearest=2, temperature=0.5)
    assert float(loss) == pytest.approx((first + 2 * others) / 3, rel=1e-5)


def test_without_others_there_is_nothing_to_lose() -> None:
    loss = nearest_token_loss(torch.randn(4, 3), torch.randn(2, 3), torch.zeros(4))  # fewer tokens than k
    assert float(loss) == pytest.approx(0, abs=1e-6)
