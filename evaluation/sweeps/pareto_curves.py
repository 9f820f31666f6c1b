"""What `evaluation/pareto.py` does: sweeps drawn and measured, and their tables, curves and grids of pictures."""
from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.clip_eval import USUAL_SEEDS
from evaluation.metrics.clip_measures import meter_of
from evaluation.metrics.similarity import KINDS
from evaluation.output import table
from evaluation.output.file_names import slug
from evaluation.output.image_grid import ColumnHeading, save_image_grid
from evaluation.output.plots import Series, plot_curves
from evaluation.output.table import MarkdownTable
from evaluation.prompts.prompt_sets import MINI_PROMPTS, EvaluationPrompt, read_prompts, select_prompts
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import Manner, Painter, sampling_of
from evaluation.sweeps.sweep import Drawn, Point, Source, Sweep, Sweeper, balance_of, points_of, sweeps_of
from ldm.common.errors import UserError
from ldm.inference import sampling as inference

log = logging.getLogger(__name__)

GRID_ROWS = 6
HEADINGS = ("curve", "bias", *(f"{kind} similarity" for kind in KINDS))
WIDTHS = (30, 8, 22, 22, 22)
TABLE = MarkdownTable(HEADINGS, WIDTHS)


@dataclass(frozen=True)
class Line:
    """A point on a curve: what it reaches, by the kind of similarity, and whether it is the curve's balance."""

    curve: str
    point: Point
    drawn: Drawn
    figures: Mapping[str, Estimate]
    balance: bool

    def cells(self) -> list[str]:
        bias = self.point.manner.bias
        mark = "-" if bias is None else f"{bias:g}{' *' if self.balance else ''}"
        return [self.curve, mark, *(self.figures[kind].text() if kind in self.figures else "-" for kind in KINDS)]

    def record(self) -> dict[str, Any]:
        """Its columns in a CSV file."""
        ends = {"": "mean", "_low": "low", "_high": "high"}
        means = {f"{kind}{end}": getattr(self.figures.get(kind), name, None) for kind in KINDS
                 for end, name in ends.items()}
        return {"curve": self.curve, **self.point.record(), **means, "pictures": len(self.drawn.found),
                "balance": self.balance}


def sources_of(options: argparse.Namespace) -> list[Source]:
    """The concept of each file.

    Raises:
        UserError: a file holds several, they are of different things, or none has what is to be swept.
    """
    labels = options.labels or _names(options.concept)
    sources = [Source(label, _only_concept(file)) for file, label in zip(options.concept, labels, strict=True)]
    kinds = list(dict.fromkeys(source.concept.super_category for source in sources))
    if len(kinds) > 1 and options.super_category is None:
        raise UserError(f"--concept: a {kinds[0]} and a {kinds[1]}, but the photos are of one thing; name files of "
                        "that, or say by --super_category what it is")
    if options.temperatures and not any(source.has_gate for source in sources):
        concept = sources[0].concept
        raise UserError(f"--temperatures: concept {concept.label} was learned {concept.summary} and has none; leave "
                        "the flag out")
    return sources


def set_up(options: argparse.Namespace) -> tuple[list[Sweep], Sweeper]:
    """What is to be drawn, and what draws it.

    Raises:
        UserError: the concepts, the prompts, the models or the photos cannot be used.
    """
    prompts, sources = read_prompts(options.prompts or MINI_PROMPTS), sources_of(options)
    config = inference.read_model_config(options.config)
    manner = Manner(scale=options.scale, steps=options.ddim_steps, sampler=options.sampler, eta=options.ddim_eta)
    side = min(inference.picture_size(config, sampling_of(config, manner).latent_size))
    super_category = options.super_category or sources[0].concept.super_category
    meter = meter_of(options, side, super_category)
    painter = Painter.load(options.config, options.ckpt, options.device, options.batch_size, options.precision)
    seeds = range(options.seed, options.seed + (options.seeds or USUAL_SEEDS))
    sweeps = sweeps_of(sources, manner, options.biases, options.locks, options.temperatures, options.scales)
    return sweeps, Sweeper(painter, meter, prompts, seeds, side, super_category)


