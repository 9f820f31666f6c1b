"""Recognize models that are distilled to a few steps by their names, and know how they are sampled. Imports no torch.

Their weights look like those of other models. The settings are those of their authors' model cards.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ldm.checkpoints.header import read_header
from ldm.common.errors import UserError

TITLES = ("modelspec.title", "ss_output_name")  # metadata


class FewStepKind(NamedTuple):
    """A way of distillation. The first that fits a name counts.

    Attributes:
        name: what its models are called.
        pattern: regular expression for names of their files, in lower case.
        sampler: the sampler that they need.
        spacing: the spacing of timesteps; None: the sampler's own.
        steps: usual number of steps, unless the name gives one.
        guidance: usual guidance scale; 1 is none.
        most_steps, most_guidance: more do harm.
    """

    name: str
    pattern: str
    sampler: str
    spacing: str | None
    steps: int
    guidance: float
    most_steps: int
    most_guidance: float


FEW_STEP_KINDS = (
    FewStepKind("Lightning", "lightning", "euler", "trailing", 4, 1, 8, 1),
    FewStepKind("Hyper-SD CFG", r"hyper[-_ ]?sd.*cfg", "ddim", "trailing", 8, 5, 12, 8),
    FewStepKind("one-step Hyper-SD", r"hyper[-_ ]?sd.*(?<!\d)1[-_ ]?step", "tcd", None, 1, 1, 8, 1),
    FewStepKind("Hyper-SD", r"hyper[-_ ]?sd", "ddim", "trailing", 8, 1, 12, 1),
    FewStepKind("TCD", r"(?<![a-z])tcd(?![a-z])", "tcd", None, 4, 1, 8, 1),
    FewStepKind("LCM", r"(?<![a-z])lcm(?![a-z])", "lcm", None, 4, 1, 8, 2),
    FewStepKind("Turbo", "turbo", "euler_a", None, 4, 1, 8, 2.5),
)
STEPS_IN_NAME = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")


class FewStepModel(NamedTuple):
    """A model or LoRA whose name says that it is distilled.

    Attributes:
        file: its path.
        kind: how it was distilled.
        steps: number of steps that it was distilled for, or the usual one.
    """

    file: str
    kind: FewStepKind
    steps: int


def few_step_model(files: Iterable[str | Path]) -> FewStepModel | None:
    """Return the first of some checkpoints, folders and LoRAs whose name or title says that it is distilled."""
    for file in files:
        path = Path(file)
        for name in (path.name, *_titles(path)):
            found = _kind_in(name.lower())
            if found is not None:
                return FewStepModel(str(file), *found)
    return None


def _kind_in(name: str) -> tuple[FewStepKind, int] | None:
    for kind in FEW_STEP_KINDS:
        if re.search(kind.pattern, name):
            stated = STEPS_IN_NAME.search(name)
            return kind, int(stated[1]) if stated else kind.steps
    return None


def _titles(path: Path) -> list[str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    try:
        header = read_header(path)
    except UserError:
        return []
    return [] if header is None else [header.metadata[key] for key in TITLES if key in header.metadata]
