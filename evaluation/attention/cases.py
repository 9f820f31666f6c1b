"""What `scripts/attention_maps.py` does: maps of one prompt under several concept files, measured and written."""
from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation.attention.figure import AttentionRow, attention_figure
from evaluation.attention.masked_attention import (
    COLUMNS,
    STEP_GROUPS,
    MaskedAttention,
    attention_records,
    estimate_attention,
    measure_attention,
)
from evaluation.output.table import write_csv
from ldm.common.errors import UserError
from ldm.common.files import write_atomically
from ldm.common.words import replace_words, split_at_placeholders
from ldm.concepts.finetuned_concept import AnyConcept, FinetunedConcept
from ldm.concepts.word_positions import word_positions
from ldm.data.images import read_mask
from ldm.data.masks import read_binary_mask
from ldm.inference import run as drawing
from ldm.inference import sampling as inference
from ldm.inference.output_folder import Album
from ldm.modules.attention_maps import record_attention
from ldm.modules.segmentation import ZeroShotSegmenter, threshold_mask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """One way of drawing the pictures.

    Attributes:
        label: what it is called, on a line or two.
        word: whose attention is looked at.
        thing: what the word names, in plain words.
    """

    label: str
    plan: drawing.Plan
    word: str
    thing: str

    @property
    def name(self) -> str:
        """The label on one line."""
        return " ".join(self.label.split())


def cases_of(options: argparse.Namespace) -> list[Case]:
    """One for each concept file and, as the flags ask for it, the base model before them.

    Raises:
        UserError: the flags do not fit the model's config or the concepts, or a prompt does not name its concept.
    """
    if not options.concept:
        return [Case("base model", _plan(options, [], options.prompt), options.word, options.word)]
    labels = options.labels or [None] * len(options.concept)
    cases = [_case(options, file, label) for file, label in zip(options.concept, labels, strict=True)]
    return [_reference(options, cases[0]), *cases] if options.reference else cases


def _plan(options: argparse.Namespace, files: Sequence[str], prompt: str) -> drawing.Plan:
    return drawing.plan(argparse.Namespace(**{**vars(options), "concept": files}), [prompt])


def _case(options: argparse.Namespace, file: str, label: str | None) -> Case:
    plan = _plan(options, [file], options.prompt)
    word = _concepts_word(options.prompt, file, plan.concepts) if options.word is None else options.word.strip()
    things = {concept.placeholder.lower(): concept.super_category for concept in plan.concepts}
    return Case(label or _method(plan.concepts[0]), plan, word, things.get(word.lower(), word))


def _concepts_word(prompt: str, file: str, concepts: Sequence[AnyConcept]) -> str:
    """The first placeholder of a file that the prompt names."""
    placeholders = [concept.placeholder for concept in concepts]
    parts = split_at_placeholders(prompt, placeholders)
    for number, placeholder in enumerate(placeholders):
        if number in parts:
            return placeholder
    raise UserError(f"the prompt {prompt!r} names no concept of {file}, which has {', '.join(placeholders)}; name one, "
                    "or choose a --word")


def _reference(options: argparse.Namespace, case: Case) -> Case:
    """The base model with super-categories in the concepts' stead."""
    prompt = replace_words({concept.placeholder: concept.super_category for concept in case.plan.concepts}, options.prompt)
    return Case(f"base model,\n“{case.thing}”", _plan(options, [], prompt), case.thing, case.thing)


def _method(concept: AnyConcept) -> str:
    if isinstance(concept, FinetunedConcept):
        return concept.method_label
    return "Perfusion,\n" + ("trained keys" if concept.target_outputs_k else "local lock")


class Masks:
    """Where the thing is: the same in all pictures by --mask, or in each of them as a segmenter finds it.

    Raises:
        UserError: the mask or the segmenter cannot be used.
    """

    def __init__(self, options: argparse.Namespace, plan: drawing.Plan) -> None:
        self.size, self.painted = plan.size[::-1], None
        if options.mask is not None:
            self.painted = read_binary_mask(options.mask, read_mask(options.mask).size, *plan.size)[0, 0]
            return
        name = options.segmenter or inference.segmenter_of(plan.config)
        self.segmenter = ZeroShotSegmenter.from_path(name, plan.device)

    def of(self, row: AttentionRow, case: Case, seed: int) -> Tensor | None:
        """(H, W) of ones and zeros; None, and a warning, where the thing is not found."""
        if self.painted is not None:
            return self.painted
        try:
            likely = self.segmenter.segment([row.image], case.thing, self.size)[0]
            return threshold_mask(likely, case.thing, f"{case.name}, seed {seed}")
        except UserError as error:
            log.warning("warning: %s; it does not count", str(error).partition(";")[0])
            return None


