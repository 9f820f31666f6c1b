"""Sampling with concepts loaded against the base model alone: seconds per picture and per step, side by side.

A picture is the prompt's encoding, every step with guidance, and decoding. The prompt names the first concept.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ldm.concepts.concept import base_fingerprint
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.inference.sampling import Job, Sampling, draw_latents, encode_once, latent_size, quickened
from ldm.modules.attention import name_text_layers
from ldm.modules.rank_one import invert_covariance
from scripts.benchmarks.common import Goal, Race, Row, Settings, median_row, ratio_row
from scripts.benchmarks.device import wait
from scripts.benchmarks.random_models import random_concept, random_covariance, random_model, read_config

COUNTS = (0, 1, 2, 8, 32)
GOALS = {1: Goal(1.01), 8: Goal(1.02), 32: Goal(1.05)}
SCALE = 6.0


class Drawer:
    """Draws with any number of random concepts loaded.

    Args:
        settings: shape, device, size and steps.
        most: as many concepts as can be loaded.
    """

    def __init__(self, settings: Settings, most: int) -> None:
        self.settings = settings
        config = read_config(settings.shape.draw)
        extra = {"covariance": None, "segmenter": None} if "covariance" in config.model.params else {}
        self.model: Any = random_model(config.model, ckpt_path=None, **extra).to(settings.device)
        self.sampling = Sampling(latent_size(config, settings.side, settings.side), settings.sampling_steps, SCALE,
                                 autocast=settings.device.type == "cuda")
        self.layers = name_text_layers(self.model.model.diffusion_model)
        width, base = next(iter(self.layers.values())).to_v.weight.shape[1], base_fingerprint(self.layers)
        words = self.model.cond_stage_model.token_table.shape[1]
        self.concepts = [random_concept(self.layers, words, base, number) for number in range(most)]
        self.inverse = invert_covariance(random_covariance(width))
        quickened(self.model, (), self.sampling)

    def encoder(self, count: int) -> ConceptPromptEncoder:
        """What encodes prompts with the first `count` concepts loaded."""
        return ConceptPromptEncoder(self.model.cond_stage_model, self.layers, self.concepts[:count], self.inverse)

    def draw(self, encoder: ConceptPromptEncoder, prompts: Sequence[str]) -> float:
        """Draws a picture of each prompt, as one batch; how many seconds each of the steps took."""
        jobs = [Job(prompt, number) for number, prompt in enumerate(prompts)]
        encoded = encode_once(encoder, prompts)
        wait(self.settings.device)
        start = time.perf_counter()
        latents = draw_latents(self.model, encoded, jobs, self.sampling)
        wait(self.settings.device)
        taken = time.perf_counter() - start
        for one in latents.split(1):
            self.model.decode_first_stage(one)
        wait(self.settings.device)
        return taken / self.sampling.steps

    def prompt(self, number: int, loaded: int) -> str:
        """With the word of concept `number`, or a plain one where it is not loaded."""
        word = self.concepts[number].placeholder if number < loaded else "teddy bear"
        return f"a photo of a {word} on the beach"


def measure(settings: Settings) -> Iterator[Row]:
    drawer = Drawer(settings, max(COUNTS))
    steps = drawer.sampling.steps
    in_steps: dict[int, list[float]] = {count: [] for count in COUNTS}

    def picture(count: int) -> Callable[[], None]:
        encoder, prompts = drawer.encoder(count), [drawer.prompt(0, count)]
        return lambda: in_steps[count].append(drawer.draw(encoder, prompts))

    times = Race({str(count): picture(count) for count in COUNTS}).run(settings.rounds)
    what = f"{steps} steps, {settings.side} px"
    for count in COUNTS:
        name = f"{count} concept{'s' * (count != 1)} loaded, {what}"
        yield median_row(f"a picture, {name}", times[str(count)], "s")
        yield median_row(f"a step of it, {name}", in_steps[count][1:], "s")
        if count:
            yield ratio_row(f"a picture, {count} loaded / none, {what}", times[str(count)], times["0"],
                            GOALS.get(count) if settings.shape.has_goals else None)
