"""Measure how much of the attention to a word lies inside the mask of the object that the word names.

A map holds, for each position of the image, the share of its attention that goes to the word. From that we compute

    share = sum over positions of map * mask / sum of map,     ratio = share / area of the mask

so a uniform map has the ratio 1. For several layers and groups of steps, the mean values of their maps go into the same
formula: a layer counts by its attention, not by its number of positions.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from evaluation.stats.intervals import Estimate, bootstrap_mean

STEP_GROUPS = ("early", "middle", "late")
ALL = "all"


class AttentionEstimates(NamedTuple):
    """Means over images.

    Attributes:
        area: share of the image that the mask covers, in %.
        attention: share of all attention to the prompt that goes to the word, in %.
        share: share of the word's attention that lies inside the mask, in %.
        ratio: share / area, 1 if attention is uniform.
    """

    area: Estimate
    attention: Estimate
    share: Estimate
    ratio: Estimate


COLUMNS = ("label", "layer", "steps", "images",
           *[f"{name}{end}" for name in AttentionEstimates._fields for end in ("", "_low", "_high")])


@dataclass(frozen=True, eq=False)
class MaskedAttention:
    """The attention to a word in one image, for L layers and G groups of steps.

    Attributes:
        layers: their names.
        inside: (L, G), mean over all positions of the map times the mask.
        total: (L, G), mean over all positions of the map.
        area: the part of the image that the mask covers, above 0 and up to 1.
    """

    layers: tuple[str, ...]
    inside: Tensor
    total: Tensor
    area: float

    def share(self, layer: str = ALL, steps: str = ALL) -> float:
        """Return the part of the word's attention that lies inside the mask, 0..1."""
        return self._mean(self.inside, layer, steps) / self._mean(self.total, layer, steps)

    def attention(self, layer: str = ALL, steps: str = ALL) -> float:
        """Return the part of all attention to the prompt that goes to the word, 0..1."""
        return self._mean(self.total, layer, steps)

    def _mean(self, values: Tensor, layer: str, steps: str) -> float:
        rows = slice(None) if layer == ALL else [self.layers.index(layer)]
        columns = slice(None) if steps == ALL else [STEP_GROUPS.index(steps)]
        return float(values[rows][:, columns].mean())


def measure_attention(maps: Mapping[str, Tensor], mask: Tensor) -> MaskedAttention:
    """Measure the maps of one image.

    Args:
        maps: layer's name -> (G, h, w).
        mask: (H, W) in [0, 1], not all 0.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("the mask is empty, so nothing lies inside it")
    inside, total = [], []
    for values in maps.values():
        pooled_mask = adaptive_avg_pool2d(mask[None].to(values), values.shape[-2:])
        inside.append((values * pooled_mask).double().mean((-2, -1)))
        total.append(values.double().mean((-2, -1)))
    return MaskedAttention(tuple(maps), torch.stack(inside), torch.stack(total), float(mask.double().mean()))


def estimate_attention(images: Sequence[MaskedAttention], layer: str = ALL, steps: str = ALL) -> AttentionEstimates:
    """Return means over one or more images, with bootstrap intervals."""
    areas = [image.area for image in images]
    attentions = [image.attention(layer, steps) for image in images]
    shares = [image.share(layer, steps) for image in images]
    ratios = [share / area for share, area in zip(shares, areas, strict=True)]
    percentages = [bootstrap_mean([100 * value for value in values]) for values in (areas, attentions, shares)]
    return AttentionEstimates(*percentages, bootstrap_mean(ratios))


def attention_records(label: str, images: Sequence[MaskedAttention]) -> Iterator[dict[str, Any]]:
    """Yield a record of `COLUMNS` for every layer and group of steps, and for all of them; none without images."""
    for layer in (ALL, *images[0].layers) if images else ():
        for steps in (ALL, *STEP_GROUPS):
            record: dict[str, Any] = {"label": label, "layer": layer, "steps": steps, "images": len(images)}
            for name, estimate in estimate_attention(images, layer, steps)._asdict().items():
                record |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            yield record
