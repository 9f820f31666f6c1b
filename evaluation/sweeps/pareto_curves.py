"""Run the points of sweeps, and write tables, plots and grids of images, for `evaluation/pareto.py`."""
from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.metrics.registry import METRICS
from evaluation.metrics.scoring import load_scorer
from evaluation.output.file_names import slug
from evaluation.output.image_grid import ColumnHeading, save_image_grid
from evaluation.output.plots import Series, plot_curves
from evaluation.output.table import MarkdownTable, write_csv
from evaluation.prompts.prompt_sets import EvaluationPrompt, read_prompts, select_prompts
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import read_single_concept
from evaluation.sweeps.settings import ParetoOptions
from evaluation.sweeps.sweep import (
    Curve,
    Point,
    PointResult,
    Source,
    Sweep,
    SweepRunner,
    balanced_point,
    build_sweeps,
    distinct_points,
)
from ldm.common.errors import UserError
from ldm.inference.model_config import (
    complete_settings,
    image_size,
    inference_defaults,
    latent_size,
    read_model_config,
)
from ldm.inference.pipeline import PerfusionPipeline
from ldm.util import pick_device

log = logging.getLogger(__name__)

GRID_ROWS = 6
TEXT = METRICS[0]  # text similarity, which the other metrics are plotted against
TABLE = MarkdownTable(("curve", "bias", *(metric.heading for metric in METRICS)), (30, 8, *[22] * len(METRICS)))


@dataclass(frozen=True)
class CurveRow:
    """A point on a curve and what it reaches.

    Attributes:
        curve: name of the curve.
        point: the point.
        result: its images and their scores.
        estimates: the mean of each metric.
        is_balanced: whether `--bias auto` would choose this point of the curve.
    """

    curve: str
    point: Point
    result: PointResult
    estimates: Mapping[str, Estimate]
    is_balanced: bool

    def cells(self) -> list[str]:
        """Return the cells of the row in `TABLE`."""
        bias = self.point.settings.bias
        mark = "-" if bias is None else f"{bias:g}{' *' if self.is_balanced else ''}"
        return [self.curve, mark, *(metric.cell(self.estimates) for metric in METRICS)]

    def record(self) -> dict[str, Any]:
        """Return the row for a CSV file; metrics without values stay empty."""
        record = {"curve": self.curve, **self.point.record()}
        for metric in METRICS:
            estimate = self.estimates.get(metric.name)
            for suffix, field in (("", "mean"), ("_low", "low"), ("_high", "high")):
                record[f"{metric.name}{suffix}"] = None if estimate is None else getattr(estimate, field)
        return {**record, "images": len(self.result.scores), "balance": self.is_balanced}


def read_sources(options: ParetoOptions) -> list[Source]:
    """Return the concept of each file.

    Raises:
        UserError: a file holds several concepts, they are of different subjects, or none has what is to be swept.
    """
    labels = options.labels or _file_labels(options.concepts)
    sources = [Source(label, read_single_concept([file]))
               for file, label in zip(options.concepts, labels, strict=True)]
    super_categories = list(dict.fromkeys(source.concept.super_category for source in sources))
    if len(super_categories) > 1 and options.references.super_category is None:
        first, second, *_ = super_categories
        raise UserError(f"--concept: a {first} and a {second}, but the photos are of one subject; name files of one "
                        "subject, or give its words with --super_category")
    if options.temperatures and not any(source.has_gate for source in sources):
        concept = sources[0].concept
        raise UserError(f"--temperatures: concept {concept.label} was trained {concept.summary} and has none; leave "
                        "the flag out")
    return sources


def prepare(options: ParetoOptions) -> tuple[list[Sweep], SweepRunner]:
    """Return what is to be generated, and what generates and scores it.

    Raises:
        UserError: the concepts, the prompts, the models or the photos cannot be used.
    """
    prompts, sources = read_prompts(options.samples.prompts), read_sources(options)
    model = options.model
    config, device = read_model_config(model.config), pick_device(model.device)
    settings = complete_settings(options.settings, config, inference_defaults(config, model.checkpoint))
    side = min(image_size(config, latent_size(config)))
    super_category = options.references.super_category or sources[0].concept.super_category
    scorer = load_scorer(options.references, config, model.checkpoint, device, side, super_category)
    pipeline = PerfusionPipeline.from_config(config, model.checkpoint, device, model.precision, model.vae,
                                             model.text_encoder, model.loras)
    sweeps = build_sweeps(sources, settings, options.biases, options.locks, options.temperatures,
                          options.guidance_scales)
    return sweeps, SweepRunner(pipeline, scorer, prompts, options.samples.seeds, side, super_category,
                               options.samples.batch_size)


