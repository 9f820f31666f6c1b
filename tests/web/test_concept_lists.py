"""The dropdowns of concepts: new files appear, and a choice that the user makes meanwhile is not undone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs gradio")
pytestmark = pytest.mark.slow  # Gradio takes seconds to import

from ldm.web.concept_files import FOLDER, ConceptFiles  # noqa: E402
from ldm.web.run_queue import RunQueue  # noqa: E402


@pytest.fixture
def concepts(tmp_path: Path) -> ConceptFiles:
    for name in ("cat", "dog"):
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / f"{name}.safetensors").touch()
    return ConceptFiles(RunQueue(tmp_path))


def changes(dropdown: Any) -> dict[str, Any]:
    """Return what an update changes of a component."""
    return dict(dropdown.constructor_args)


@pytest.mark.parametrize("is_chosen", [False, True])
def test_an_update_leaves_a_valid_choice_alone(concepts: ConceptFiles, is_chosen: bool) -> None:
    paths = [str(concepts.folder / f"{name}.safetensors") for name in ("cat", "dog")]
    update = changes(concepts.dropdown(paths[:1] if is_chosen else None))
    assert [path for _, path in update["choices"]] == paths
    assert "value" not in update


def test_concepts_that_are_gone_are_not_chosen_any_more(concepts: ConceptFiles) -> None:
    cat, dog = (str(concepts.folder / f"{name}.safetensors") for name in ("cat", "dog"))
    Path(dog).unlink()
    assert changes(concepts.dropdown([cat, dog]))["value"] == [cat]


def test_a_new_file_is_chosen(concepts: ConceptFiles) -> None:
    dog = str(concepts.folder / "dog.safetensors")
    assert changes(concepts.dropdown([dog], select=True))["value"] == [dog]