def drawn_points(sweeps: Sequence[Sweep], sweeper: Sweeper) -> dict[Point, Drawn]:
    """All points of all sweeps; says how far it is."""
    points, drawn = points_of(sweeps), {}
    log.info("%d settings, %d prompts, %d seeds: %d pictures", len(points), len(sweeper.prompts), len(sweeper.seeds),
             len(points) * len(sweeper.texts))
    for place, point in enumerate(points, start=1):
        began = time.perf_counter()
        drawn[point] = sweeper.draw(point)
        log.info("%d of %d, %s: %.0f s", place, len(points), point.summary, time.perf_counter() - began)
    return drawn


def lines_of(sweep: Sweep, drawn: Mapping[Point, Drawn]) -> list[Line]:
    """Every point of every curve, in order."""
    balances = [balance_of(curve, drawn) for curve in sweep.curves]
    return [Line(curve.name, point, drawn[point], drawn[point].figures(), point is balance)
            for curve, balance in zip(sweep.curves, balances, strict=True) for point in curve.points]


def table_of(lines: Sequence[Line]) -> str:
    """To be printed."""
    return "\n".join([TABLE.header(), *(TABLE.line(line.cells()) for line in lines)])


def write_sweep(folder: Path, sweep: Sweep, lines: Sequence[Line], prompts: Sequence[EvaluationPrompt]) -> list[Path]:
    """The means as CSV, the curves, and a grid of pictures for each of them; returns their paths."""
    rows = [line.record() for line in lines]
    written = [folder / f"{sweep.key}.csv"]
    table.write_csv(written[0], rows, list(rows[0]))
    curves = {curve.name: [line for line in lines if line.curve == curve.name] for curve in sweep.curves}
    for kind in ("image", "object"):
        if all(kind in line.figures for line in lines):
            series = [Series(name, [line.figures[kind] for line in own], [line.figures["text"] for line in own],
                             [line.point.label.removeprefix("bias ") for line in own])
                      for name, own in curves.items()]
            written.append(plot_curves(folder / f"{sweep.key}_{kind}.png", series, f"{kind} similarity",
                                       "text similarity", f"{sweep.title} (numbers are biases, bars 95 % intervals)"))
    return written + [write_grid(folder / f"{sweep.key}-{slug(name)}.png", name, own, prompts)
                      for name, own in curves.items()]


def write_grid(path: Path, name: str, lines: Sequence[Line], prompts: Sequence[EvaluationPrompt]) -> Path:
    """The first seed's pictures along a curve: a row for each of some prompts, of all categories."""
    rows = [prompts.index(prompt) for prompt in select_prompts(prompts, GRID_ROWS)]
    headings = [ColumnHeading(line.point.label, f"text {line.figures['text'].mean:.0f}, image {line.figures['image'].mean:.0f}",
                              line.balance) for line in lines]
    pictures = [[line.drawn.pictures[row] for line in lines] for row in rows]
    labels = [prompts[row].fill(lines[0].point.source.concept.placeholder) for row in rows]
    marked = next((place for place, line in enumerate(lines) if line.balance), None)
    title = name if marked is None else f"{name} (bold: the bias that balances text and image)"
    return save_image_grid(path, pictures, labels, headings, title)


def write_every(folder: Path, sweeper: Sweeper, drawn: Mapping[Point, Drawn]) -> Path:
    """What every picture reaches, as CSV; returns its path."""
    rows = list(sweeper.records(drawn))
    table.write_csv(folder / "similarities.csv", rows, list(rows[0]))
    return folder / "similarities.csv"


def _only_concept(file: str) -> Any:
    concepts = inference.ready_concepts([file])
    if len(concepts) > 1:
        raise UserError(f"{file}: holds {', '.join(concept.placeholder for concept in concepts)}, but the photos are "
                        "of one thing; name a file that holds one")
    return concepts[0]


def _names(files: Sequence[str]) -> list[str]:
    """What to call files: their own names where these differ, or else with their folders."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(Path(file).with_suffix("")) for file in files]
