"""Weights of words in prompts, "(word:1.3)", with the meaning of AUTOMATIC1111's web UI. Imports no torch at start-up.

    (word)          counts 1.1 times, ((word)) 1.1 * 1.1 times
    [word]          counts 1 / 1.1 times
    (word:1.3)      counts 1.3 times
    \\( \\) \\[ \\]     are brackets that belong to the text
    (<my-teddy>:1.3)  works on placeholders as well

A token's encoding is multiplied by its weight, and then all tokens of the prompt by one number that restores the mean
of the encoding (`modules/prompt_parser.py` and `modules/sd_emphasis.py`, class `EmphasisOriginal`, of
github.com/AUTOMATIC1111/stable-diffusion-webui). A layer's keys and values are linear in the encoding, so the weight
multiplies these. For a token under the edit of a concept, it multiplies the edited keys and values; its gate is that of
the token without a weight. ComfyUI has the same notation with another meaning: it interpolates between the encodings of
the prompt and of the empty one.

What changes a prompt during sampling or loads files is not supported, and refused by name: prompt editing
("[a:b:0.5]"), alternation ("[a|b]"), BREAK, AND, and tags such as "<lora:name:0.8>".
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ldm.common.errors import UserError
from ldm.common.words import compose, find_words

if TYPE_CHECKING:
    from torch import Tensor

STEP = 1.1  # what a pair of round brackets multiplies by, and a pair of square ones divides by
SYNTAX = re.compile(r"[()\[\]\\]|\bBREAK\b|\bAND\b|<[^\s<>:]+:[^<>]*>|\{[^{}]+\||\bembedding:\w|\w(\+\+|--)(?!\S)")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
TOKEN = re.compile(rf"""
    \\(?P<escaped>[()\[\]\\])   # a bracket that belongs to the text
  | (?P<lone>\\)                # dropped
  | :\s*(?P<weight>{NUMBER})\s*\)
  | (?P<bracket>[()\[\]])
  | (?P<text>[^()\[\]\\:]+|:)
