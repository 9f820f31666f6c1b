"""What `evaluation/clip_eval.py` measures: pictures of a folder, or of a concept that they are drawn of."""
from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from evaluation.clip_eval import NO_SEGMENTER, USUAL_SEEDS
from evaluation.metrics.captioned_images import (
    Caption,
    by_category,
    captions_of,
    common_side,
    measured,
    records,
    squares,
)
from evaluation.metrics.similarity import KINDS, Similarity, SimilarityMeter, figures_of
from evaluation.output import table
from evaluation.prompts.prompt_sets import MINI_PROMPTS, read_prompts
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import Manner, Painter, as_batch, jobs_of, keep, sampling_of
from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.data.images import crop_square
from ldm.data.personalized import PersonalizedBase
from ldm.inference import sampling as inference
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.util import pick_device

log = logging.getLogger(__name__)

MOST_PIXELS = 512  # on a side, of what is measured
HEADINGS = ("prompts", "pictures", *(f"{kind} similarity" for kind in KINDS))
WIDTHS = (20, 8, 22, 22, 22)
TABLE = table.MarkdownTable(HEADINGS, WIDTHS)


@dataclass(frozen=True)
class Result:
    """What was measured in some pictures.

    Attributes:
        texts: the prompt of each picture in plain words.
        found: what each reaches.
    """

    captions: Sequence[Caption]
    texts: Sequence[str]
    found: Sequence[Similarity]
    meter: SimilarityMeter

    def figures(self) -> dict[str, dict[str, Estimate]]:
        """Category of prompts, at last all of them -> kind of similarity -> its mean, the interval by resampling texts:
        pictures of one text belong together."""
        measured = by_category(self.captions, list(zip(self.found, self.texts, strict=True)))
        return {category: figures_of(*zip(*some, strict=True)) for category, some in measured.items()}

    def lines(self) -> Iterator[str]:
        """The table of means, and below it what the photos themselves reach."""
        yield TABLE.header()
        for category, means in self.figures().items():
            cells = [means[kind].text() if kind in means else "-" for kind in KINDS]
            yield TABLE.line([category, str(means["text"].count), *cells])
        photos = ["-" if value is None else f"{value:.1f}" for value in self.meter.among_photos()]
        yield TABLE.line(["photos to each other", str(len(self.meter.photos)), "-", *photos])
        hidden = sum(one.object is None for one in self.found)
        if self.meter.objects is not None and hidden:
            yield (f"objects: the segmenter finds no {self.meter.super_category} in {hidden} of {len(self.found)} "
                   "pictures, which the last column leaves out")

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes what each picture reaches, and the means, as CSV files; returns their paths."""
        each, means = folder / "similarities.csv", folder / "means.csv"
        flat = [{"category": category, "similarity": kind, **asdict(figure)}
                for category, figures in self.figures().items() for kind, figure in figures.items()]
        for path, rows in ((each, records(self.captions, self.texts, self.found)), (means, flat)):
            table.write_csv(path, rows, list(rows[0]))
        return each, means


def of_folder(options: argparse.Namespace) -> Result:
    """The pictures of --images.

    Raises:
        UserError: they, their prompts or what they are compared with cannot be used.
    """
    captions = captions_of(options.images, options.captions, options.prompt)
    named = {words for caption in captions for words in caption.words.values()}
    super_category = options.super_category or (named.pop() if len(named) == 1 else None)
    texts = [caption.text(super_category) for caption in captions]
    side = common_side(captions, MOST_PIXELS)
    return _result(captions, texts, squares(captions, side), meter_of(options, side, super_category))


def of_concept(options: argparse.Namespace) -> Result:
    """Pictures of --concept, one for each prompt and seed.

    Raises:
        UserError: it is not one concept, or it, the prompts, the models or the photos cannot be used.
    """
    prompts, concept = read_prompts(options.prompts or MINI_PROMPTS), _only_concept(options)
    super_category = options.super_category or concept.super_category
    config, manner = inference.read_model_config(options.config), _manner(options)
    side = min(inference.picture_size(config, sampling_of(config, manner).latent_size))
    meter = meter_of(options, side, super_category)
    painter = Painter.load(options.config, options.ckpt, options.device, options.batch_size, options.precision)
    seeds = range(options.seed, options.seed + (options.seeds or USUAL_SEEDS))
    log.info("%s, a %s, %s: %d prompts, %d seeds", concept.placeholder, concept.super_category, concept.summary,
             len(prompts), len(seeds))
    jobs = jobs_of([prompt.fill(concept.placeholder) for prompt in prompts], seeds)
    categories = [prompt.category for prompt in prompts for _ in seeds]
    pictures = painter.draw(jobs, [concept], manner)
    files: Sequence[Path | None] = [None] * len(jobs)
    if options.save:
        album = keep(pictures, jobs, options.outdir, len(seeds), [concept], manner, categories)
        files = album.pictures
        log.info("sheets of the pictures: %s", ", ".join(map(str, album.sheets)))
    captions = [Caption(job.prompt, {concept.placeholder: super_category}, category, job.seed, file)
                for job, category, file in zip(jobs, categories, files, strict=True)]
    texts = [caption.text(None) for caption in captions]
    return _result(captions, texts, (crop_square(picture, side) for picture in pictures), meter)


def meter_of(options: argparse.Namespace, side: int, super_category: str | None) -> SimilarityMeter:
    """Compares pictures of `side` pixels with --photos, by --clip and --segmenter.

    Raises:
        UserError: one of them cannot be used, or the segmenter has nothing to look for.
    """
    device, segmenter, masks = pick_device(options.device), None, None
    photos = PersonalizedBase(options.photos, side, mask_root=options.masks)
    if options.segmenter != NO_SEGMENTER:
        if super_category is None:
            raise UserError('--super_category: nothing says what the photos show; give words such as "teddy bear", or '
                            "--segmenter none to leave objects out")
        name = options.segmenter or inference.segmenter_of(inference.read_model_config(options.config))
        segmenter = ZeroShotSegmenter.from_path(name, device)
    if photos.has_masks:
        masks = torch.stack([photos.mask(number) for number in range(len(photos.paths))])
    recogniser = ClipEncoder.from_path(options.clip, device)
    return SimilarityMeter(recogniser, as_batch(photos.images), super_category or "", segmenter, masks)


def _result(captions: Sequence[Caption], texts: Sequence[str], pictures: Iterable[Image.Image],
            meter: SimilarityMeter) -> Result:
    return Result(captions, texts, measured(meter, pictures, texts), meter)


def _only_concept(options: argparse.Namespace) -> AnyConcept:
    concepts = inference.ready_concepts(options.concept, options.bias, options.temperature, options.all_layers)
    if len(concepts) > 1:
        raise UserError(f"--concept: {', '.join(concept.label for concept in concepts)}: the photos can be of one of "
                        "them only; name a file that holds one")
    return concepts[0]


def _manner(options: argparse.Namespace) -> Manner:
    """How the flags ask to draw; what they say of the concept is in it already."""
    return Manner(None, None, options.global_locking, scale=options.scale, steps=options.ddim_steps,
                  sampler=options.sampler, eta=options.ddim_eta)
