"""Scenes of the mini world, composed on one core: training should never wait for them."""
from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

from scripts.benchmarks.common import BenchmarkRow, BenchmarkSettings, time_calls

COUNT, QUICK_COUNT = 200, 20


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    from ldm.data.mini.scenes import SceneDataset

    count = QUICK_COUNT if settings.quick else COUNT
    wide = SceneDataset(seed=1)
    narrow = SceneDataset(seed=3, jitter=0.3, flips=0.0, emoji_sets=("fluent", "noto", "twemoji"))
    for name, compose in (("for autoencoder and CLIP", wide.__getitem__), ("for the U-Net", narrow.__getitem__),
                          ("their captions alone", wide.plan)):
        starts = itertools.count(0, count)  # new scenes in every round, as in training

        def compose_scenes(compose: Callable[[int], object] = compose, starts: Iterator[int] = starts) -> None:
            start = next(starts)
            for index in range(start, start + count):
                compose(index)

        rates = [count / seconds for seconds in time_calls(compose_scenes, settings.rounds)]
        yield BenchmarkRow(f"scenes, {name}", statistics.median(rates), "/s, core", min(rates), max(rates), len(rates))
