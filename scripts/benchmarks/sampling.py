"""Sampling with concepts loaded, compared with the base model alone: seconds per image and per step.

An image is what `PerfusionPipeline` does: encode the prompt, sample with guidance, decode. The prompt names the first
concept.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm.concepts.fingerprint import base_fingerprint
from ldm.inference import GenerationRequest, GenerationSettings, PerfusionPipeline
from ldm.modules.attention import name_text_layers
from scripts.benchmarks.common import (
    BenchmarkRow,
    BenchmarkSettings,
    Goal,
    median_row,
    ratio_row,
    time_alternating,
)
from scripts.benchmarks.device import synchronize
from scripts.benchmarks.random_models import (
    random_concept,
    random_inference_model,
    read_config,
    text_width,
    write_covariance,
)

COUNTS = (0, 1, 2, 8, 32)
GOALS = {1: Goal(1.01), 8: Goal(1.02), 32: Goal(1.05)}
GUIDANCE_SCALE = 6.0


class TimedPipeline(PerfusionPipeline):
    """A pipeline that records the seconds per step of each sampling.

    Attributes:
        step_seconds: seconds per step of each sampling, without encoding and decoding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_seconds: list[float] = []

    def latents(self, encoded: Any, requests: Sequence[GenerationRequest], settings: GenerationSettings,
                *args: Any) -> Tensor:
        synchronize(self.device)
        start = time.perf_counter()
        latents = super().latents(encoded, requests, settings, *args)
        synchronize(self.device)
        self.step_seconds.append((time.perf_counter() - start) / settings.num_inference_steps)
        return latents

    def generate_batch(self, prompts: Sequence[str], settings: GenerationSettings) -> None:
        """Generate an image of each prompt, as one batch."""
        requests = [GenerationRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
        list(self.generate(requests, settings, batch_size=len(requests)))
        synchronize(self.device)

    def prompt(self, index: int) -> str:
        """Return a prompt with the placeholder of concept `index`, or with a plain word if it is not loaded."""
        word = self.concepts[index].placeholder if index < len(self.concepts) else "teddy bear"
        return f"a photo of a {word} on the beach"


def generation_settings(settings: BenchmarkSettings) -> GenerationSettings:
    """Return how the benchmark generates images."""
    return GenerationSettings(settings.sampling_steps, GUIDANCE_SCALE, "ddim", height=settings.side,
                              width=settings.side)


def build_pipelines(settings: BenchmarkSettings, counts: Sequence[int]) -> dict[int, TimedPipeline]:
    """Build a pipeline for each number of loaded concepts. They share one model with random weights."""
    # The model, and a random covariance in place of one that takes minutes to compute.
    config = read_config(settings.shape.inference_config)
    model = random_inference_model(config).to(settings.device)
    layers = name_text_layers(model.model.diffusion_model)
    covariance = str(write_covariance(model.cond_stage_model, text_width(layers), settings.folder))
    if hasattr(model, "covariance"):
        model.covariance = covariance

    word_width, base = model.cond_stage_model.embedding_width, base_fingerprint(layers)
    concepts = [random_concept(layers, word_width, base, index) for index in range(max(counts))]
    pipelines = {}
    for count in counts:
        is_first = not pipelines  # the first call converts the model for all
        pipeline = TimedPipeline(model, config, accelerate=is_first)
        pipeline.defaults = replace(pipeline.defaults, covariance=covariance)
        if count:
            pipeline.load_concepts(*concepts[:count])
        pipelines[count] = pipeline
    return pipelines


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    pipelines = build_pipelines(settings, COUNTS)
    generation = generation_settings(settings)

    def generate_with(count: int) -> Callable[[], None]:
        pipeline = pipelines[count]
        return lambda: pipeline.generate_batch([pipeline.prompt(0)], generation)

    times = time_alternating({str(count): generate_with(count) for count in COUNTS}, settings.rounds)
    details = f"{generation.num_inference_steps} steps, {settings.side} px"
    for count in COUNTS:
        name = f"{count} concept{'s' * (count != 1)} loaded, {details}"
        yield median_row(f"an image, {name}", times[str(count)], "s")
        yield median_row(f"a step of it, {name}", pipelines[count].step_seconds[1:], "s")  # without the warm-up
        if count:
            yield ratio_row(f"an image, {count} loaded / none, {details}", times[str(count)], times["0"],
                            GOALS.get(count) if settings.shape.has_goals else None)
