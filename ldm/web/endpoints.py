"""What other programs may call, by `gradio_client` or HTTP. All other events belong to the page alone."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.common.errors import UserError
from ldm.web.concept_files import ConceptFiles
from ldm.web.generate_form import MIDDLE_BIAS, OWN_BIAS, OWN_SPACING, SET_BIAS, Values
from ldm.web.generate_tab import MOST_AT_ONCE, PIPELINE, GenerateTab
from ldm.web.messages import user_errors
from ldm.web.numbers import number_in
from ldm.web.run_progress import read_progress
from ldm.web.run_view import title_of
from ldm.web.teach_form import TeachValues
from ldm.web.teach_tab import TeachTab
from ldm.web.uploads import add_photos

UPLOADS = "GRADIO_TEMP_DIR"


class Endpoints:
    """The functions behind the API. Files are given as uploads, and returned as addresses.

    Args:
        teach, generate: the tabs that they share their code with.
        concepts: the concept files to choose from.
    """

    def __init__(self, teach: TeachTab, generate: GenerateTab, concepts: ConceptFiles) -> None:
        self.teach_tab, self.generate_tab, self.concepts = teach, generate, concepts
        self.queue = teach.site.queue

    @user_errors
    def teach(self, photos: list[gr.FileData], kind: str, word: str = "", preset: str = "balanced", steps: int = 0,
              seed: int = 23, name: str = "") -> str:
        """Put a run into the queue.

        Args:
            photos: photos of one subject, 1 to 20.
            kind: what it is, in plain words.
            word: its word in prompts; "": one that follows from the kind.
            preset: "quick", "balanced" or "thorough"; for the bundled model also "seconds" and "closer".
            steps: training steps; 0: those of the preset.
            seed: the same seed learns the same concept.
            name: its name in the list.

        Returns:
            The id of the run.
        """
        files = [uploaded(photo) for photo in photos]
        run = self.queue.create()
        try:
            refused = add_photos(run, files)
            if refused or not files:
                raise UserError("; ".join(refused) or "no photos; give some")
            self.teach_tab.start(run, TeachValues(kind, word, preset, name, steps, seed))
        except Exception:
            self.queue.delete(run)
            raise
        return run.name

    @user_errors
    def runs(self) -> list[dict]:
        """Return all runs, newest first: id, name, state, step and steps."""
        found = []
        for run in self.queue.prepared_runs():
            progress = read_progress(run)
            found.append({"id": run.name, "name": title_of(run), "state": self.queue.state(run).value,
                          "step": progress.step, "steps": progress.steps})
        return found

    @user_errors
    def stop(self, run: str) -> str:
        """Stop a run, or take it from the queue; what it has learned is saved. Returns its state."""
        self.queue.stop(self.queue.run(run))
        return self.queue.state(self.queue.run(run)).value

    @user_errors
    def go_on(self, run: str) -> str:
        """Put a stopped run into the queue again. Returns its state."""
        self.queue.enqueue(self.queue.run(run))
        return self.queue.state(self.queue.run(run)).value

    @user_errors
    def list_concepts(self) -> list[str]:
        """Return the titles of the concepts; `generate` and `merge` take them."""
        return [concept.title for concept in self.concepts.listed()]

    @user_errors
    def generate(self, prompt: str, concepts: list[str] = [], bias: float = -1, seed: int = -1,  # noqa: B006
                 images: int = 1, steps: int = 0, guidance: float = -1, negative_prompt: str = "") -> list[dict]:
        """Generate images.

        Args:
            prompt: with the words of the concepts.
            concepts: titles of concepts.
            bias: for all of them; -1: as trained.
            seed: of the first image; -1: a random one.
            images: how many.
            steps: sampling steps; 0: the model's.
            guidance: -1: the model's.
            negative_prompt: what to lead away from.

        Returns:
            The files of the images.
        """
        defaults = self.generate_tab.defaults
        own = number_in("bias", bias, -1, 10) < 0
        values = Values(
            prompt, negative_prompt, self.concepts.named(concepts), OWN_BIAS if own else SET_BIAS,
            MIDDLE_BIAS if own else bias, 0, False, defaults.sampler, OWN_SPACING,
            steps or defaults.num_inference_steps,
            defaults.guidance_scale if number_in("guidance", guidance, -1, 100) < 0 else guidance, 0, 0, seed,
            number_in("images", images, 1, MOST_AT_ONCE), 1)
        generation = self.generate_tab.generation
        made = list(generation.generate(generation.with_seed(self.generate_tab.request(values, None))))
        return [as_file(image.path) for image in made]

    @user_errors
    def merge(self, concepts: list[str], words: list[str], name: str = "merged") -> dict:
        """Write several concepts to one file, each with a new word. Returns the file."""
        return as_file(self.concepts.merge(self.concepts.named(concepts), words, name))

    @user_errors
    def download(self, concept: str) -> dict:
        """Return the file of a concept."""
        return as_file(Path(self.concepts.named([concept])[0]))


def add_endpoints(teach: TeachTab, generate: GenerateTab, concepts: ConceptFiles) -> None:
    """Add the endpoints to the open `gr.Blocks`."""
    endpoints = Endpoints(teach, generate, concepts)
    for function in (endpoints.teach, endpoints.runs, endpoints.stop, endpoints.go_on, endpoints.list_concepts,
                     endpoints.merge, endpoints.download):
        gr.api(function, api_name=function.__name__)
    gr.api(endpoints.generate, api_name="generate", concurrency_id=PIPELINE, concurrency_limit=1)


def uploaded(file: Any) -> Path:
    """Return the path of an uploaded file.

    Raises:
        UserError: it names anything else, such as another file of this machine.
    """
    path = Path(str(file.get("path") if isinstance(file, dict) else file)).resolve()
    if not path.is_relative_to(Path(os.environ[UPLOADS]).resolve()) or not path.is_file():
        raise UserError("this is no uploaded file; upload the photo")
    return path


def as_file(path: Path) -> dict[str, Any]:
    """Return a file as `gradio_client` downloads it."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": path.name}
