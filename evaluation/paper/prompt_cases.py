"""The prompts and seeds of an evaluation, for single concepts and for pairs."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.paper.design import Variant
from evaluation.paper.examples import ConceptPair, EvalTarget
from evaluation.paper.file_keys import short_key
from evaluation.prompts.prompt_sets import EvaluationPrompt
from ldm.data.mini.backgrounds import BACKGROUNDS
from ldm.data.mini.scenes import with_article
from ldm.inference.requests import GenerationRequest
from ldm.inference.settings import GenerationSettings


@dataclass(frozen=True)
class PromptCase:
    """A prompt to generate images from.

    Attributes:
        prompt: names concepts by their placeholders.
        text: the same with super-categories instead.
        template: the same for all concepts; intervals resample it.
        background: the background of the mini world that the prompt asks for, if any.
    """

    prompt: str
    text: str
    template: str
    background: str | None


@dataclass(frozen=True)
class EvalPlan:
    """The prompts, seeds and settings for every concept and every pair.

    Attributes:
        prompts: for single concepts.
        backgrounds: for pairs; names in `ldm.data.mini.backgrounds`.
        seeds: number of images of each prompt.
        settings: how to generate; settings of a variant override them.
    """

    prompts: Sequence[EvaluationPrompt]
    backgrounds: Sequence[str]
    seeds: int
    settings: GenerationSettings

    def count_images(self, target: EvalTarget) -> int:
        """Return the number of images of one variant of a target."""
        return self.seeds * len(self.backgrounds if isinstance(target, ConceptPair) else self.prompts)


def build_prompt_cases(variant: Variant, target: EvalTarget, plan: EvalPlan) -> list[PromptCase]:
    """Return the prompts of a target. The base model gets super-categories instead of placeholders."""
    plain = [concept.super_category for concept in target.concepts]
    words = [concept.placeholder for concept in target.concepts] if variant.method.trained else plain
    if isinstance(target, ConceptPair):
        return [_pair_case(words, plain, background) for background in plan.backgrounds]
    cases = []
    for prompt in plan.prompts:
        text = prompt.fill(plain[0])
        cases.append(PromptCase(prompt.fill(words[0]), text, prompt.text, background_of(text)))
    return cases


def case_seeds(target: EvalTarget, case: PromptCase, count: int) -> list[int]:
    """Return the seeds of the images of a prompt.

    All variants share them, so that differences between variants are paired. Targets and templates have different ones:
    with common seeds, their images would share noise that no interval over concepts and prompts accounts for.
    """
    return [int(short_key([target.name, case.template, number])[:8], 16) for number in range(count)]


def requests_of(target: EvalTarget, cases: Sequence[PromptCase], count: int) -> list[GenerationRequest]:
    """Return `count` requests for each prompt, prompt by prompt."""
    return [GenerationRequest(case.prompt, seed) for case in cases for seed in case_seeds(target, case, count)]


def background_of(prompt: str) -> str | None:
    """Return the background of the mini world that a prompt ends with, by its name."""
    return next((name for name, (_, phrases) in BACKGROUNDS.items() if prompt.endswith(phrases)), None)


def _pair_case(words: Sequence[str], plain: Sequence[str], background: str) -> PromptCase:
    where = BACKGROUNDS[background][1][0]
    prompt, text = (f"a photo of {' next to '.join(map(with_article, each))} {where}" for each in (words, plain))
    return PromptCase(prompt, text, where, background)
