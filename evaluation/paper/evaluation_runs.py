"""Images generated of learned concepts, and what was measured in them: CSV files, made if they are missing.

A set is what one variant generates of one target (a concept or a pair) for all prompts and seeds. The name of its file
contains a key of everything that it depends on, as the names of concept files do (see
`evaluation.paper.training_runs`).
"""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.output.file_names import slug
from evaluation.output.table import write_csv
from evaluation.paper.design import Variant
from evaluation.paper.evaluators import TEXT_COLUMNS, Evaluators, Record
from evaluation.paper.examples import EvalTarget, ExampleConcept
from evaluation.paper.file_keys import KEY_LENGTH, content_digest, short_key
from evaluation.paper.prompt_cases import EvalPlan, build_prompt_cases, requests_of
from evaluation.paper.training_runs import TrainingRuns
from evaluation.sweeps.samples import generate_images
from ldm.concepts.storage import read_concepts
from ldm.data.contact_sheet import save_grid
from ldm.inference.requests import GenerationRequest

SHEET_COLUMNS = 4


@dataclass(frozen=True)
class EvaluationRuns:
    """Generates and measures sets of images, and finds those that exist already.

    Attributes:
        evaluators: the models.
        training: where the concepts are.
        plan: prompts and seeds.
        folder: gets `evaluated/<method>/<target>/<settings>-<key>.csv`, each with a `.png` of some images.
    """

    evaluators: Evaluators
    training: TrainingRuns
    plan: EvalPlan
    folder: Path

    def csv_file(self, variant: Variant, target: EvalTarget) -> Path:
        """Return the path of a set, whether or not it exists; its concepts have to be trained."""
        return self._folder(variant, target) / f"{_file_stem(variant)}-{self._key(variant, target)}.csv"

    def is_finished(self, variant: Variant, target: EvalTarget) -> bool:
        """Return whether a set is complete."""
        has_concepts = all(path.is_file() for path in self._concept_files(variant, target))
        return has_concepts and self.csv_file(variant, target).is_file()

    def is_outdated(self, variant: Variant, target: EvalTarget) -> bool:
        """Return whether there are only sets with other keys, made by other code or settings."""
        others = self._folder(variant, target).glob(f"{_file_stem(variant)}-{'?' * KEY_LENGTH}.csv")
        return not self.is_finished(variant, target) and any(others)

    def read_records(self, variant: Variant, target: EvalTarget) -> list[Record]:
        """Read a finished set: a record for each image. Numbers are floats, and None if they do not apply."""
        with self.csv_file(variant, target).open(newline="", encoding="utf-8") as file:
            return [{column: _read_value(column, text) for column, text in row.items()} for row in csv.DictReader(file)]

    def evaluate(self, variant: Variant, target: EvalTarget) -> None:
        """Generate the images of a set, measure them, and write the results."""
        cases = build_prompt_cases(variant, target, self.plan)
        requests = requests_of(target, cases, self.plan.seeds)
        concepts = read_concepts(self._concept_files(variant, target))
        settings = variant.generation_settings(self.plan.settings)
        images = generate_images(self.evaluators.pipeline, requests, concepts, settings, self.evaluators.batch_size,
                                 variant.name)

        case_of_each = [case for case in cases for _ in range(self.plan.seeds)]
        records = []
        for request, case, measured in zip(requests, case_of_each,
                                           self.evaluators.measure(images, case_of_each, target), strict=True):
            records.append({"prompt": case.text, "template": case.template, "seed": request.seed, **measured})
        file = self.csv_file(variant, target)
        self._save_sheet(images, requests, file.with_suffix(".png"))
        write_csv(file, records, list(records[0]))

    def _folder(self, variant: Variant, target: EvalTarget) -> Path:
        return self.folder / "evaluated" / variant.method.key / target.name

    def _concept_files(self, variant: Variant, target: EvalTarget) -> list[Path]:
        if not variant.method.trained:
            return []
        return [self.training.concept_file(variant.method, concept) for concept in target.concepts]

    def _key(self, variant: Variant, target: EvalTarget) -> str:
        cases = [asdict(case) for case in build_prompt_cases(variant, target, self.plan)]
        files = [content_digest(path) for path in self._concept_files(variant, target)]
        photos = [content_digest(target.folder)] if isinstance(target, ExampleConcept) else []
        settings = asdict(variant.generation_settings(self.plan.settings))
        return short_key([self.evaluators.key, target.name, cases, self.plan.seeds, settings, files, photos])

    def _save_sheet(self, images: Sequence[Image.Image], requests: Sequence[GenerationRequest], path: Path) -> None:
        """Write a contact sheet with the first image of each prompt."""
        first = range(0, len(requests), self.plan.seeds)
        save_grid([images[index] for index in first], path, SHEET_COLUMNS, [requests[index].prompt for index in first])


def _file_stem(variant: Variant) -> str:
    return slug(variant.label) or "plain"


def _read_value(column: str, text: str) -> Any:
    if column in TEXT_COLUMNS:
        return text
    return float(text) if text else None
