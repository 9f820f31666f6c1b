"""Each figure of the base model's table: how it is measured, and its goal."""
from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.mini import parts
from evaluation.mini.world_prompts import FIRST_SEED, Answers, Asked, WorldRecogniser, asked, real_pictures
from evaluation.output.goals import GoalRow
from evaluation.output.table import write_csv
from evaluation.stats.intervals import Estimate, bootstrap_mean
from evaluation.sweeps.samples import Manner, Painter, as_batch
from ldm.checkpoints.load import load_model
from ldm.data.images import save_grid
from ldm.data.mini.scenes import SceneDataset
from ldm.inference import sampling as inference
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.util import pick_device

AUTOENCODER = Path(__file__).resolve().parents[2] / "configs" / "mini" / "autoencoder.yaml"
SHEET, COLUMNS = 64, 8  # pictures on a sheet
REAL = {"known": False, "held-out": True}  # drawings that ceilings are measured on

Graded = tuple[list[Asked], Answers]  # prompts, and what was recognised in their pictures


class Subject:
    """What is measured: the parts that the options of `evaluation/base_model.py` name, loaded when first asked for.

    Raises:
        UserError: the config or the device cannot be used.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, pick_device(options.device)
        self.config = inference.read_model_config(options.config)
        inference.check_steps(self.config, options.ddim_steps)
        self.answers: list[dict[str, Any]] = []

    @functools.cached_property
    def model(self) -> Any:
        return inference.load_base(self.config, self.options.ckpt, self.device)

    @functools.cached_property
    def recogniser(self) -> WorldRecogniser:
        return WorldRecogniser(ClipEncoder.from_path(self.options.evaluation_clip, self.device))

    @property
    def first_stage(self) -> Any:
        """That of the base model, or the one named by --autoencoder."""
        if self.options.autoencoder is None:
            return self.model.first_stage_model
        return load_model(inference.read_model_config(AUTOENCODER), self.options.autoencoder, self.device)

    @property
    def held_out(self) -> SceneDataset:
        """Scenes of all looks, styles and relations, of drawings that no model was shown."""
        return SceneDataset(seed=FIRST_SEED + self.options.seed, held_out=True)

    def draw(self, wanted: Sequence[Asked], name: str) -> Tensor:
        """(N, 3, H, W) in [-1, 1]: a picture for each prompt; the first ones also go on a sheet of this name."""
        options = self.options
        painter = Painter(self.config, self.model, options.batch_size,
                          inference.wants_sixteen_bits(options.precision, self.device))
        pictures = painter.draw([inference.Job(one.prompt, one.seed) for one in wanted], description=f"drawing {name}",
                                manner=Manner(scale=options.scale, steps=options.ddim_steps))
        titles = [one.prompt for one in wanted[:SHEET]]
        save_grid(pictures[:SHEET], Path(options.outdir) / f"{name}.png", COLUMNS, titles)
        return as_batch(pictures)

    def graded(self, things: int, name: str) -> tuple[Graded, dict[str, Graded]]:
        """Prompts with what was recognised in pictures drawn from them; the same of real scenes, by their drawings."""
        options, recogniser = self.options, self.recogniser
        wanted = asked(options.prompts, options.seed, things)
        drawn = wanted, recogniser.answers(self.draw(wanted, name), wanted)
        real = {}
        for label, held_out in REAL.items():
            scenes = asked(options.scenes, options.seed, things, held_out)
            real[label] = scenes, recogniser.answers(real_pictures(scenes), scenes)
        for label, (prompts, answers) in {"drawn": drawn, **real}.items():
            self.answers += answers.records(prompts, label)
        write_csv(Path(options.outdir) / "answers.csv", self.answers, list(self.answers[0]))
        return drawn, real


def autoencoder(subject: Subject) -> Iterator[GoalRow]:
    found = parts.reconstruction(subject.first_stage, subject.held_out, subject.options.scenes)
    yield GoalRow("autoencoder: PSNR on held-out scenes", bootstrap_mean(found), "dB", 30)


def clip(subject: Subject) -> Iterator[GoalRow]:
    hits = parts.caption_hits(ClipEncoder.from_path(subject.options.clip, subject.device), subject.held_out,
                              subject.options.scenes)
    yield GoalRow("CLIP: top-1 of 64 captions for a held-out scene", bootstrap_mean(hits), "%", 90)


def segmenter(subject: Subject) -> Iterator[GoalRow]:
    found = parts.overlaps(ZeroShotSegmenter.from_path(subject.options.segmenter, subject.device), subject.held_out,
                           subject.options.scenes)
    yield GoalRow("segmenter: mean IoU on held-out drawings", bootstrap_mean([100 * value for value in found]), "%", 80)


def one_thing(subject: Subject) -> Iterator[GoalRow]:
    (wanted, answers), real = subject.graded(1, "one_thing")
    yield GoalRow("text-to-image, one thing: its kind recognised", bootstrap_mean(answers.kind_hits(wanted)), "%", 90,
              ceilings={label: bootstrap_mean(found.kind_hits(scenes)) for label, (scenes, found) in real.items()})
    yield GoalRow("text-to-image, one thing: its place recognised", bootstrap_mean(answers.place_hits(wanted)), "%", 95,
              ceilings={label: bootstrap_mean(found.place_hits(scenes)) for label, (scenes, found) in real.items()})


def two_things(subject: Subject) -> Iterator[GoalRow]:
    (wanted, answers), real = subject.graded(2, "two_things")
    yield GoalRow("text-to-image, two things: both recognised", bootstrap_mean(answers.kind_hits(wanted)), "%", 70,
              ceilings={label: bootstrap_mean(found.kind_hits(scenes)) for label, (scenes, found) in real.items()})


def speed(subject: Subject) -> Iterator[GoalRow]:
    options = subject.options
    with tempfile.TemporaryDirectory() as folder:
        command = parts.drawing_command(options.config, options.ckpt, options.scale, folder)
        seconds = Estimate(parts.seconds_of(command))
    yield GoalRow("4 images, 50 DDIM steps, guidance, CPU, 2 threads, start-up", seconds, "s", 15, at_most=True)


def size(subject: Subject) -> Iterator[GoalRow]:
    yield GoalRow("all weights", Estimate(parts.megabytes(subject.options.weights)), "MB", 40, at_most=True)


MEASURES: dict[str, Callable[[Subject], Iterator[GoalRow]]] = {
    "autoencoder": autoencoder, "clip": clip, "segmenter": segmenter, "one_thing": one_thing,
    "two_things": two_things, "speed": speed, "size": size}


def measured(subject: Subject, names: Sequence[str]) -> Iterator[GoalRow]:
    """The rows of these measures, in the table's order, each as soon as it is known."""
    for name, measure in MEASURES.items():
        if name in names:
            yield from measure(subject)
