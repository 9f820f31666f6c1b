"""The tab "Generate": prompts, concepts, settings, images to start from, and the gallery."""
from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from ldm.common.errors import UserError
from ldm.inference.model_config import complete_settings, inference_defaults
from ldm.inference.settings import GenerationSettings
from ldm.web.command_box import command_box
from ldm.web.commands import generation_commands
from ldm.web.concept_files import ConceptFiles
from ldm.web.events import OWN, QUIET
from ldm.web.generate_form import LEAST_STRENGTH, SET_BIAS, GenerateForm, Values, random_seed
from ldm.web.image_request import Cancelled, FinishedImage, ImageRequest
from ldm.web.messages import as_html, as_message, user_errors
from ldm.web.model_imports import import_models
from ldm.web.numbers import number_in, whole_number_in
from ldm.web.recalled_settings import recall, stored_settings, stored_sources
from ldm.web.site import Site

if TYPE_CHECKING:
    from ldm.web.generation import ImageGeneration

STRIP = (0.3, 0.45, 0.6, 0.75, 0.9)
MOST_AT_ONCE = 64
PIPELINE = "pipeline"  # events that use it take turns


class GenerateTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.
        concepts: the concept files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts

    @cached_property
    def generation(self) -> ImageGeneration:
        """What generates; made at the first use, since torch takes seconds to load."""
        import_models()
        from ldm.web.generation import ImageGeneration

        return ImageGeneration(self.site, self.concepts)

    @property
    def chosen(self) -> gr.Dropdown:
        """The dropdown of concepts."""
        return self.form.chosen

    def build(self) -> None:
        """Add the components and their events."""
        self.paths, self.selected = gr.State([]), gr.State(0)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.form = GenerateForm.build(self.defaults)
                with gr.Row():
                    self.button = gr.Button("Generate", variant="primary", scale=2, min_width=120)
                    self.strip = gr.Button("Find the bias", scale=1, min_width=150)
                    self.cancel = gr.Button("Cancel", scale=1, min_width=80)
            with gr.Column(scale=6, min_width=320):
                self._build_results()
        self._connect()

    def _build_results(self) -> None:
        gr.Markdown("### Images")
        self.gallery = gr.Gallery(label="Images", show_label=False, columns=4, height=430, object_fit="contain",
                                  format="png", elem_id="images")
        self.status = gr.HTML(elem_id="generate-status")
        with gr.Row():
            self.again = gr.Button("Start from the chosen image", size="sm", min_width=140)
            self.recall = gr.Button("Use the settings of the chosen image", size="sm", min_width=140)
        with gr.Column(visible=False) as self.comparison:
            gr.Markdown("Before and after: the image before, or the one that this started from.")
            self.slider = gr.ImageSlider(label="Before and after", show_label=False, type="filepath", height=360,
                                         format="png", elem_id="before-after")
        self.command = command_box("generate-command")
        with gr.Accordion("Settings from an image file", open=False):
            gr.Markdown("Drop an image that was made here or by scripts/txt2img.py.")
            self.file = gr.File(label="Image with settings", show_label=False, file_count="single", height=130)

    @cached_property
    def defaults(self) -> GenerationSettings:
        """The model's own settings."""
        config = self.site.model_config
        return complete_settings(GenerationSettings(), config,
                                 inference_defaults(config, self.site.settings.model.checkpoint))

    def _connect(self) -> None:
        form = self.form
        shown = [self.gallery, self.paths, self.status, self.comparison, self.slider, self.command]
        inputs = [self.paths, form.start, *form.inputs]
        takes_turns = {**OWN, "concurrency_id": PIPELINE, "concurrency_limit": 1, "show_progress_on": self.gallery}
        gr.on([self.button.click, form.prompt.submit], self.generate, inputs, shown, **takes_turns)
        self.strip.click(self.find_bias, inputs, shown, **takes_turns)
        form.bias.release(lambda: SET_BIAS, [], [form.bias_mode], **QUIET).then(
            self.generate_again, inputs, shown, trigger_mode="always_last", **takes_turns)
        self.cancel.click(self.cancel_generation, [], [], queue=False, **QUIET)
        form.chosen.change(self.words_of, [form.chosen], [form.chips], **QUIET)
        form.chips.click(self.add_word, [form.chips, form.prompt], [form.prompt], **QUIET)
        form.upload.upload(self.add_file, [form.upload, form.chosen], [form.chosen], **OWN)
        form.dice.click(random_seed, [], [form.seed], **QUIET)
        form.reuse.click(self.last_seed, [self.paths], [form.seed], **QUIET)
        self.gallery.select(_selected_index, [], [self.selected], **QUIET)
        self.again.click(self.start_from, [self.paths, self.selected], [form.start], **OWN)
        self.recall.click(self.settings_of_chosen, [self.paths, self.selected, *form.inputs], form.inputs, **OWN)
        self.file.upload(self.settings_of_file, [self.file, *form.inputs], form.inputs, **OWN)

    # Concepts and words

    def refresh(self, chosen: list[str] | None) -> Any:
        """Return the concepts to choose from."""
        return self.concepts.dropdown(chosen)

    @user_errors
    def words_of(self, chosen: list[str] | None) -> Any:
        """Return the words of the chosen concepts as chips."""
        words = [concept.placeholder for concept in self.concepts.read(chosen or [])] if chosen else []
        return gr.Dataset(samples=[[word] for word in words])

    @staticmethod
    def add_word(sample: list[str], prompt: str | None) -> str:
        """Return the prompt with a word at its end."""
        written = (prompt or "").rstrip()
        return f"{written} {sample[0]}" if written else f"a photo of a {sample[0]}"

    @user_errors
    def add_file(self, file: str, chosen: list[str] | None) -> Any:
        """Take a concept file that the user brings."""
        added = self.concepts.add(file)
        return self.concepts.dropdown([*(chosen or []), str(added)], select=True)

    # Generating

    def generate(self, paths: list[str], start: dict | None, *values: Any, progress: gr.Progress = gr.Progress()  # noqa: B008
                 ) -> Iterator[tuple[Any, ...]]:
        """Generate images, and show each as soon as it is there."""
        yield from self._run(paths, start, Values(*values), (), progress)

    def generate_again(self, paths: list[str], start: dict | None, *values: Any,
                       progress: gr.Progress = gr.Progress()) -> Iterator[tuple[Any, ...]]:  # noqa: B008
        """Generate the images that are shown again, from their seed, for a bias that has moved."""
        form = Values(*values)
        if not (paths and form.concepts and form.prompt.strip()):
            yield (gr.skip(),) * 6
            return
        if form.seed is None or form.seed < 0:
            form = form._replace(seed=self.last_seed(paths))
        yield from self._run(paths, start, form, (), progress)

    def find_bias(self, paths: list[str], start: dict | None, *values: Any, progress: gr.Progress = gr.Progress()  # noqa: B008
                  ) -> Iterator[tuple[Any, ...]]:
        """Generate one seed under several biases."""
        yield from self._run(paths, start, Values(*values), STRIP, progress)

    def _run(self, paths: list[str], start: dict | None, values: Values, biases: tuple[float, ...],
             progress: gr.Progress) -> Iterator[tuple[Any, ...]]:
        images: list[FinishedImage] = []
        previous = paths[0] if paths and Path(paths[0]).is_file() else None
        try:
            request = self.generation.with_seed(self.request(values, start, biases))
            command = generation_commands(request, self.site.settings.model)
            steps = request.settings.num_inference_steps
            for image in self.generation.generate(request, lambda step: progress((step + 1, steps), unit="steps")):
                images.append(image)
                yield self._shown(images, previous, command, "")
        except Cancelled:
            yield self._shown(images, previous, command, f"Cancelled after {len(images)} images.")
            return
        except Exception as error:
            raise as_message(error) from None
        yield self._shown(images, previous, command, f"{len(images)} images, in {images[0].path.parent}")

    def request(self, values: Values, start: dict | None, biases: tuple[float, ...] = ()) -> ImageRequest:
        """Return what the form asks for.

        Args:
            values: the form.
            start: the value of the image editor.
            biases: those of a strip.

        Raises:
            UserError: a value cannot be used.
        """
        if biases and not values.concepts:
            raise UserError("the bias acts on concepts; choose one")
        image, mask = split_editor(start)
        return ImageRequest(
            prompt=values.prompt or "", negative_prompt=values.negative_prompt or "",
            concepts=tuple(values.concepts or ()), settings=values.settings(), seed=values.chosen_seed(),
            count=whole_number_in("images", values.count, 1, MOST_AT_ONCE), biases=biases,
            image=None if image is None else self.generation.keep(image),
            mask=None if mask is None else self.generation.keep(mask),
            strength=None if image is None else number_in("strength", values.strength, LEAST_STRENGTH, 1))

    @staticmethod
    def _shown(images: list[FinishedImage], previous: str | None, command: str, status: str) -> tuple[Any, ...]:
        """Return the gallery, its files, the status, the comparison and its slider, and the command."""
        if not images:
            return gr.skip(), gr.skip(), as_html([status]), gr.skip(), gr.skip(), gr.skip()
        paths = [str(image.path) for image in images]
        before = images[0].before or previous
        slider = gr.skip() if before is None else (before, paths[0])
        shown = [(path, image.title) for path, image in zip(paths, images, strict=True)]
        return (shown, paths, as_html([status]), gr.Column(visible=before is not None), slider,
                gr.Code(command, visible=True))

    def cancel_generation(self) -> None:
        """Cancel what is generated now."""
        self.generation.cancel()

    # Images again

    @user_errors
    def last_seed(self, paths: list[str]) -> int:
        """Return the seed of the first image that is shown."""
        seed = stored_settings(_at(paths, 0)).get("seed")
        if not isinstance(seed, int):
            raise UserError("this image has no seed; generate one first")
        return seed

    @user_errors
    def start_from(self, paths: list[str], index: int) -> Any:
        """Put a generated image into the editor."""
        with Image.open(_at(paths, index)) as opened:
            return {"background": opened.convert("RGB"), "layers": [], "composite": None}

    @user_errors
    def settings_of_chosen(self, paths: list[str], index: int, *current: Any) -> tuple[Any, ...]:
        """Return the settings of a generated image."""
        return self._settings_of(_at(paths, index), Values(*current))

    @user_errors
    def settings_of_file(self, file: str, *current: Any) -> tuple[Any, ...]:
        """Return the settings in an image file of the user's."""
        return self._settings_of(file, Values(*current))

    def _settings_of(self, path: str, current: Values) -> tuple[Any, ...]:
        """Return the values of the form that made an image."""
        metadata = stored_settings(path)
        sources = stored_sources(metadata)
        listed = {str(concept.path) for concept in self.concepts.listed()}
        found = [source for source in sources if source in listed]
        if len(found) < len(sources):
            gr.Warning("a concept of this image is not in the list; add its file")
        return recall(metadata, current, found, self.concepts.read(found) if found else [])


def split_editor(value: dict | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the image in Gradio's editor, and a mask that is white where it is painted; None for what is not there."""
    if not value or value.get("background") is None:
        return None, None
    background = value["background"].convert("RGBA")
    opacity = np.zeros(background.size[::-1], np.uint8)
    for layer in value.get("layers") or []:
        painted = layer.convert("RGBA").resize(background.size).getchannel("A")
        opacity |= np.where(np.asarray(painted) > 0, 255, 0).astype(np.uint8)
    if not np.asarray(background.getchannel("A")).any():  # the editor is empty
        return None, None
    return background.convert("RGB"), Image.fromarray(opacity) if opacity.any() else None


def _selected_index(event: gr.SelectData) -> int:
    return int(event.index)


def _at(paths: list[str], index: int) -> str:
    if not paths:
        raise UserError("no image yet; generate one first")
    return paths[min(index, len(paths) - 1)]
