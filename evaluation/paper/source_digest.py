"""Names for what code does, so that results are made again when the code that made them has changed.

Docstrings and comments do not count, nor does how code is laid out.
"""
from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a concept depends on: what learns, the edit, the data, and what draws the pictures for prior preservation.
TEACHING = (
    "ldm/data/masks.py", "ldm/data/personalized.py", "ldm/data/templates.py",
    *(f"ldm/models/diffusion/{name}.py" for name in (
        "concept_learner", "custom_diffusion", "ddim", "dreambooth", "grids", "objectives",
        "perfusion", "prior_preservation", "sampling", "textual_inversion", "tuning")),
    *(f"ldm/modules/{name}.py" for name in (
        "context", "learned_concept", "learned_word", "rank_one", "segmentation")))
# What is drawn of it and recognised in that depends on these, too.
GRADING = (
    *(f"evaluation/{name}.py" for name in ("grading", "marks", "similarity", "world_prompts")),
    "ldm/data/mini/example_concepts.py", "ldm/data/mini/scenes.py", "ldm/models/clip_encoder.py", "ldm/concepts/concept.py",
    *(f"ldm/models/diffusion/{name}.py" for name in (
        "dpm_solver", "euler", "heun", "plms", "prompts", "tuned_prompts")))


@functools.cache
def code_of(files: Iterable[str]) -> str:
    """A digest of what Python files of this project do.

    Args:
        files: a tuple of paths inside the project.
    """
    state = hashlib.blake2b()
    for file in sorted(files):
        state.update(f"{file}\n{meaning((ROOT / file).read_text(encoding='utf-8'))}\n".encode())
    return state.hexdigest()[:16]


def meaning(source: str) -> str:
    """The syntax tree of Python code without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_body and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)
