"""Score the images of a folder, or generated images of a concept, for `evaluation/clip_eval.py`."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from evaluation.metrics.captioned_images import (
    Caption,
    common_side,
    group_by_category,
    read_captions,
    read_squares,
    score_records,
)
from evaluation.metrics.registry import METRICS, Scores
from evaluation.metrics.scoring import ConceptScorer, estimate_means, load_scorer
from evaluation.output.table import MarkdownTable, write_csv
from evaluation.prompts.prompt_sets import read_prompts
from evaluation.stats.intervals import Estimate
from evaluation.sweeps.samples import generate_images, read_single_concept, save_images
from evaluation.sweeps.settings import ClipEvalOptions
from ldm.concepts.settings import override_settings
from ldm.data.images import crop_square
from ldm.inference.model_config import (
    complete_settings,
    image_size,
    inference_defaults,
    latent_size,
    read_model_config,
)
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import requests_for
from ldm.util import pick_device

log = logging.getLogger(__name__)

MAX_SIDE = 512  # pixels, of the squares that are compared
TABLE = MarkdownTable(("prompts", "images", *(metric.heading for metric in METRICS)), (20, 8, *[22] * len(METRICS)))


@dataclass(frozen=True)
class Evaluation:
    """The scores of some images.

    Attributes:
        captions: the caption of each image.
        texts: the prompt of each image in plain words.
        scores: the scores of each image.
        scorer: the scorer that was used.
    """

    captions: Sequence[Caption]
    texts: Sequence[str]
    scores: Sequence[Scores]
    scorer: ConceptScorer

    @classmethod
    def of_images(cls, images: Iterable[Image.Image], captions: Sequence[Caption], texts: Sequence[str],
                  scorer: ConceptScorer) -> Evaluation:
        """Score images of one size."""
        scorer.references.clip.warn_of_long_texts(texts)
        return cls(captions, texts, scorer.score_all(images, texts), scorer)

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Return the means: category of prompts, and last all of them -> metric -> mean.

        Intervals come from resampling texts, because images of one text belong together.
        """
        groups = group_by_category(self.captions, list(zip(self.scores, self.texts, strict=True)))
        return {category: estimate_means(*zip(*members, strict=True)) for category, members in groups.items()}

    def lines(self) -> Iterator[str]:
        """Yield the table of means, the photos' own scores as its last line, and notes on missing values."""
        references = self.scorer.references
        images = group_by_category(self.captions, self.texts)
        yield TABLE.header()
        for category, estimates in self.estimates().items():
            yield TABLE.line([category, str(len(images[category])), *(metric.cell(estimates) for metric in METRICS)])
        cells = ["-" if value is None else f"{value:.1f}" for value in self.scorer.score_photos().values()]
        yield TABLE.line(["photos to each other", str(len(references.photo_embeddings)), *cells])
        for metric in METRICS:
            missing = sum(score[metric.name] is None for score in self.scores)
            if missing and metric.is_available(references):
                reason = metric.missing.format(super_category=references.super_category)
                yield f"{metric.heading}: {reason} in {missing} of {len(self.scores)} images, which are left out"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the scores of each image and the means as CSV files; return their paths."""
        scores_file, means_file = folder / "similarities.csv", folder / "means.csv"
        means = [{"category": category, "metric": name, **asdict(estimate)}
                 for category, estimates in self.estimates().items() for name, estimate in estimates.items()]
        for path, records in ((scores_file, score_records(self.captions, self.texts, self.scores)),
                              (means_file, means)):
            write_csv(path, records, list(records[0]))
        return scores_file, means_file


def evaluate_folder(options: ClipEvalOptions) -> Evaluation:
    """Score the images of a folder.

    Raises:
        UserError: the images, their prompts or the references cannot be used.
    """
    folder, references = options.folder, options.references
    captions = read_captions(folder.images, folder.captions, folder.prompt)
    named = {words for caption in captions for words in caption.super_categories.values()}
    super_category = references.super_category or (named.pop() if len(named) == 1 else None)
    texts = [caption.text(super_category) for caption in captions]
    side = common_side(captions, MAX_SIDE)
    config, device = read_model_config(options.model.config), pick_device(options.model.device)
    scorer = load_scorer(references, config, options.model.checkpoint, device, side, super_category)
    return Evaluation.of_images(read_squares(captions, side), captions, texts, scorer)


def evaluate_concept(options: ClipEvalOptions) -> Evaluation:
    """Generate an image of the concept for each prompt and seed, and score them.

    Raises:
        UserError: there are several concepts, or the concept, the prompts, the models or the photos cannot be used.
    """
    # Check everything that needs no weights first.
    prompts = read_prompts(options.samples.prompts)
    concept = read_single_concept(options.concepts)
    settings, model = options.settings, options.model
    (concept,) = override_settings([concept], settings.biases, settings.temperatures, settings.all_layers)
    super_category = options.references.super_category or concept.super_category
    config, device = read_model_config(model.config), pick_device(model.device)
    defaults = inference_defaults(config, model.checkpoint)
    settings = complete_settings(settings.without_concept_settings(), config, defaults)
    side = min(image_size(config, latent_size(config)))

    # Load the models.
    scorer = load_scorer(options.references, config, model.checkpoint, device, side, super_category)
    pipeline = PerfusionPipeline.from_config(config, model.checkpoint, device, model.precision, model.vae,
                                             model.text_encoder, model.loras)

    # Generate the images, and save them if asked to.
    seeds = options.samples.seeds
    log.info("%s, a %s, %s: %d prompts, %d seeds", concept.placeholder, concept.super_category, concept.summary,
             len(prompts), len(seeds))
    requests = requests_for([prompt.fill(concept.placeholder) for prompt in prompts], seeds)
    categories = [prompt.category for prompt in prompts for _ in seeds]
    images = generate_images(pipeline, requests, [concept], settings, options.samples.batch_size)
    files: Sequence[Path | None] = [None] * len(requests)
    if options.save:
        output = save_images(images, requests, options.outdir, len(seeds), [concept], settings, categories)
        files = output.images
        log.info("contact sheets: %s", ", ".join(map(str, output.sheets)))

    # Score them.
    captions = [Caption(request.prompt, {concept.placeholder: super_category}, category, request.seed, file)
                for request, category, file in zip(requests, categories, files, strict=True)]
    texts = [caption.text(None) for caption in captions]
    return Evaluation.of_images((crop_square(image, side) for image in images), captions, texts, scorer)
