"""Scenes of the mini world composed by one core: training should never wait for them."""
from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

from scripts.benchmarks.common import Row, Settings, repeated

COUNT, QUICK_COUNT = 200, 20


def measure(settings: Settings) -> Iterator[Row]:
    from ldm.data.mini.scenes import SceneDataset

    count = QUICK_COUNT if settings.quick else COUNT
    wide = SceneDataset(seed=1)
    narrow = SceneDataset(seed=3, jitter=0.3, flips=0.0, sources=("fluent", "noto", "twemoji"))
    for what, take in (("for autoencoder and CLIP", wide.__getitem__), ("for the U-Net", narrow.__getitem__),
                       ("their captions alone", wide.plan)):
        starts = itertools.count(0, count)  # new scenes in every round, as in training

        def work(take: Callable[[int], object] = take, starts: Iterator[int] = starts) -> None:
            start = next(starts)
            for index in range(start, start + count):
                take(index)

        speeds = [count / taken for taken in repeated(work, settings.rounds)]
        yield Row(f"scenes, {what}", statistics.median(speeds), "/s, core", min(speeds), max(speeds), len(speeds))
