"""Encoders of conditions other than text."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.common.errors import UserError
from ldm.modules.encoders.modules import ClassEmbedder, SpatialRescaler


def test_a_class_becomes_one_token() -> None:
    embedder = ClassEmbedder(6, n_classes=4, key="class_label")
    assert {key: tuple(value.shape) for key, value in embedder.state_dict().items()} == {"embedding.weight": (4, 6)}
    labels = torch.tensor([3, 0, 3])
    expected = F.one_hot(labels, 4).float()[:, None] @ embedder.embedding.weight
    assert expected.shape == (3, 1, 6)
    for given in (labels, labels.int(), {"class_label": labels}):
        assert torch.equal(embedder(given), expected)
    assert torch.equal(embedder({"other": labels}, key="other"), expected)


def test_labels_are_dropped_to_train_guidance() -> None:
    embedder = ClassEmbedder(6, n_classes=4, ucg_rate=0.5)
    labels = torch.zeros(200, dtype=torch.long)
    torch.manual_seed(1)
    embedded = embedder({"class": labels})[:, 0]
    torch.manual_seed(1)
    is_dropped = torch.bernoulli(torch.full((200, 1), 0.5))[:, 0].bool()
    assert 60 < is_dropped.sum() < 140
    assert torch.equal(embedded, embedder.embedding.weight[torch.where(is_dropped, 3, 0)])
    assert torch.equal(embedder(labels, disable_dropout=True)[:, 0], embedder.embedding.weight[labels])


def test_no_class_is_the_last_class() -> None:
    embedder = ClassEmbedder(6, n_classes=4, key="class_label")
    unconditional = embedder.get_unconditional_conditioning(2)
    assert unconditional["class_label"].tolist() == [3, 3]
    assert torch.equal(embedder(unconditional)[:, 0], embedder.embedding.weight[[3, 3]])


def test_maps_are_rescaled_and_their_channels_mapped() -> None:
    x = torch.randn(2, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    half = SpatialRescaler()(x)
    assert torch.allclose(half, F.avg_pool2d(x, 2), atol=1e-6)  # equals bilinear interpolation to half the size
    mixed = SpatialRescaler(n_stages=2, in_channels=5, out_channels=3)
    assert list(mixed.state_dict()) == ["channel_mapper.weight"]
    expected = torch.einsum("oi,bihw->bohw", mixed.channel_mapper.weight[..., 0, 0], F.avg_pool2d(x, 4))
    assert torch.allclose(mixed.encode(x), expected, atol=1e-6)
    assert torch.equal(SpatialRescaler(n_stages=0)(x), x)
    doubled = SpatialRescaler(method="nearest", multiplier=2)(x)
    assert torch.equal(doubled, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("params", "named"), [({"method": "trilinear"}, "trilinear"), ({"n_stages": -1}, "-1")])
def test_impossible_params_are_refused(params: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SpatialRescaler(**params)