def run_points(sweeps: Sequence[Sweep], runner: SweepRunner) -> dict[Point, PointResult]:
    """Generate and score all points of all sweeps, with a log line for each."""
    points, results = distinct_points(sweeps), {}
    log.info("%d settings, %d prompts, %d seeds: %d images", len(points), len(runner.prompts), len(runner.seeds),
             len(points) * len(runner.texts))
    for number, point in enumerate(points, start=1):
        start = time.perf_counter()
        results[point] = runner.run(point)
        log.info("%d of %d, %s: %.0f s", number, len(points), point.summary, time.perf_counter() - start)
    return results


def curve_rows(curve: Curve, results: Mapping[Point, PointResult]) -> list[CurveRow]:
    """Return a row for each point of a curve."""
    balance = balanced_point(curve, results)
    return [CurveRow(curve.name, point, results[point], results[point].estimates(), point is balance)
            for point in curve.points]


def format_table(rows: Sequence[CurveRow]) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join([TABLE.header(), *(TABLE.line(row.cells()) for row in rows)])


def write_sweep(folder: Path, sweep: Sweep, curves: Mapping[str, Sequence[CurveRow]],
                prompts: Sequence[EvaluationPrompt]) -> list[Path]:
    """Write the means as CSV, the plots, and a grid of images for each curve; return the paths.

    Args:
        folder: gets the files.
        sweep: names them.
        curves: name of the curve -> its rows.
        prompts: prompts of the images.
    """
    rows = [row for curve in curves.values() for row in curve]
    records = [row.record() for row in rows]
    written = [folder / f"{sweep.key}.csv"]
    write_csv(written[0], records, list(records[0]))
    for metric in METRICS:
        if metric is not TEXT and all(metric.name in row.estimates for row in rows):
            series = [_series(name, curve, metric.name) for name, curve in curves.items()]
            written.append(plot_curves(folder / f"{sweep.key}_{metric.name}.png", series, metric.heading, TEXT.heading,
                                       f"{sweep.title} (numbers are biases, bars 95 % intervals)"))
    for name, curve in curves.items():
        written.append(write_grid(folder / f"{sweep.key}-{slug(name)}.png", name, curve, prompts))
    return written


def write_grid(path: Path, name: str, rows: Sequence[CurveRow], prompts: Sequence[EvaluationPrompt]) -> Path:
    """Write the first seed's images along a curve: a row for each of some prompts, a column for each point."""
    indices = [prompts.index(prompt) for prompt in select_prompts(prompts, GRID_ROWS)]
    images = [[row.result.images[index] for row in rows] for index in indices]
    placeholder = rows[0].point.source.concept.placeholder
    labels = [prompts[index].fill(placeholder) for index in indices]
    headings = []
    for row in rows:
        note = f"text {row.estimates['text'].mean:.0f}, image {row.estimates['image'].mean:.0f}"
        headings.append(ColumnHeading(row.point.label, note, row.is_balanced))
    has_balance = any(row.is_balanced for row in rows)
    title = f"{name} (bold: the bias that balances text and image)" if has_balance else name
    return save_image_grid(path, images, labels, headings, title)


def write_scores(folder: Path, runner: SweepRunner, results: Mapping[Point, PointResult]) -> Path:
    """Write the scores of every image as CSV; return its path."""
    path, records = folder / "similarities.csv", list(runner.records(results))
    write_csv(path, records, list(records[0]))
    return path


def _series(name: str, rows: Sequence[CurveRow], metric: str) -> Series:
    labels = [row.point.label.removeprefix("bias ") for row in rows]
    return Series(name, [row.estimates[metric] for row in rows], [row.estimates["text"] for row in rows], labels)


def _file_labels(files: Sequence[str]) -> list[str]:
    """Return the files' stems if these differ, or else their paths without suffix."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(Path(file).with_suffix("")) for file in files]