def look(case: Case, model: Any) -> list[AttentionRow]:
    """Draws the pictures of a case with what the layers attend to; masks and figures are still missing.

    Raises:
        UserError: a concept does not fit the model, or the word does not stand in the prompt.
    """
    plan, jobs = case.plan, case.plan.jobs
    encoder = inference.prompt_encoder(model, plan.concepts)
    words = word_positions(encoder, plan.prompts[0], case.word)
    encoded = inference.encode_once(encoder, plan.prompts)
    unet, size, rows = model.model.diffusion_model, plan.sampling.latent_size, []
    for first in range(0, len(jobs), plan.sampling.batch_size):
        batch = jobs[first:first + plan.sampling.batch_size]
        with record_attention(unet, words.expand(len(batch), -1), size) as maps:
            pictures = list(inference.draw_pictures(model, encoded, batch, plan.sampling))
        grouped = maps.grouped(len(STEP_GROUPS))
        rows += [AttentionRow(case.label, f"seed {job.seed}", picture, {name: groups[n] for name, groups in grouped.items()})
                 for n, (job, picture) in enumerate(zip(batch, pictures, strict=True))]
    return rows


def measured(case: Case, rows: Sequence[AttentionRow], masks: Masks) -> list[AttentionRow]:
    """The rows of a case with masks and figures, where the thing is found."""
    found = [masks.of(row, case, job.seed) for row, job in zip(rows, case.plan.jobs, strict=True)]
    return [row if mask is None else replace(row, mask=mask, measured=measure_attention(row.maps, mask))
            for row, mask in zip(rows, found, strict=True)]


def write(options: argparse.Namespace, cases: Sequence[Case], found: Sequence[Sequence[AttentionRow]]) -> list[Path]:
    """The picture of the first rows of each case, and the figures of all rows as CSV and JSON, numbered alike."""
    shown = [replace(row, notes=_notes(row, rows)) for rows in found for row in rows[:options.shown]]
    title = f"Attention to “{cases[-1].word}” in “{options.prompt}”"
    picture = Album(options.outdir, columns=1).add_beside("attention_maps", attention_figure(shown, title))
    pairs = list(zip(cases, found, strict=True))
    table = [record for case, rows in pairs for record in attention_records(case.name, insides(rows))]
    csv, summary = picture.with_suffix(".csv"), picture.with_suffix(".json")
    write_csv(csv, table, COLUMNS)
    noted = {"mask": options.mask, "cases": [_note_of(case, rows) for case, rows in pairs], "rows": table}
    text = json.dumps(noted, indent=1) + "\n"
    write_atomically(summary, lambda aside: aside.write_text(text, encoding="utf-8"))
    return [picture, csv, summary]


def insides(rows: Sequence[AttentionRow]) -> list[MaskedAttention]:
    """The figures of those pictures in which the thing was found."""
    return [row.measured for row in rows if row.measured is not None]


def _note_of(case: Case, rows: Sequence[AttentionRow]) -> dict[str, Any]:
    """How the pictures of a case were drawn, and what each of them shows over all layers and steps, in %."""
    pictures = []
    for job, inside in zip(case.plan.jobs, [row.measured for row in rows], strict=True):
        shown = {} if inside is None else {"area": inside.area, "attention": inside.attention(),
                                           "share": inside.share()}
        pictures.append({"seed": job.seed, **{name: 100 * value for name, value in shown.items()}})
    return {"label": case.name, "word": case.word, "thing": case.thing, "prompt": case.plan.prompts[0],
            **case.plan.note, "pictures": pictures}


def _notes(row: AttentionRow, rows: Sequence[AttentionRow]) -> str:
    """What stands beside a shown picture: the figures of all pictures of its case below its own note."""
    inside = insides(rows)
    if not inside:
        return row.notes
    _, attention, share, ratio = estimate_attention(inside)
    spread = f" ({share.low:.0f} to {share.high:.0f}), {len(inside)} seeds" if len(inside) > 1 else ""
    return (f"{row.notes}\n{attention.mean:.1f} % of all attention\n{share.mean:.0f} % inside{spread}\n"
            f"{ratio.mean:.1f} × an even spread")


def said(case: Case, rows: Sequence[AttentionRow]) -> str:
    """The figures of a case, for the end of a run."""
    inside = insides(rows)
    if not inside:
        return f"{case.name}: no {case.thing} was found in any picture, so nothing is measured"
    area, attention, share, ratio = estimate_attention(inside)
    return (f"{case.name}: {case.word} gets {attention.text('%')} of all attention, and of that {share.text('%')} lies "
            f"inside the mask, which is {area.mean:.1f} % of the picture: {ratio.mean:.2f} times an even spread; "
            f"{len(inside)} of {len(rows)} pictures")
