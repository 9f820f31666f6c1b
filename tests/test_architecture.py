"""The map of the code points to what is there, and the rooms import downwards only."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ANSWER = re.compile(r"`([\w/]+\.py):(\d+)` `(\w+)`")
ROOMS = (  # from top to bottom; a room imports only from those below it
    ("main", "merge_embeddings", "scripts"), ("evaluation",), ("ldm.web",), ("ldm.cli",), ("ldm.training",),
    ("ldm.inference", "ldm.integrations"),
    ("ldm.personalization",), ("ldm.models",), ("ldm.concepts",), ("ldm.sampling",), ("ldm.modules",),
    ("ldm.checkpoints",), ("ldm.data",), ("ldm.util", "ldm.lr_scheduler"), ("ldm.common",))


def modules() -> dict[str, Path]:
    """Return all modules of the project by their dotted names."""
    files = [ROOT / "main.py", ROOT / "merge_embeddings.py"]
    for folder in ("ldm", "evaluation", "scripts"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def room_of(module: str) -> tuple[int, str]:
    """Return the floor of a module's room, from 0 at the top, and the room's name."""
    for floor, rooms in enumerate(ROOMS):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return floor, room
    raise AssertionError(f"{module} is in no room")


def imports() -> list[tuple[str, str]]:
    """Return each import of one module of the project by another, wherever it stands."""
    known = modules()
    found = []
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else str(node.module) for name in names]
            else:
                continue
            found += [(module, name) for name in names if name in known and name != module]
    return found


def answers() -> list[tuple[str, int, str]]:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return [(path, int(line), name) for path, line, name in ANSWER.findall(text)]


@pytest.mark.parametrize(("path", "line", "name"), answers(), ids=[name for _, _, name in answers()])
def test_an_answer_points_to_its_definition(path: str, line: int, name: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8").splitlines()[line - 1]
    assert re.match(rf"\s*(def {name}\(|class {name}\b|{name}\b.* = )", text), text


def test_all_questions_are_answered() -> None:
    assert len(answers()) == 11  # the twelfth is the docstring of a module


@pytest.mark.slow
def test_no_room_imports_from_a_room_above() -> None:
    upward = [(module, imported) for module, imported in imports()
              if room_of(imported)[0] < room_of(module)[0]]
    assert upward == []


@pytest.mark.slow
def test_modules_do_not_import_each_other_in_circles() -> None:
    below: dict[str, set[str]] = {}
    for module, imported in imports():
        below.setdefault(module, set()).add(imported)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module):], module))}"
        if module not in finished:
            for imported in sorted(below.get(module, ())):
                visit(imported, (*path, module))
            finished.add(module)

    for module in sorted(below):
        visit(module, ())


def test_loose_modules_of_the_package_are_public() -> None:
    loose = {file.name for file in (ROOT / "ldm").glob("*.py")}
    assert loose == {"__init__.py", "lr_scheduler.py", "util.py"}
