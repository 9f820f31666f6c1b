"""How much of a word's attention lies inside the mask of the thing that it names.

A map says how much of its attention each position of the picture gives to the word. Its share inside is

    share = sum over positions of map * mask / sum of map,     ratio = share / (part of the picture that the mask is)

so that a map that is even has the ratio 1. Over several layers and steps the means of the maps, as densities over the
picture, are put into the same formula: a layer counts by the attention that it gives, not by its number of positions.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from evaluation.stats.intervals import Figure, bootstrapped

STEPS = ("early", "middle", "late")
ALL = "all"


class Figures(NamedTuple):
    """Means over pictures, in % but for the last.

    Attributes:
        area: of the picture, what the mask covers.
        attention: of all attention to the prompt, what goes to the word.
        share: of that, what lies inside the mask.
        ratio: share / area, a plain number.
    """

    area: Figure
    attention: Figure
    share: Figure
    ratio: Figure


COLUMNS = ("label", "layer", "steps", "pictures",
           *[f"{name}{end}" for name in Figures._fields for end in ("", "_low", "_high")])


@dataclass(frozen=True, eq=False)
class Inside:
    """The attention to a word in one picture.

    Attributes:
        layers: their names.
        inside: (layers, groups of steps), the map's mean over the picture with zeros outside of the mask.
        whole: likewise of the whole map.
        area: the part of the picture that the mask covers, above 0.
    """

    layers: tuple[str, ...]
    inside: Tensor
    whole: Tensor
    area: float

    def share(self, layer: str = ALL, steps: str = ALL) -> float:
        """The part of the word's attention that lies inside, 0..1."""
        return self._mean(self.inside, layer, steps) / self._mean(self.whole, layer, steps)

    def attention(self, layer: str = ALL, steps: str = ALL) -> float:
        """The part of all attention to the prompt that goes to the word, 0..1."""
        return self._mean(self.whole, layer, steps)

    def _mean(self, table: Tensor, layer: str, steps: str) -> float:
        rows = slice(None) if layer == ALL else [self.layers.index(layer)]
        columns = slice(None) if steps == ALL else [STEPS.index(steps)]
        return float(table[rows][:, columns].mean())


def measure(maps: Mapping[str, Tensor], mask: Tensor) -> Inside:
    """The figures of one picture.

    Args:
        maps: layer name -> (groups of steps, h, w).
        mask: (H, W) in [0, 1], not all 0.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("the mask is empty, so nothing lies inside it")
    parts = [maps[name] * adaptive_avg_pool2d(mask[None].to(maps[name]), maps[name].shape[-2:]) for name in maps]
    inside, whole = (torch.stack([part.double().mean((-2, -1)) for part in table]) for table in (parts, maps.values()))
    return Inside(tuple(maps), inside, whole, float(mask.double().mean()))


def figures(pictures: Sequence[Inside], layer: str = ALL, steps: str = ALL) -> Figures:
    """What one or more pictures show, with bootstrap intervals over them."""
    shares = [one.share(layer, steps) for one in pictures]
    ratios = [share / one.area for share, one in zip(shares, pictures, strict=True)]
    parts = [one.area for one in pictures], [one.attention(layer, steps) for one in pictures], shares
    return Figures(*[bootstrapped([100 * value for value in values]) for values in parts], bootstrapped(ratios))


def records(label: str, pictures: Sequence[Inside]) -> Iterator[dict[str, Any]]:
    """A row of `COLUMNS` for every layer and group of steps, and for all of them. No pictures, no rows."""
    for layer in (ALL, *pictures[0].layers) if pictures else ():
        for steps in (ALL, *STEPS):
            found = figures(pictures, layer, steps)._asdict().items()
            yield {"label": label, "layer": layer, "steps": steps, "pictures": len(pictures),
                   **{name: figure.mean for name, figure in found},
                   **{f"{name}_low": figure.low for name, figure in found},
                   **{f"{name}_high": figure.high for name, figure in found}}