""", re.VERBOSE)
LITERALLY = " (--no_prompt_weights reads prompts literally)"
MAX_LISTED = 12  # weighted words in a line of the log
BRACKETS = "write brackets that belong to the text as \\( \\), or read all literally (--no_prompt_weights)"
UNSUPPORTED = (  # pattern, what it is, what to do
    (re.compile(r"<(?:lora|lyco|locon)\s*:[^<>]*>", re.IGNORECASE),
     "a tag of other tools that loads a LoRA", "leave it out; --lora FILE:SCALE loads one"),
    (re.compile(r"<(?:hypernet|ti|embedding|wildcard)\s*:[^<>]*>", re.IGNORECASE),
     "a tag of other tools that loads a file (a hypernetwork, an embedding)", "leave it out; --concept loads concepts"),
    (re.compile(r"(?<!\w)embedding:\s*[\w.\\/<-]+", re.IGNORECASE),
     "ComfyUI's name of an embedding", "load it with --concept and write its placeholder"),
    (re.compile(r"(?<!\\)\[(?:[^\[\]|]|\\.)*\|(?:[^\[\]]|\\.)*(?<!\\)\]"),
     "alternation of prompts", "give each as a prompt of its own"),
    (re.compile(rf"(?<!\\)\[[^\[\]]*?:\s*{NUMBER}\s*%?(?:\s*steps?)?\s*(?<!\\)\]"),
     "prompt editing during sampling", "give one prompt for all steps"),
    (re.compile(rf":\s*{NUMBER}\s*(?<!\\)\]"),
     "prompt editing during sampling", "give one prompt for all steps"),
    (re.compile(r":\s*[+-]?\d+,\d+\s*(?<!\\)\)"), "a weight with a comma", "write it with a point, as in (word:1.3)"),
    (re.compile(r"\{[^{}]*\|[^{}]*\}"), "a random choice (dynamic prompts)", "give each as a prompt of its own"),
    (re.compile(r"(?<!\\)\)(?:\s*(?:\+\+?|--?)|\d+(?:\.\d+)?)(?=$|[\s,.;)])|(?<=\w)(?:\+\+|--)(?=$|[\s,.;)])"),
     "a weight in the notation of Compel", "write (word:1.3)"),
)
KEYWORDS = (("BREAK", "the start of another chunk of tokens", "leave it out"),
            ("AND", "a composition of prompts", "write \"and\", or generate each prompt on its own"))


class WeightedText(NamedTuple):
    """A part of a prompt whose tokens have one weight."""

    text: str
    weight: float = 1.0


Prompt = str | Sequence[WeightedText]  # plain, or in parts


def has_syntax(prompt: str) -> bool:
    """Return whether the prompt may hold anything but plain text; if not, it is encoded as it is."""
    return SYNTAX.search(prompt) is not None


def check_syntax(prompt: str, placeholders: Sequence[str] = (), hint: str = "") -> None:
    """Raise UserError if a prompt has syntax of other tools that is not supported, outside of placeholders.

    Args:
        prompt: any prompt.
        placeholders: those of the loaded concepts.
        hint: end of the message, such as `LITERALLY`.
    """
    if not has_syntax(prompt) and ":" not in prompt and "{" not in prompt:
        return
    plain = _without(prompt, placeholders)
    for pattern, meaning, remedy in UNSUPPORTED:
        found = pattern.search(plain)
        if found:
            _refuse(prompt, f"{found[0].strip()}, {meaning}", remedy + hint)
    if plain == plain.upper():  # in a prompt of capitals, these are words
        return
    for word, meaning, remedy in KEYWORDS:
        if re.search(rf"\b{word}\b", plain):
            _refuse(prompt, f"{word}, in other tools {meaning}", remedy + hint)


def _refuse(prompt: str, problem: str, remedy: str) -> NoReturn:
    raise UserError(f"the prompt {prompt!r} has {problem}, which is not supported; {remedy}")


def parse_weights(prompt: str, placeholders: Sequence[str] = ()) -> list[WeightedText]:
    """Return the parts of a prompt with their weights; neighbors differ in weight.

    Brackets without a partner are as in AUTOMATIC1111's web UI: one that opens acts up to the end, one that closes is
    text.

    Args:
        prompt: any prompt.
        placeholders: words whose own brackets, as in "[V]", are text.
    """
    if not has_syntax(prompt):
        return [WeightedText(prompt)]
    parts: list[list[Any]] = []  # [text, weight], which brackets that close later may still change
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the part at which each open bracket starts

    def scale_from(start: int, factor: float) -> None:
        for part in parts[start:]:
            part[1] *= factor

    for kind, text in _tokens(prompt, placeholders):
        if kind == "bracket" and text in opened:
            opened[text].append(len(parts))
        elif kind == "weight" and opened["("]:
            scale_from(opened["("].pop(), float(text.strip(": \t\n)")))
        elif kind == "bracket" and text == ")" and opened["("]:
            scale_from(opened["("].pop(), STEP)
        elif kind == "bracket" and text == "]" and opened["["]:
            scale_from(opened["["].pop(), 1 / STEP)
        else:
            parts.append([text, 1.0])
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        for start in opened[bracket]:
            scale_from(start, factor)
    return _joined(parts)


def plain_text(prompt: str, placeholders: Sequence[str] = ()) -> str:
    """Return the prompt without weights and their brackets, as another model should read it.

    Raises:
        UserError: the prompt has syntax that is not supported.
    """
    check_syntax(prompt, placeholders)
    return "".join(part.text for part in parse_weights(prompt, placeholders))


def parse_prompt(prompt: str, placeholders: Sequence[str] = ()) -> Prompt:
    """Return the prompt as an encoder takes it: its parts if some have a weight, otherwise its plain text."""
    parts = parse_weights(prompt, placeholders)
    return parts if any(part.weight != 1 for part in parts) else parts[0].text


def describe_weights(prompts: Sequence[str], placeholders: Sequence[str] = ()) -> str | None:
    """Return a sentence about what brackets in the prompts do; None if there are none."""
    weights, is_escaped = {}, False
    for prompt in filter(has_syntax, prompts):
        is_escaped |= re.search(r"\\[()\[\]]", prompt) is not None
        for part in parse_weights(prompt, placeholders):
            if part.weight != 1 and part.text.strip(" ,."):
                weights.setdefault(part.text.strip(" ,."), part.weight)
    if weights:
        listed = ", ".join(f"{text} {weight:.3g}" for text, weight in list(weights.items())[:MAX_LISTED])
        listed += ", ..." if len(weights) > MAX_LISTED else ""
        return f"weights of words in the prompts: {listed}; {BRACKETS}"
    return "brackets after a backslash belong to the text, literally" if is_escaped else None


def texts_of(prompts: Sequence[Prompt]) -> list[str | list[str]]:
    """Return the prompts without weights: texts, and the texts of the parts of weighted prompts."""
    return [prompt if isinstance(prompt, str) else [part.text for part in prompt] for prompt in prompts]


def token_weights(encoder: Any, prompts: Sequence[Prompt], placeholders: Sequence[str],
                  counts: Sequence[int] | None = None) -> Tensor | None:
    """Return the weight of each token, (B, N), or None if all are 1. Start, end and padding have 1.

    Args:
        encoder: the text encoder, an `ldm.modules.encoders.prompts.PromptEncoder`.
        prompts: B prompts that fit.
        placeholders, counts: as for its `tokenize`.
    """
    import torch

    if all(isinstance(prompt, str) for prompt in prompts):
        return None
    weights = torch.ones(len(prompts), encoder.max_length)
    for row, prompt in zip(weights, prompts, strict=True):
        if isinstance(prompt, str):
            continue
        pieces = encoder.word_pieces_with([part.text for part in prompt], placeholders, counts)
        each = [part.weight for part, own in zip(prompt, pieces, strict=True) for _ in own]
        row[1:1 + len(each)] = torch.tensor(each)
    return weights


def restore_mean(encoding: Tensor, weights: Tensor) -> Tensor:
    """Return weights (B, N) times the number that gives each prompt's weighted encoding (N, d) its former mean.

    Where the weighted mean is zero or has the other sign, no number restores it sensibly, and the weights stay.
    """
    before = encoding.float().mean((1, 2))
    after = (encoding.float() * weights[..., None]).mean((1, 2))
    factor = before / after
    return weights * factor.where(factor.isfinite() & (factor > 0), 1)[:, None]


def _tokens(prompt: str, placeholders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pieces of a prompt with their kind: escaped, weight, bracket or text; placeholders are text."""
    prompt, end = compose(prompt), 0
    for word in find_words(prompt, placeholders):
        yield from _tokens_between(prompt[end:word.start])
        yield "text", prompt[word.start:word.end]
        end = word.end
    yield from _tokens_between(prompt[end:])


def _tokens_between(text: str) -> Iterator[tuple[str, str]]:
    for match in TOKEN.finditer(text):
        if match.lastgroup == "weight":
            yield "weight", match[0]
        elif match.lastgroup != "lone":
            yield match.lastgroup, match[match.lastgroup]


def _joined(parts: Sequence[Sequence[Any]]) -> list[WeightedText]:
    """Return the parts with neighbors of the same weight joined; at least one."""
    joined: list[WeightedText] = []
    for text, weight in parts:
        if joined and joined[-1].weight == weight:
            joined[-1] = WeightedText(joined[-1].text + text, weight)
        else:
            joined.append(WeightedText(text, weight))
    return joined or [WeightedText("")]


def _without(prompt: str, placeholders: Sequence[str]) -> str:
    """Return the prompt with a capital letter in place of each placeholder."""
    prompt, result, end = compose(prompt), "", 0
    for word in find_words(prompt, placeholders):
        result, end = f"{result}{prompt[end:word.start]}X", word.end
    return result + prompt[end:]
