"""Digests of code, so that results are regenerated after a change of the code that produced them.

A digest covers the import closure of some entry points: their own modules and every module of the project that these
import, directly or not. Docstrings, comments and layout do not count, nor do installed libraries.

Imports are found without running anything. Import statements count wherever they are, also inside of functions. A text
that is the dotted name of a module, or of something in a module, counts as well, whether it starts at the top or at the
package of the file: registries such as `SAMPLERS` and the facades of `forward_names` name their modules like this.
"""
from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.common.paths import PROJECT_ROOT

# Code that every training runs, whatever its config names.
TRAINING_ENTRIES = ("main", "ldm.training.run")
# Code that generates the images of an evaluation and measures them.
EVALUATION_ENTRIES = ("evaluation.paper.evaluators", "evaluation.paper.prompt_cases", "evaluation.sweeps.samples")
# Code that generates images for prior preservation, which several methods share.
PRIOR_ENTRIES = ("ldm.personalization.prior_preservation",)
# Targets that configs of earlier versions name. The targets of the config in use are entry points of their own.
IGNORED_MAPPINGS = ("MOVED_TARGETS",)
LIBRARY_FOLDERS = ("site-packages", "dist-packages")
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()


def code_digest(entries: Iterable[str]) -> str:
    """Return a digest of the code of entry points and of all modules that they import.

    Args:
        entries: dotted names of modules, or of classes and functions in modules, such as a config's `target`.
    """
    return _digest_closure(frozenset(entries))


def config_targets(config: Any) -> Iterator[str]:
    """Yield every `target` in a config, given as plain data."""
    if isinstance(config, Mapping):
        if isinstance(config.get("target"), str):
            yield config["target"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from config_targets(value)


def import_closure(entries: Iterable[str]) -> dict[str, Path]:
    """Return the modules of entry points and those that they import, directly or not, as name -> file."""
    closure: dict[str, Path] = {}
    waiting = list(entries)
    while waiting:
        for module, file in _resolve(waiting.pop()):
            if module not in closure:
                closure[module] = file
                waiting += imported_names(file, module)
    return closure


@functools.cache
def imported_names(file: Path, module: str) -> frozenset[str]:
    """Return the dotted names that a module may import, of modules and of objects in them.

    Args:
        file: the module's source.
        module: its dotted name, which relative imports start from.
    """
    collector = _ImportCollector(package=module if file.name == "__init__.py" else module.rpartition(".")[0])
    collector.visit(_parse(file))
    return frozenset(collector.names)


def normalized_source(source: str) -> str:
    """Return Python code as its syntax tree without docstrings."""
    return ast.dump(_without_docstrings(ast.parse(source)))


def clear_caches() -> None:
    """Forget everything that was read, for files that have changed since."""
    for cached in (_digest_closure, imported_names, _parse, _digest_file, _resolve, _find_top_level):
        cached.cache_clear()


class _ImportCollector(ast.NodeVisitor):
    """Collects in `names` what a syntax tree may import when it runs.

    Args:
        package: the package that relative imports start from.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.names: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[:len(parents) - node.level + 1], *([base] if base else [])])
        # An imported name may be a module or an object of the module `base`.
        self.names |= {f"{base}.{alias.name}" for alias in node.names}

    def visit_If(self, node: ast.If) -> None:
        # Imports for annotations alone do not run.
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in (node.orelse if is_typing else [node.test, *node.body, *node.orelse]):
            self.visit(child)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit_assignment(node, node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._visit_assignment(node, [node.target])

    def _visit_assignment(self, node: ast.Assign | ast.AnnAssign, targets: Sequence[ast.expr]) -> None:
        if not any(isinstance(target, ast.Name) and target.id in IGNORED_MAPPINGS for target in targets):
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        # A text without a dot may be any word, so only dotted names count.
        text = node.value
        if isinstance(text, str) and "." in text and all(part.isidentifier() for part in text.split(".")):
            self.names |= {text, f"{self.package}.{text}"}


@functools.cache
def _digest_closure(entries: frozenset[str]) -> str:
    state = hashlib.blake2b()
    for module, file in sorted(import_closure(entries).items()):
        state.update(f"{module} {_digest_file(file)}\n".encode())
    return state.hexdigest()[:16]


@functools.cache
def _digest_file(file: Path) -> str:
    return hashlib.blake2b(ast.dump(_parse(file)).encode()).hexdigest()


@functools.cache
def _parse(file: Path) -> ast.Module:
    return _without_docstrings(ast.parse(file.read_bytes()))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_body and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return tree


@functools.cache
def _resolve(name: str) -> tuple[tuple[str, Path], ...]:
    """Return the modules that importing a dotted name runs, as (name, file): packages on the way, and its own module.

    The rest of the name may be an object in the last of them. Nothing is returned for installed libraries.
    """
    top, *parts = name.split(".")
    location = _find_top_level(top)
    modules = []
    module = top
    while location is not None:
        file = location / "__init__.py" if location.is_dir() else location
        if file.is_file():  # a folder without this file is a namespace package
            modules.append((module, file))
        if not parts or not location.is_dir():
            break
        part = parts.pop(0)
        module, location = f"{module}.{part}", _find_in(location, part)
    return tuple(modules)


@functools.cache
def _find_top_level(name: str) -> Path | None:
    """Return the file or folder of a top-level module of the project or of the user; None if it is installed."""
    location = _find_in(PROJECT_ROOT, name)
    if location is None:
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):
            spec = None
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        if folders:
            location = Path(folders[0])
        elif spec is not None and str(spec.origin).endswith(".py"):
            location = Path(spec.origin)
    return None if location is None or _is_installed(location) else location


def _find_in(folder: Path, name: str) -> Path | None:
    """Return the module or package called `name` in a folder."""
    file = folder / f"{name}.py"
    if (folder / name / "__init__.py").is_file():
        return folder / name
    if file.is_file():
        return file
    # A folder without __init__.py is a namespace package if it holds any code.
    return folder / name if any((folder / name).glob("*.py")) else None


def _is_installed(location: Path) -> bool:
    resolved = location.resolve()
    return resolved.is_relative_to(STANDARD_LIBRARY) or any(name in resolved.parts for name in LIBRARY_FOLDERS)
