"""Generate one prompt with each of several concept files, and record what the layers attend to."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evaluation.attention.figure import AttentionRow
from evaluation.attention.masked_attention import STEP_GROUPS
from evaluation.attention.settings import MIN_STEPS, AttentionOptions
from ldm.common.errors import UserError
from ldm.common.words import fold_word, spell_out, split_at_placeholders
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_weights import parse_prompt
from ldm.concepts.word_positions import word_positions
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.run import PreparedRun, prepare_run
from ldm.modules.attention_maps import record_attention


@dataclass(frozen=True)
class AttentionCase:
    """One way to generate the images.

    Attributes:
        label: its name, on a line or two.
        run: a checked run of one prompt.
        word: the word to look at.
        subject: what the word names, in plain words.
    """

    label: str
    run: PreparedRun
    word: str
    subject: str

    @property
    def name(self) -> str:
        """The label on one line."""
        return " ".join(self.label.split())

    @property
    def prompt(self) -> str:
        """The prompt of all images."""
        return self.run.options.prompts[0]


def prepare_cases(options: AttentionOptions) -> list[AttentionCase]:
    """Return a case for each concept file and, if asked for, the base model before them.

    Raises:
        UserError: the options do not fit the model's config or the concepts, or the prompt names no concept of a file.
    """
    if not options.concepts:
        run = _prepare(options, [], options.prompt)
        return [AttentionCase("base model", run, options.word, options.word)]
    labels = options.labels or [None] * len(options.concepts)
    cases = [_concept_case(options, file, label) for file, label in zip(options.concepts, labels, strict=True)]
    return [_reference_case(options, cases[0]), *cases] if options.reference else cases


def load_pipeline(case: AttentionCase) -> PerfusionPipeline:
    """Load the base model of all cases.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    pipeline = case.run.load_pipeline()
    pipeline.accelerate = False  # the accelerated U-Net has no layers that could be recorded
    return pipeline


def record_case(case: AttentionCase, pipeline: PerfusionPipeline) -> list[AttentionRow]:
    """Generate the images of a case and record the attention to its word; rows have no masks yet.

    Raises:
        UserError: a concept does not fit the model, or the word does not occur in the prompt.
    """
    run, requests = case.run, case.run.requests
    encoder = pipeline.prompt_encoder(run.concepts)
    prompt = parse_prompt(case.prompt, encoder.placeholders) if run.settings.prompt_weights else case.prompt
    words = word_positions(encoder, prompt, case.word)
    unet, size = pipeline.model.model.diffusion_model, pipeline.latent_size(run.settings)
    rows, batch_size = [], pipeline.batch_size
    for start in range(0, len(requests), batch_size):
        batch = requests[start:start + batch_size]
        with record_attention(unet, words.expand(len(batch), -1), size) as maps:
            images = list(pipeline.generate(batch, run.settings, run.concepts, batch_size=batch_size))
        grouped = maps.grouped(len(STEP_GROUPS))
        for index, (request, image) in enumerate(zip(batch, images, strict=True)):
            image_maps = {layer: values[index] for layer, values in grouped.items()}
            rows.append(AttentionRow(case.label, f"seed {request.seed}", image, image_maps))
    return rows


def _prepare(options: AttentionOptions, files: Sequence[str], prompt: str) -> PreparedRun:
    run = prepare_run(replace(options.generation, prompts=(prompt,), concepts=tuple(files)))
    steps = run.settings.num_inference_steps
    if steps < MIN_STEPS:
        raise UserError(f"--steps {steps}: maps are grouped by early, middle and late steps; give {MIN_STEPS} or more")
    return run


def first_placeholder(prompt: str, file: str, concepts: Sequence[AnyConcept]) -> str:
    """Return the first placeholder of a file that the prompt names.

    Raises:
        UserError: the prompt names none of them.
    """
    placeholders = [concept.placeholder for concept in concepts]
    parts = split_at_placeholders(prompt, placeholders)
    for index, placeholder in enumerate(placeholders):
        if index in parts:
            return placeholder
    raise UserError(f"the prompt {prompt!r} names no concept of {file}, which has {', '.join(placeholders)}; name one, "
                    "or choose a --word")


def reference_prompt(prompt: str, concepts: Sequence[AnyConcept]) -> str:
    """Return the prompt with super-categories in place of concepts."""
    return spell_out({concept.placeholder: concept.super_category for concept in concepts}, prompt)


def _concept_case(options: AttentionOptions, file: str, label: str | None) -> AttentionCase:
    run = _prepare(options, [file], options.prompt)
    word = first_placeholder(options.prompt, file, run.concepts) if options.word is None else options.word.strip()
    super_categories = {fold_word(concept.placeholder): concept.super_category for concept in run.concepts}
    subject = super_categories.get(fold_word(word), word)
    return AttentionCase(label or _method_label(run.concepts[0]), run, word, subject)


def _reference_case(options: AttentionOptions, case: AttentionCase) -> AttentionCase:
    """Return the case of the base model, with super-categories in place of the concepts of another case."""
    run = _prepare(options, [], reference_prompt(options.prompt, case.run.concepts))
    return AttentionCase(f"base model,\n“{case.subject}”", run, case.subject, case.subject)


def _method_label(concept: AnyConcept) -> str:
    if isinstance(concept, Concept):
        return "Perfusion,\n" + ("trained keys" if concept.target_outputs_k else "local lock")
    return concept.method_label
