"""The tab "Generate": prompts, concepts, settings, images to start from, and the gallery."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from ldm.common.errors import UserError
from ldm.concepts.storage import load_concepts
from ldm.inference.output_folder import read_metadata
from ldm.inference.requests import RANDOM_SEED_LIMIT
from ldm.inference.settings import GenerationSettings
from ldm.sampling.samplers import SAMPLERS
from ldm.web.concept_files import ConceptFiles
from ldm.web.generation import Cancelled, FinishedImage, ImageGeneration, ImageRequest, requests_of
from ldm.web.messages import as_message, user_errors
from ldm.web.site import Site

STRIP = (0.3, 0.45, 0.6, 0.75, 0.9)
OWN_BIAS, AUTO_BIAS, SET_BIAS = "as trained", "find a balance (slow)", "by the slider"
WHITE = "#ffffff"


class Values(NamedTuple):
    """The values of the form, in the order of its components."""

    prompt: str
    negative_prompt: str
    concepts: list[str]
    bias_mode: str
    bias: float
    temperature: float
    global_locking: bool
    sampler: str
    steps: float
    guidance: float
    height: float
    width: float
    seed: float
    count: float
    start: dict | None
    strength: float


class GenerateTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.
        concepts: the concept files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts
        self.generation = ImageGeneration(site, concepts)

    def build(self) -> None:
        """Add the components and their events."""
        self.paths, self.last = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=5):
                self._build_words()
                self._build_settings()
                self._build_start()
                with gr.Row():
                    self.button = gr.Button("Generate", variant="primary", scale=2)
                    self.strip = gr.Button("Find the bias", scale=1)
                    self.cancel = gr.Button("Cancel", scale=1)
            with gr.Column(scale=6):
                self._build_results()
        self.inputs = [self.prompt, self.negative, self.chosen, self.bias_mode, self.bias, self.temperature, self.lock,
                       self.sampler, self.steps, self.guidance, self.height, self.width, self.seed, self.count,
                       self.start, self.strength]
        self._connect()

    def _build_words(self) -> None:
        with gr.Row():
            self.chosen = gr.Dropdown(label="Concepts", choices=[], multiselect=True, interactive=True, scale=4)
            self.upload = gr.UploadButton("Add a file", size="sm", file_types=[".safetensors"], scale=1)
        self.chips = gr.Dataset(label="Their words: press one to put it into the prompt", samples=[],
                                components=[gr.Textbox(visible=False)], type="values")
        self.prompt = gr.Textbox(label="Prompt", lines=2, placeholder="a photo of a <my-teddy> on the beach")
        self.bias_mode = gr.Radio(label="Bias", choices=[OWN_BIAS, SET_BIAS, AUTO_BIAS], value=OWN_BIAS)
        self.bias = gr.Slider(0, 1.2, 0.6, step=0.05, label="← more of my subject · more of the prompt →")

    def _build_settings(self) -> None:
        defaults = self._defaults()
        with gr.Row():
            self.count = gr.Slider(1, 16, 4, step=1, label="Images")
            self.seed = gr.Number(label="Seed", info="-1: another one each time", value=-1, precision=0, minimum=-1)
        with gr.Row():
            self.dice = gr.Button("Random seed", size="sm")
            self.reuse = gr.Button("Seed of the last image", size="sm")
        with gr.Accordion("Advanced", open=False):
            self.negative = gr.Textbox(label="Negative prompt", info="what to lead away from", max_lines=2)
            with gr.Row():
                self.steps = gr.Slider(1, 100, defaults.num_inference_steps, step=1, label="Sampling steps")
                self.guidance = gr.Slider(0, 15, defaults.guidance_scale, step=0.5, label="Guidance")
            with gr.Row():
                self.sampler = gr.Dropdown(label="Sampler", choices=list(SAMPLERS), value=defaults.sampler)
                self.temperature = gr.Slider(0, 0.5, 0, step=0.01, label="Temperature", info="0: as trained")
            with gr.Row():
                self.height = gr.Number(label="Height", info="0: the model's", value=0, precision=0, minimum=0)
                self.width = gr.Number(label="Width", info="0: the model's", value=0, precision=0, minimum=0)
            self.lock = gr.Checkbox(label="Lock the layout of the whole prompt to the kind of subject")

    def _build_start(self) -> None:
        with gr.Accordion("Start from an image, or repaint a part of one", open=False):
            self.start = gr.ImageEditor(
                label="Paint over what is to change; unpainted: everything", type="pil", image_mode="RGBA", height=380,
                layers=False, transforms=(), brush=gr.Brush(colors=[WHITE], color_mode="fixed", default_size=30))
            self.strength = gr.Slider(0.05, 1, 0.75, step=0.05, label="← keep the image · change it →")

    def _build_results(self) -> None:
        self.gallery = gr.Gallery(label="Images", columns=4, height=430, object_fit="contain", format="png")
        self.status = gr.Markdown(elem_id="generate-status")
        with gr.Row():
            self.again = gr.Button("Start from the chosen image", size="sm")
            self.recall = gr.Button("Use the settings of the chosen image", size="sm")
        self.slider = gr.ImageSlider(label="Before and after", type="filepath", visible=False, height=360)
        with gr.Accordion("Settings from an image file", open=False):
            self.file = gr.File(label="Drop an image that was made here or by txt2img.py", file_count="single",
                                height=120)

    def _defaults(self) -> GenerationSettings:
        from ldm.inference.model_config import complete_settings, inference_defaults

        config = self.site.model_config
        return complete_settings(GenerationSettings(), config,
                                 inference_defaults(config, self.site.settings.model.checkpoint))

    def _connect(self) -> None:
        shown = [self.gallery, self.paths, self.status, self.slider, self.last]
        kept = [self.last, *self.inputs]
        gr.on([self.button.click, self.prompt.submit], self.generate, kept, shown, concurrency_id="pipeline",
              concurrency_limit=1, api_name="generate")
        self.strip.click(self.find_bias, kept, shown, concurrency_id="pipeline", api_name="find_bias")
        self.bias.release(self.use_slider, [], [self.bias_mode])
        self.cancel.click(self.generation.cancel, [], [], queue=False)
        self.chosen.change(self.words_of, [self.chosen], [self.chips])
        self.chips.click(self.add_word, [self.chips, self.prompt], [self.prompt])
        self.upload.upload(self.add_file, [self.upload, self.chosen], [self.chosen])
        self.dice.click(random_seed, [], [self.seed])
        self.reuse.click(self.last_seed, [self.last], [self.seed])
        selected = gr.State(0)
        self.gallery.select(selected_index, [], [selected])
        self.again.click(self.start_from, [self.paths, selected], [self.start])
        settings = [self.prompt, self.negative, self.chosen, self.bias_mode, self.bias, self.temperature, self.lock,
                    self.sampler, self.steps, self.guidance, self.height, self.width, self.seed]
        self.recall.click(self.settings_of_chosen, [self.paths, selected], settings)
        self.file.upload(self.settings_of_file, [self.file], settings)

    # Concepts and words

    def refresh(self, chosen: list[str] | None) -> Any:
        """Return the concepts to choose from."""
        choices, value = self.concepts.choices(chosen)
        return gr.Dropdown(choices=choices, value=value)

    @user_errors
    def words_of(self, chosen: list[str] | None) -> Any:
        """Return the words of the chosen concepts as chips."""
        words = [concept.placeholder for concept in self.concepts.read(chosen or [])] if chosen else []
        return gr.Dataset(samples=[[word] for word in words])

    @staticmethod
    def add_word(sample: list[str], prompt: str) -> str:
        """Return the prompt with a word at its end."""
        return f"{prompt.rstrip()} {sample[0]}".strip() if prompt.strip() else f"a photo of a {sample[0]}"

    @user_errors
    def add_file(self, file: str, chosen: list[str] | None) -> Any:
        """Take a concept file that the user brings."""
        added = self.concepts.add(file)
        return self.refresh([*(chosen or []), str(added)])

    # Generating

    def generate(self, last: str | None, *values: Any, progress: gr.Progress = gr.Progress()  # noqa: B008
                 ) -> Iterator[tuple[Any, ...]]:
        """Generate images, and show each as soon as it is there."""
        yield from self._run(last, Values(*values), (), progress)

    def find_bias(self, last: str | None, *values: Any, progress: gr.Progress = gr.Progress()  # noqa: B008
                  ) -> Iterator[tuple[Any, ...]]:
        """Generate one seed under several biases."""
        yield from self._run(last, Values(*values), STRIP, progress)

    def _run(self, last: str | None, values: Values, biases: tuple[float, ...], progress: gr.Progress
             ) -> Iterator[tuple[Any, ...]]:
        images: list[FinishedImage] = []
        steps = int(values.steps)
        try:
            request = self._request(values, biases)
            for image in self.generation.generate(request, lambda step: progress((step + 1, steps), unit="steps")):
                images.append(image)
                yield self._shown(images, last, request, "")
        except Cancelled:
            yield self._shown(images, last, None, f"Cancelled after {len(images)} images.")
            return
        except Exception as error:
            raise as_message(error) from None
        yield self._shown(images, last, request, f"{len(images)} images, in {images[0].path.parent}")

    def _request(self, values: Values, biases: tuple[float, ...]) -> ImageRequest:
        if biases and not values.concepts:
            raise UserError("the bias acts on concepts; choose one")
        bias = {OWN_BIAS: None, AUTO_BIAS: "auto"}.get(values.bias_mode, values.bias)
        settings = GenerationSettings(
            num_inference_steps=int(values.steps), guidance_scale=values.guidance, sampler=values.sampler,
            height=int(values.height or 0) or None, width=int(values.width or 0) or None,
            bias=bias if values.concepts else None,
            temperature=(values.temperature or None) if values.concepts else None,
            global_locking=bool(values.global_locking and values.concepts))
        image, mask = split_editor(values.start)
        return ImageRequest(
            prompt=values.prompt, negative_prompt=values.negative_prompt or "", concepts=tuple(values.concepts or ()),
            settings=settings, seed=None if values.seed is None or values.seed < 0 else int(values.seed),
            count=int(values.count), biases=biases, image=image, mask=mask,
            strength=values.strength if image is not None else None)

    @staticmethod
    def _shown(images: list[FinishedImage], last: str | None, request: ImageRequest | None, status: str
               ) -> tuple[Any, ...]:
        """Return the gallery, its files, the status, the slider, and the last image."""
        paths = [str(image.path) for image in images]
        if not images:
            return gr.skip(), gr.skip(), status, gr.skip(), last
        before = last
        slider = gr.ImageSlider(value=(before, paths[-1]), visible=True) if before and Path(before).is_file() else (
            gr.skip())
        shown = [(path, image.title) for path, image in zip(paths, images, strict=True)]
        return shown, paths, status, slider, paths[-1]

    @staticmethod
    def use_slider() -> str:
        """Return the mode in which the slider counts."""
        return SET_BIAS

    # Images again

    @user_errors
    def last_seed(self, last: str | None) -> int:
        """Return the seed of the last image."""
        metadata = read_metadata(last) if last and Path(last).is_file() else {}
        if not isinstance(metadata.get("seed"), int):
            raise UserError("no image yet; generate one first")
        return metadata["seed"]

    @user_errors
    def start_from(self, paths: list[str], index: int) -> Any:
        """Put a generated image into the editor."""
        return {"background": Image.open(_at(paths, index)).convert("RGB"), "layers": [], "composite": None}

    @user_errors
    def settings_of_chosen(self, paths: list[str], index: int) -> tuple[Any, ...]:
        """Return the settings of a generated image."""
        return self._settings_of(_at(paths, index))

    @user_errors
    def settings_of_file(self, file: str) -> tuple[Any, ...]:
        """Return the settings in an image file of the user's."""
        return self._settings_of(file)

    def _settings_of(self, path: str) -> tuple[Any, ...]:
        """Return the values of the form that made an image."""
        try:
            metadata = read_metadata(path)
        except Exception:  # decoders raise almost anything
            metadata = {}
        request = requests_of(metadata) if isinstance(metadata, dict) else None
        if request is None:
            raise UserError(f"{Path(path).name}: holds no settings; choose an image that was made here")
        stored = metadata.get("concepts") or []
        listed = {str(concept.path): concept for concept in self.concepts.listed()}
        sources = [str(entry.get("source")) for entry in stored if isinstance(entry, dict)]
        found = [source for source in sources if source in listed]
        if len(found) < len(sources):
            gr.Warning("a concept of this image is not in the list; add its file")
        own = [concept for source in found for concept in load_concepts(source)]
        bias = stored[0].get("bias") if stored else None
        is_own = bias is None or (bool(own) and getattr(own[0], "bias", None) == bias)
        return (request.prompt, request.negative_prompt, found, OWN_BIAS if is_own else SET_BIAS,
                0.6 if bias is None else bias, 0, bool(metadata.get("global_locking")), metadata.get("sampler"),
                metadata.get("num_inference_steps"), metadata.get("guidance_scale"), metadata.get("height", 0),
                metadata.get("width", 0), request.seed)


def split_editor(value: dict | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the image in Gradio's editor, and a mask that is white where it is painted; None for what is not there."""
    if not value or value.get("background") is None:
        return None, None
    background = value["background"].convert("RGBA")
    if not np.asarray(background.getchannel("A")).any():
        return None, None
    opacity = np.zeros(background.size[::-1], np.uint8)
    for layer in value.get("layers") or []:
        opacity |= np.where(np.asarray(layer.convert("RGBA").getchannel("A")) > 0, 255, 0).astype(np.uint8)
    return background.convert("RGB"), Image.fromarray(opacity) if opacity.any() else None


def random_seed() -> int:
    """Return a random seed that is short enough to be typed."""
    return int(np.random.default_rng().integers(RANDOM_SEED_LIMIT))


def selected_index(event: gr.SelectData) -> int:
    """Return the index of the chosen image."""
    return int(event.index)


def _at(paths: list[str], index: int) -> str:
    if not paths:
        raise UserError("no image yet; generate one first")
    return paths[min(index, len(paths) - 1)]
