"""A training step of a concept beside those of other methods, and beside the least that it could take.

All take turns in one run: same shape, picture size, batch, precision and attention. The least is the frozen U-Net's
forward and backward pass alone, on CUDA by graphs as Perfusion's is. "Of the matrix rate": what the step needs (no pass
counted twice, as recomputation would) over what the device does in one large matrix product. Memory: what the method
keeps, and the most that a step takes beside it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.common.errors import UserError
from scripts.benchmarks import baselines
from scripts.benchmarks.common import Goal, Race, Row, Settings, median_row, ratio_row
from scripts.benchmarks.device import MemoryWatch, bytes_of, free_memory, matrix_rate, precision, wait
from scripts.benchmarks.perfusion_step import FrozenUNet, PerfusionStep, set_recomputation
from scripts.benchmarks.random_models import read_config

PERFUSION, FLOOR, RECOMPUTING = "Perfusion", "frozen U-Net alone", "Perfusion, checkpointing"
PLAIN_PERFUSION, PLAIN_FLOOR = "Perfusion without graphs", "frozen U-Net alone without graphs"
TEXTUAL_INVERSION = "diffusers' Textual Inversion"
RATIO_GOALS = {FLOOR: Goal(1.05), TEXTUAL_INVERSION: Goal(0.7)}
MEMORY_GOALS = {(RECOMPUTING, 1): Goal(5.0), (PERFUSION, 4): Goal(12.0)}  # at 512 pixels
STEPS_TOGETHER = 5
MEMORY_GOAL_SIDE, RATE_GOAL, RATE_GOAL_BATCH = 512, Goal(45, at_least=True), 16
# What torch.compile takes one by one: blocks that occur many times and read tensors only.
REGIONS = ("ResBlock", "FeedForward", "CrossAttention", "ResnetBlock2D", "BasicTransformerBlock")


@dataclass
class Contestant:
    """A step with its batch; `holds` is what it keeps in memory from step to step.

    `plain` is the step without graphs, whose operations and memory can be told; None: `step` itself.
    """

    step: Callable[[], object]
    holds: list[Any]
    plain: Callable[[], object] | None = None
    flops: float = 0.0
    most_memory: list[int] = field(default_factory=list)


class Contest:
    """All methods at one size of batch.

    Args:
        settings: rounds and device.
        size: of the batch.
        perfusion: with `floor`, whose U-Net is the same one.
        others: by name.
    """

    def __init__(self, settings: Settings, size: int, perfusion: PerfusionStep, floor: FrozenUNet,
                 parts: baselines.Parts | None, others: dict[str, Any]) -> None:
        self.settings, self.size, self.perfusion = settings, size, perfusion
        batch, bare = perfusion.batch(size), floor.batch(size)

        def contestant(ways: Callable[..., Callable[[Any], None]], given: Any, holds: list[Any], **how: bool
                       ) -> Contestant:
            plain = ways(graphed=False, **how)
            if settings.device.type != "cuda":
                return Contestant(lambda: plain(given), holds)
            graphed = ways(graphed=True, **how)
            return Contestant(lambda: graphed(given), holds, lambda: plain(given))

        self.contestants = {
            PERFUSION: contestant(perfusion.way, batch, perfusion.holds),
            RECOMPUTING: contestant(perfusion.way, batch, perfusion.holds, recompute=True),
            FLOOR: contestant(floor.way, bare, floor.holds)}
        if settings.device.type == "cuda":
            self.contestants |= {name: Contestant(self.contestants[same].plain, self.contestants[same].holds)
                                 for name, same in ((PLAIN_PERFUSION, PERFUSION), (PLAIN_FLOOR, FLOOR))}
        if parts is not None:
            theirs = parts.batch(size, settings.side, floor.context[0])
            self.contestants |= {name: Contestant(lambda other=other: other.step(theirs), other.holds)
                                 for name, other in others.items()}
        self.watch = MemoryWatch(settings.device)
        self.without_room: dict[str, str] = {}

    def warm_up(self) -> None:
        """One step of each, its floating-point operations counted; who finds no memory is out."""
        for name, contestant in list(self.contestants.items()):
            try:
                with _uncompiled(self.settings.compile), FlopCounterMode(display=False) as counter:
                    (contestant.plain or contestant.step)()
                contestant.flops = counter.get_total_flops()
                if self.settings.compile or contestant.plain:
                    contestant.step()
            except torch.OutOfMemoryError:
                del self.contestants[name]
                set_recomputation(self.perfusion.unet, False)
                self.without_room[name] = f"{self.settings.device} has no memory for it"
        if PERFUSION in self.contestants and RECOMPUTING in self.contestants:
            self.contestants[RECOMPUTING].flops = self.contestants[PERFUSION].flops

    def _timed(self, contestant: Contestant) -> None:
        for _ in range(self.together):
            contestant.step()
        wait(self.settings.device)

    @property
    def together(self) -> int:
        """Steps of a round: as in a run, an accelerator is given the next before it has done the last."""
        return 1 if self.settings.device.type == "cpu" else STEPS_TOGETHER

    def run(self) -> dict[str, list[float]]:
        """Seconds of every round of each."""
        self.warm_up()
        for contestant in self.contestants.values():  # apart from the race: resetting the peak costs time on a CPU
            most = self.watch.during(contestant.plain or contestant.step)
            if most is not None:
                contestant.most_memory.append(most)
        race = Race({name: lambda one=contestant: self._timed(one) for name, contestant in self.contestants.items()})
        times = race.run(self.settings.rounds, warm_up=False)
        return {name: [taken / self.together for taken in rounds] for name, rounds in times.items()}

    def rows(self, rate: float) -> Iterator[Row]:
        times = self.run()
        where = f"batch {self.size}, {self.settings.side} px"
        for name, taken in times.items():
            contestant = self.contestants[name]
            yield median_row(f"step of {name}, {where}", taken, "s")
            for most in contestant.most_memory:
                yield Row(f"memory of {name}, {where}", (bytes_of(contestant.holds) + most) / 1e9, "GB",
                          goal=self._memory_goal(name))
            shares = [100 * contestant.flops / seconds / rate for seconds in taken]
            yield median_row(f"share of the matrix rate, {name}, {where}", shares, "%", self._rate_goal(name))
        for name, reason in self.without_room.items():
            yield Row(f"step of {name}, {where}", None, "s", note=reason)
        for name, goal in RATIO_GOALS.items():
            if name in times and PERFUSION in times:
                yield ratio_row(f"Perfusion / {name}, {where}", times[PERFUSION], times[name],
                                goal if self.settings.shape.has_goals else None)

    def _memory_goal(self, name: str) -> Goal | None:
        fits = self.settings.shape.has_goals and self.settings.side == MEMORY_GOAL_SIDE
        return MEMORY_GOALS.get((name, self.size)) if fits else None

    def _rate_goal(self, name: str) -> Goal | None:
        fits = self.settings.shape.has_goals and self.settings.on_hopper and self.size == RATE_GOAL_BATCH
        return RATE_GOAL if fits and name == PERFUSION else None


def _uncompiled(compiles: bool) -> AbstractContextManager[Any]:
    """Runs what is compiled as it was written: operations are counted one by one."""
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def compile_regions(module: nn.Module) -> None:
    """Compiles each block by itself: the same code for all blocks of one shape, ready sooner than the whole."""
    torch._dynamo.config.recompile_limit = 64  # each shape of a block is one
    for part in module.modules():
        if type(part).__name__ in REGIONS and not _reads_edits(part):
            part.compile()


def _reads_edits(part: nn.Module) -> bool:
    """Whether this project's transformer block gets prompts under an edit, which is no tensor."""
    return type(part).__module__.startswith("ldm.") and type(part).__name__ == "BasicTransformerBlock"


def measure(settings: Settings) -> Iterator[Row]:
    rate = matrix_rate(settings.device)
    yield Row(f"product of two matrices, {str(precision(settings.device)).removeprefix('torch.')}", rate / 1e12,
              "TFLOP/s")
    perfusion = PerfusionStep(settings)
    set_recomputation(perfusion.unet, False)
    floor = FrozenUNet(perfusion)
    parts, others = None, {}
    try:
        params = OmegaConf.to_container(read_config(settings.shape.teach).model.params, resolve=True)
        parts = baselines.Parts(params, perfusion.model.cond_stage_model.transformer.config, settings.device)
    except UserError as error:
        yield Row("steps of other methods", None, "s", note=str(error))
    for name, other in baselines.built(parts, free_memory(settings.device)) if parts is not None else ():
        if isinstance(other, UserError):
            yield Row(f"step of {name}", None, "s", note=str(other))
        else:
            others[name] = other
    if settings.compile:
        for unet in (perfusion.unet, *(other.unet for other in others.values())):
            compile_regions(unet)
    for size in settings.batches:
        yield from Contest(settings, size, perfusion, floor, parts, others).rows(rate)
