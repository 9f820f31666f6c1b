"""The concept files that the page can generate with: those of its runs, and those that users bring."""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ldm.common.errors import UserError
from ldm.web.model_imports import import_models
from ldm.web.run_folder import RunFolder
from ldm.web.run_queue import RunQueue
from ldm.web.uploads import free_path, safe_name

if TYPE_CHECKING:
    from ldm.concepts.finetuned_concept import AnyConcept

FOLDER = "concepts"
MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class ListedConcept:
    """A concept file in a list.

    Attributes:
        path: the file.
        title: for the list.
    """

    path: Path
    title: str


class ConceptFiles:
    """The concept files of a page.

    Args:
        queue: its runs.
    """

    def __init__(self, queue: RunQueue) -> None:
        self.queue = queue
        self.folder = queue.root / FOLDER

    def listed(self) -> list[ListedConcept]:
        """Return the concepts of runs, newest first, then files that users brought or merged."""
        found = []
        for run in self.queue.prepared_runs():
            if run.concept is not None:
                found.append(ListedConcept(run.concept, _label(run)))
        files = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        return found + [ListedConcept(path, path.name) for path in files]

    def dropdown(self, chosen: Sequence[str] | None, select: bool = False) -> Any:
        """Return an update for a dropdown: the concepts in the list, and those chosen ones that are still in it.

        If all of them are, the update leaves the choice alone: the user may have made another one since.

        Args:
            chosen: paths.
            select: choose them in any case.
        """
        choices, value = self.choices(chosen)
        if value == list(chosen or []) and not select:
            return gr.Dropdown(choices=choices)
        return gr.Dropdown(choices=choices, value=value)

    def choices(self, chosen: Sequence[str] | None) -> tuple[list[tuple[str, str]], list[str]]:
        """Return (title, path) of each file in the list, and those of the chosen paths that are still in it."""
        choices = [(concept.title, str(concept.path)) for concept in self.listed()]
        known = {path for _, path in choices}
        return choices, [path for path in chosen or [] if path in known]

    def named(self, titles: Sequence[str]) -> list[str]:
        """Return the paths of concepts by their titles; of equal titles, the newest counts.

        Raises:
            UserError: there is no such concept.
        """
        paths = {concept.title: str(concept.path) for concept in reversed(self.listed())}
        for title in titles:
            if title not in paths:
                raise UserError(f"{title}: no such concept; there are {', '.join(paths) or 'none'}")
        return [paths[title] for title in titles]

    def photos_of(self, paths: Sequence[str]) -> Path | None:
        """Return the folder of the photos that the first of these concepts was learned from, if the page has it."""
        for run in self.queue.runs():
            if paths and run.concept is not None and str(run.concept) == paths[0]:
                return run.photos
        return None

    def check(self, paths: Sequence[str]) -> list[Path]:
        """Return paths that are in the list.

        Raises:
            UserError: one is not.
        """
        known = {str(concept.path): concept.path for concept in self.listed()}
        for path in paths:
            if path not in known:
                raise UserError("this concept is gone; choose again")
        return [known[path] for path in paths]

    def read(self, paths: Sequence[str]) -> list[AnyConcept]:
        """Load concepts to use together; equal words are numbered.

        Raises:
            UserError: a file is gone or damaged, or the concepts do not fit together.
        """
        import_models()
        from ldm.concepts.storage import read_concepts

        return read_concepts(self.check(paths))

    def load(self, paths: Sequence[str]) -> list[AnyConcept]:
        """Load concepts as they are in their files, with their own words.

        Raises:
            UserError: a file is gone or damaged.
        """
        import_models()
        from ldm.concepts.storage import load_concepts

        return [concept for path in self.check(paths) for concept in load_concepts(path)]

    def add(self, file: str | Path) -> Path:
        """Copy an uploaded concept file.

        Raises:
            UserError: it is no concept file.
        """
        import_models()
        from ldm.concepts.storage import load_concepts

        file = Path(file)
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB is no concept file; choose another one")
        try:
            load_concepts(file)
        except UserError as error:
            raise UserError(str(error).replace(str(file), file.name)) from None
        self.folder.mkdir(exist_ok=True)
        return Path(shutil.copyfile(file, free_path(self.folder, safe_name(file.name))))

    def merge(self, paths: Sequence[str], words: Sequence[str], name: str) -> Path:
        """Write several concepts to one file.

        Args:
            paths: files in the list.
            words: a new word for each concept.
            name: of the new file.

        Raises:
            UserError: the concepts do not fit together, or a word cannot be used.
        """
        import_models()
        from ldm.concepts.merging import merge_concepts
        from ldm.concepts.storage import save_concepts

        concepts = self.load(paths)
        if len(words) != len(concepts):
            raise UserError(f"{len(words)} words for {len(concepts)} concepts; give one for each")
        merged = merge_concepts(concepts, words)
        self.folder.mkdir(exist_ok=True)
        stem = safe_name(name or "merged").removesuffix(".safetensors")
        return save_concepts(free_path(self.folder, f"{stem}.safetensors"), merged, None)


def _label(run: RunFolder) -> str:
    """Return the title of a run and its word, if that is another one."""
    try:
        settings = run.read_settings()
    except UserError:
        return run.name
    same = settings.title == settings.placeholder
    return settings.title if same else f"{settings.title} ({settings.placeholder})"
