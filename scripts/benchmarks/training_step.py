"""A training step of a concept, compared with other methods and with a lower bound.

All methods alternate in one run, with the same shape, image size, batch size, precision and attention. The lower bound
is the forward and backward pass of the frozen U-Net alone, on CUDA by graphs as in Perfusion's step.

The share of the matrix rate is the rate of the step's floating-point operations, divided by the rate of one large
matrix product. Recomputed activations do not count twice. The memory is what a method keeps, plus the peak of a step.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.common.errors import UserError
from scripts.benchmarks import baselines
from scripts.benchmarks.common import (
    BenchmarkRow,
    BenchmarkSettings,
    Goal,
    median_row,
    ratio_row,
    time_alternating,
)
from scripts.benchmarks.device import PeakMemory, compute_dtype, free_memory, matrix_rate, memory_of, synchronize
from scripts.benchmarks.perfusion_step import FrozenUNet, PerfusionStep, set_recomputation
from scripts.benchmarks.random_models import read_config

PERFUSION, LOWER_BOUND, RECOMPUTING = "Perfusion", "frozen U-Net alone", "Perfusion, checkpointing"
PLAIN_PERFUSION, PLAIN_LOWER_BOUND = "Perfusion without graphs", "frozen U-Net alone without graphs"
TEXTUAL_INVERSION = "diffusers' Textual Inversion"
RATIO_GOALS = {LOWER_BOUND: Goal(1.05), TEXTUAL_INVERSION: Goal(0.7)}
MEMORY_GOALS = {(RECOMPUTING, 1): Goal(5.0), (PERFUSION, 4): Goal(12.0)}  # (method, batch size), at 512 pixels
MEMORY_GOAL_SIDE, RATE_GOAL, RATE_GOAL_BATCH = 512, Goal(45, at_least=True), 16
STEPS_PER_ROUND = 5
# Classes that torch.compile compiles one by one: blocks that occur many times and read tensors only.
COMPILED_BLOCKS = ("ResBlock", "FeedForward", "CrossAttention", "ResnetBlock2D", "BasicTransformerBlock")
RECOMPILE_LIMIT = 64  # each shape of a block counts as a recompilation


@dataclass
class Candidate:
    """A method that takes part in the comparison.

    Attributes:
        step: runs a training step on its batch.
        memory_holders: what it keeps in memory from step to step.
        plain_step: the step without graphs, whose operations and memory can be measured; None: `step` itself.
        flops: floating-point operations of a step.
        peak_memory: peak memory of a step in bytes; None: unknown.
    """

    step: Callable[[], object]
    memory_holders: list[Any]
    plain_step: Callable[[], object] | None = None
    flops: float = 0.0
    peak_memory: int | None = None

    @property
    def measurable_step(self) -> Callable[[], object]:
        """The step whose operations and memory are measured."""
        return self.plain_step or self.step


class StepComparison:
    """Compare the steps of all methods at one batch size.

    Args:
        settings: rounds and device.
        batch_size: the batch size.
        perfusion: Perfusion's step.
        lower_bound: the frozen U-Net of that step.
        components: components of the other methods; None: there are none.
        others: name -> other method.
    """

    def __init__(self, settings: BenchmarkSettings, batch_size: int, perfusion: PerfusionStep, lower_bound: FrozenUNet,
                 components: baselines.DiffusersComponents | None, others: dict[str, Any]) -> None:
        self.settings, self.batch_size, self.perfusion = settings, batch_size, perfusion
        batch, unet_batch = perfusion.batch(batch_size), lower_bound.batch(batch_size)

        # Perfusion's variants and the lower bound.
        self.candidates = {
            PERFUSION: self._candidate(perfusion, batch),
            RECOMPUTING: self._candidate(perfusion, batch, recompute=True),
            LOWER_BOUND: self._candidate(lower_bound, unet_batch)}
        if settings.device.type == "cuda":
            for name, graphed in ((PLAIN_PERFUSION, PERFUSION), (PLAIN_LOWER_BOUND, LOWER_BOUND)):
                candidate = self.candidates[graphed]
                self.candidates[name] = Candidate(candidate.measurable_step, candidate.memory_holders)

        # Other methods.
        if components is not None:
            baseline_batch = components.batch(batch_size, settings.side, lower_bound.context_shape[0])
            for name, other in others.items():
                self.candidates[name] = Candidate(lambda other=other: other.step(baseline_batch), other.memory_holders)
        self.out_of_memory: dict[str, str] = {}

    def _candidate(self, method: PerfusionStep | FrozenUNet, batch: Any, **variant: bool) -> Candidate:
        plain_step = method.make_step(graphed=False, **variant)
        if self.settings.device.type != "cuda":
            return Candidate(lambda: plain_step(batch), method.memory_holders)
        graphed_step = method.make_step(graphed=True, **variant)
        return Candidate(lambda: graphed_step(batch), method.memory_holders, lambda: plain_step(batch))

    def warm_up(self) -> None:
        """Run one step of each method and count its operations; leave out methods that run out of memory."""
        for name, candidate in list(self.candidates.items()):
            try:
                with _without_compilation(self.settings.compile), FlopCounterMode(display=False) as counter:
                    candidate.measurable_step()
                candidate.flops = counter.get_total_flops()
                if self.settings.compile or candidate.plain_step:
                    candidate.step()
            except torch.OutOfMemoryError:
                del self.candidates[name]
                set_recomputation(self.perfusion.unet, False)
                self.out_of_memory[name] = f"{self.settings.device} has no memory for it"
        if PERFUSION in self.candidates and RECOMPUTING in self.candidates:
            self.candidates[RECOMPUTING].flops = self.candidates[PERFUSION].flops

    @property
    def steps_per_round(self) -> int:
        """Steps of a round: as in a run, an accelerator gets the next step before it has finished the last."""
        return 1 if self.settings.device.type == "cpu" else STEPS_PER_ROUND

    def _run_round(self, candidate: Candidate) -> None:
        for _ in range(self.steps_per_round):
            candidate.step()
        synchronize(self.settings.device)

    def run(self) -> dict[str, list[float]]:
        """Measure all methods and return the seconds per step of each round."""
        self.warm_up()

        # Memory is measured on its own, because resetting the peak takes time on a CPU.
        peak_memory = PeakMemory(self.settings.device)
        for candidate in self.candidates.values():
            candidate.peak_memory = peak_memory.measure(candidate.measurable_step)

        functions = {name: lambda candidate=candidate: self._run_round(candidate)
                     for name, candidate in self.candidates.items()}
        times = time_alternating(functions, self.settings.rounds, warm_up=False)
        return {name: [seconds / self.steps_per_round for seconds in rounds] for name, rounds in times.items()}

    def rows(self, rate: float) -> Iterator[BenchmarkRow]:
        """Measure all methods and yield their rows; `rate` is that of a large matrix product."""
        times = self.run()
        details = f"batch {self.batch_size}, {self.settings.side} px"
        for name, seconds in times.items():
            candidate = self.candidates[name]
            yield median_row(f"step of {name}, {details}", seconds, "s")
            if candidate.peak_memory is not None:
                memory = memory_of(candidate.memory_holders) + candidate.peak_memory
                yield BenchmarkRow(f"memory of {name}, {details}", memory / 1e9, "GB", goal=self._memory_goal(name))
            shares = [100 * candidate.flops / taken / rate for taken in seconds]
            yield median_row(f"share of the matrix rate, {name}, {details}", shares, "%", self._rate_goal(name))
        for name, reason in self.out_of_memory.items():
            yield BenchmarkRow(f"step of {name}, {details}", None, "s", note=reason)
        for name, goal in RATIO_GOALS.items():
            if name in times and PERFUSION in times:
                yield ratio_row(f"Perfusion / {name}, {details}", times[PERFUSION], times[name],
                                goal if self.settings.shape.has_goals else None)

    def _memory_goal(self, name: str) -> Goal | None:
        applies = self.settings.shape.has_goals and self.settings.side == MEMORY_GOAL_SIDE
        return MEMORY_GOALS.get((name, self.batch_size)) if applies else None

    def _rate_goal(self, name: str) -> Goal | None:
        applies = self.settings.shape.has_goals and self.settings.on_hopper and self.batch_size == RATE_GOAL_BATCH
        return RATE_GOAL if applies and name == PERFUSION else None


def _without_compilation(compiles: bool) -> AbstractContextManager[Any]:
    """Return a context manager in which compiled blocks run uncompiled, so that their operations can be counted."""
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


@contextmanager
def _restore_flags() -> Iterator[None]:
    """Restore the flags of torch that a step sets for the whole process: TF32 and the limit of recompilations."""
    precision, limit = torch.get_float32_matmul_precision(), torch._dynamo.config.recompile_limit
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch._dynamo.config.recompile_limit = limit


def compile_blocks(network: nn.Module) -> None:
    """Compile each block on its own: blocks of one shape share their code, which is ready sooner than the whole."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for module in network.modules():
        if type(module).__name__ in COMPILED_BLOCKS and not _reads_contexts(module):
            module.compile()


