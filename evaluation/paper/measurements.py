"""Pictures drawn of taught concepts, and what is recognised in them: set by set, as CSV files, made when missing.

A set is what one setting draws of one concept, or of a pair of them, for all prompts and seeds. Its file is named after
everything that it depends on, as concept files are (see `evaluation.paper.training_runs`).
"""
from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from evaluation.metrics.similarity import SimilarityMeter
from evaluation.mini.fidelity import Identity, Marks, leaves_marks, spot_of
from evaluation.mini.world_prompts import WorldRecogniser
from evaluation.output.table import slug, write_csv
from evaluation.paper.source_digest import GRADING, TEACHING, code_of
from evaluation.paper.studies import Setting
from evaluation.paper.training_runs import Example, School, contents, digest, key_of
from evaluation.prompts.prompt_sets import EvaluationPrompt
from evaluation.sweeps.samples import Manner, Painter, as_batch, jobs_of
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.data.images import crop_square, load_folder, save_grid
from ldm.data.mini.backgrounds import PLACES
from ldm.data.mini.scenes import with_article
from ldm.inference import sampling as inference
from ldm.inference.sampling import Job
from ldm.models.clip_encoder import ClipEncoder
from ldm.modules.segmentation import ZeroShotSegmenter

SHEET_COLUMNS = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two examples in one picture, the first named first."""

    first: Example
    second: Example

    @property
    def names(self) -> tuple[str, ...]:
        return self.first.name, self.second.name

    @property
    def name(self) -> str:
        return "+".join(self.names)


Subject = Example | Pair


@dataclass(frozen=True)
class Question:
    """A prompt to draw from.

    Attributes:
        text: the same with super-categories for concepts.
        template: what all subjects are asked alike.
        place: that the prompt names, if any.
    """

    prompt: str
    text: str
    template: str
    place: str | None


@dataclass(frozen=True)
class Wanted:
    """What is drawn: of single examples these prompts, of pairs these places, of both so many seeds."""

    prompts: Sequence[EvaluationPrompt]
    places: Sequence[str]
    seeds: int
    manner: Manner


def questions(setting: Setting, subject: Subject, wanted: Wanted) -> list[Question]:
    """What is asked of a subject, by its placeholders or, of the base model, by super-categories."""
    if isinstance(subject, Pair):
        words = [(one.placeholder if setting.method.taught else one.super_category, one.super_category)
                 for one in (subject.first, subject.second)]
        asked, plain = (" next to ".join(map(with_article, each)) for each in zip(*words, strict=True))
        return [Question(f"a photo of {asked} {where}", f"a photo of {plain} {where}", where, place)
                for place in wanted.places for where in PLACES[place][1][:1]]
    texts = [prompt.fill(subject.super_category) for prompt in wanted.prompts]
    asked = [prompt.fill(subject.placeholder) for prompt in wanted.prompts] if setting.method.taught else texts
    return [Question(prompt, text, given.text, place_of(text))
            for prompt, text, given in zip(asked, texts, wanted.prompts, strict=True)]


def seeds_of(subject: Subject, question: Question, count: int) -> list[int]:
    """Of the pictures of a question: the same for all settings, and others for each subject and template.

    If all had the same, they would share noise that no interval over concepts and prompts tells of.
    """
    return [int(key_of([subject.name, question.template, number])[:8], 16) for number in range(count)]


def place_of(prompt: str) -> str | None:
    """The place that a prompt ends with, by its name in `ldm.data.mini.backgrounds`."""
    return next((name for name, (_, wheres) in PLACES.items() if prompt.endswith(wheres)), None)


class Graders:
    """The models that draw and recognise, each loaded when it is first needed.

    Args:
        evaluation_clip: folder or name of the CLIP.
        checkpoint, device: as for `Painter.load`.
    """

    def __init__(self, config: str, evaluation_clip: str | Path, checkpoint: str | None = None,
                 device: str | None = None, batch_size: int = 32) -> None:
        self.config, self.checkpoint, self.device = config, checkpoint, device
        self.evaluation_clip, self.batch_size = evaluation_clip, batch_size

    @functools.cached_property
    def key(self) -> str:
        """Names the base model and all that recognises."""
        model = OmegaConf.to_container(inference.read_model_config(self.config).model, resolve=True)
        named = [None if one is None else str(one) for one in (self.evaluation_clip, self.checkpoint)]
        files = contents(model, *named, model["params"].get("ckpt_path"))
        return key_of([model, named, files, code_of(TEACHING + GRADING)])

    @functools.cached_property
    def painter(self) -> Painter:
        return Painter.load(self.config, self.checkpoint, self.device, self.batch_size)

    @functools.cached_property
    def recogniser(self) -> ClipEncoder:
        return ClipEncoder.from_path(self.evaluation_clip, self.painter.device)

    @functools.cached_property
    def world(self) -> WorldRecogniser:
        return WorldRecogniser(self.recogniser)

    @functools.cached_property
    def marks(self) -> Marks:
        return Marks(self.recogniser, self.painter.size[0])

    @functools.cached_property
    def segmenter(self) -> ZeroShotSegmenter:
        return ZeroShotSegmenter.from_path(inference.segmenter_of(self.painter.config), self.painter.device)

    @functools.cache  # noqa: B019 - there is one of these, for the whole run
    def meter(self, example: Example) -> SimilarityMeter:
        photos = [crop_square(photo, self.painter.size[0]) for _, photo in load_folder(example.folder)]
        return SimilarityMeter(self.recogniser, as_batch(photos), example.super_category, self.segmenter)


@dataclass(frozen=True)
class Grading:
    """Draws and grades sets of pictures.

    Attributes:
        folder: gets `graded/<method>/<subject>/<setting>-<key>.csv`, each with a `.png` that shows some pictures.
    """

    graders: Graders
    school: School
    wanted: Wanted
    folder: Path

    def file(self, setting: Setting, subject: Subject) -> Path:
        return self._folder(setting, subject) / f"{self._name(setting)}-{self._key(setting, subject)}.csv"

    def is_there(self, setting: Setting, subject: Subject) -> bool:
        return self._files_there(setting, subject) and self.file(setting, subject).is_file()

    def outdated(self, setting: Setting, subject: Subject) -> bool:
        """Whether there is only a set that was made in another way."""
        return not self.is_there(setting, subject) and any(
            self._folder(setting, subject).glob(f"{self._name(setting)}-{'?' * 10}.csv"))

    def count(self, subject: Subject) -> int:
        """How many pictures a set has."""
        return self.wanted.seeds * len(self.wanted.places if isinstance(subject, Pair) else self.wanted.prompts)

    def rows(self, setting: Setting, subject: Subject) -> list[Row]:
        """What was recognised in each picture of a set that is there; numbers are floats, None what was not asked."""
        with self.file(setting, subject).open(newline="", encoding="utf-8") as opened:
            return [{name: _read(name, text) for name, text in row.items()} for row in csv.DictReader(opened)]

    def grade(self, setting: Setting, subject: Subject) -> None:
        """Draws a set and writes what is recognised in it."""
        asked = questions(setting, subject, self.wanted)
        jobs = [job for question in asked
                for job in jobs_of([question.prompt], seeds_of(subject, question, self.wanted.seeds))]
        concepts = self._concepts(setting, subject)
        images = self.graders.painter.draw(jobs, concepts, setting.manner(self.wanted.manner), setting.name)
        repeated = [question for question in asked for _ in range(self.wanted.seeds)]
        recognised = self._pair_rows if isinstance(subject, Pair) else self._single_rows
        rows = [{"prompt": question.text, "template": question.template, "seed": job.seed, **row}
                for question, job, row in
                zip(repeated, jobs, recognised(as_batch(images), repeated, subject), strict=True)]
        file = self.file(setting, subject)
        self._show(images, jobs, file.with_suffix(".png"))
        write_csv(file, rows, list(rows[0]))

    def _folder(self, setting: Setting, subject: Subject) -> Path:
        return self.folder / "graded" / setting.method.slug / subject.name

    @staticmethod
    def _name(setting: Setting) -> str:
        return slug(setting.label) or "plain"

    def _concept_files(self, setting: Setting, subject: Subject) -> list[Path]:
        examples = [subject.first, subject.second] if isinstance(subject, Pair) else [subject]
        return [self.school.file(setting.method, one) for one in examples] if setting.method.taught else []

    def _files_there(self, setting: Setting, subject: Subject) -> bool:
        return all(path.is_file() for path in self._concept_files(setting, subject))

    def _key(self, setting: Setting, subject: Subject) -> str:
        asked = [asdict(question) for question in questions(setting, subject, self.wanted)]
        files = [digest(path) for path in self._concept_files(setting, subject)]
        photos = [] if isinstance(subject, Pair) else [digest(subject.folder)]
        manner = asdict(setting.manner(self.wanted.manner))
        return key_of([self.graders.key, subject.name, asked, self.wanted.seeds, manner, files, photos])

    def _concepts(self, setting: Setting, subject: Subject) -> list[AnyConcept]:
        return inference.ready_concepts(self._concept_files(setting, subject))

    def _single_rows(self, pictures: Tensor, asked: Sequence[Question], example: Example) -> list[Row]:
        found = self.graders.meter(example)(pictures, [question.text for question in asked])
        seen = self.graders.marks.nearest(pictures, [spot_of(question.text) for question in asked])
        places = self.graders.world.places_in(pictures)
        return [{**asdict(alike), **self._own(thing, example, leaves_marks(question.text)), "seen": thing.label,
                 "there": 100.0 * (place == question.place) if question.place else None, "place": place}
                for question, alike, thing, place in zip(asked, found, seen, places, strict=True)]

    @staticmethod
    def _own(seen: Identity, example: Example, asked: bool) -> Row:
        """Whether a picture bears a concept's marks, and whether it shows its very drawing; None where not asked."""
        own = seen.concept == example.name
        hits = {"own": 100.0 * own, "itself": 100.0 * (own and seen.held_out)}
        return hits if asked else dict.fromkeys(hits)

    def _pair_rows(self, pictures: Tensor, _: Sequence[Question], pair: Pair) -> list[Row]:
        both = [pair.first, pair.second]
        names, kinds = {one.name for one in both}, sorted(one.super_category for one in both)
        rows = []
        for things in self.graders.marks.both(pictures):
            bearers = {thing.concept for thing in things}
            rows.append({"kinds": 100.0 * (sorted(thing.kind for thing in things) == kinds),
                         "own": 100.0 * (bearers == names), "one": 100.0 * bool(bearers & names),
                         "left": things[0].label, "right": things[1].label})
        return rows

    def _show(self, images: Sequence[Image.Image], jobs: Sequence[Job], path: Path) -> None:
        """A sheet with the first seed of each prompt."""
        firsts = range(0, len(jobs), self.wanted.seeds)
        save_grid([images[n] for n in firsts], path, SHEET_COLUMNS, [jobs[n].prompt for n in firsts])


def _read(name: str, text: str) -> Any:
    if name in ("prompt", "template", "seen", "place", "left", "right"):
        return text
    return float(text) if text else None