def _reads_contexts(module: nn.Module) -> bool:
    """Return whether a module is this project's transformer block, whose context may not be a tensor."""
    return type(module).__module__.startswith("ldm.") and type(module).__name__ == "BasicTransformerBlock"


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    rate = matrix_rate(settings.device)
    dtype = str(compute_dtype(settings.device)).removeprefix("torch.")
    yield BenchmarkRow(f"product of two matrices, {dtype}", rate / 1e12, "TFLOP/s")
    with _restore_flags():
        yield from _measure_steps(settings, rate)


def _measure_steps(settings: BenchmarkSettings, rate: float) -> Iterator[BenchmarkRow]:
    # Build Perfusion's step and the lower bound.
    perfusion = PerfusionStep(settings)
    set_recomputation(perfusion.unet, False)
    lower_bound = FrozenUNet(perfusion)

    # Build the other methods, as far as their packages are installed and the memory suffices.
    components, others = None, {}
    try:
        params = OmegaConf.to_container(read_config(settings.shape.train_config).model.params, resolve=True)
        components = baselines.DiffusersComponents(params, perfusion.model.cond_stage_model.transformer.config,
                                                   settings.device)
    except UserError as error:
        yield BenchmarkRow("steps of other methods", None, "s", note=str(error))
    if components is not None:
        for name, other in baselines.build_methods(components, free_memory(settings.device)):
            if isinstance(other, UserError):
                yield BenchmarkRow(f"step of {name}", None, "s", note=str(other))
            else:
                others[name] = other
    if settings.compile:
        for unet in (perfusion.unet, *(other.unet for other in others.values())):
            compile_blocks(unet)

    for batch_size in settings.batches:
        yield from StepComparison(settings, batch_size, perfusion, lower_bound, components, others).rows(rate)
