"""The form of the tab "Generate": the components, and what their values ask for."""
from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from ldm.common.errors import UserError
from ldm.inference.requests import RANDOM_SEED_LIMIT
from ldm.inference.settings import AUTO, GenerationSettings
from ldm.sampling.samplers import SAMPLERS
from ldm.sampling.spacings import TIMESTEP_SPACINGS
from ldm.web.choice import choice
from ldm.web.numbers import number_in, whole_number_in

OWN_BIAS, SET_BIAS, AUTO_BIAS = "as trained", "by the slider", "find a balance (slow)"
OWN_SPACING = "the sampler's own"
MIDDLE_BIAS, MOST_BIAS = 0.6, 1.2
MOST_SHOWN, MOST_STEPS, MOST_GUIDANCE, MOST_TEMPERATURE = 16, 100, 15, 0.5
MOST_PIXELS, LEAST_STRENGTH = 8192, 0.05
LARGEST_SEED = 2 ** 53  # up to which browsers count exactly
NARROW = 140  # pixels; two such components fit side by side on a phone


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
    spacing: str
    steps: float
    guidance: float
    height: float
    width: float
    seed: float
    count: float
    strength: float

    def settings(self) -> GenerationSettings:
        """Return how to generate.

        Raises:
            UserError: a value cannot be used.
        """
        bias = number_in("bias", self.bias, 0, MOST_BIAS)
        temperature = number_in("temperature", self.temperature, 0, MOST_TEMPERATURE)
        chosen = {OWN_BIAS: None, AUTO_BIAS: AUTO, SET_BIAS: bias}
        if self.bias_mode not in chosen:
            raise UserError(f"bias: choose one of {', '.join(chosen)}")
        return GenerationSettings(
            num_inference_steps=whole_number_in("sampling steps", self.steps, 1, MOST_STEPS),
            guidance_scale=number_in("guidance", self.guidance, 0, MOST_GUIDANCE), sampler=self.sampler,
            timestep_spacing=None if self.spacing in (OWN_SPACING, None) else self.spacing,
            height=whole_number_in("height", self.height, 0, MOST_PIXELS) or None,
            width=whole_number_in("width", self.width, 0, MOST_PIXELS) or None,
            bias=chosen[self.bias_mode] if self.concepts else None,
            temperature=(temperature or None) if self.concepts else None,
            global_locking=bool(self.global_locking and self.concepts))

    def chosen_seed(self) -> int | None:
        """Return the seed; None: a random one.

        Raises:
            UserError: it is no seed.
        """
        seed = whole_number_in("seed", -1 if self.seed is None else self.seed, -1, LARGEST_SEED)
        return None if seed < 0 else seed


@dataclass(frozen=True)
class GenerateForm:
    """The components of the form. `inputs` has them in the order of `Values`."""

    inputs: list[Any]
    upload: gr.UploadButton
    chips: gr.Dataset
    dice: gr.Button
    reuse: gr.Button
    start: gr.ImageEditor

    @property
    def prompt(self) -> gr.Textbox:
        return self.inputs[Values._fields.index("prompt")]

    @property
    def chosen(self) -> gr.Dropdown:
        return self.inputs[Values._fields.index("concepts")]

    @property
    def bias_mode(self) -> gr.Radio:
        return self.inputs[Values._fields.index("bias_mode")]

    @property
    def bias(self) -> gr.Slider:
        return self.inputs[Values._fields.index("bias")]

    @property
    def seed(self) -> gr.Number:
        return self.inputs[Values._fields.index("seed")]

    @classmethod
    def build(cls, defaults: GenerationSettings) -> GenerateForm:
        """Add the components to the open `gr.Blocks`.

        Args:
            defaults: the model's own settings.
        """
        with gr.Row(elem_classes="beside"):
            chosen = choice(label="Concepts", multiselect=True, scale=4,
                                 min_width=NARROW)
            upload = gr.UploadButton("Add a file", size="sm", file_types=[".safetensors", ".bin", ".pt"], scale=1,
                                     min_width=100)
        chips = gr.Dataset(label="Their words: press one to put it into the prompt", samples=[], show_label=True,
                           components=[gr.Textbox(visible=False)], type="values", elem_id="chips")
        prompt = gr.Textbox(label="Prompt", lines=1, max_lines=5,  # with one line, Enter generates
                            placeholder="a photo of a <my-teddy> on the beach", elem_id="prompt")
        bias_mode = gr.Radio(label="Bias", choices=[OWN_BIAS, SET_BIAS, AUTO_BIAS], value=OWN_BIAS)
        bias = gr.Slider(0, MOST_BIAS, MIDDLE_BIAS, step=0.05, label="← more of my subject · more of the prompt →",
                         elem_id="bias")
        with gr.Row():
            count = gr.Slider(1, MOST_SHOWN, 4, step=1, label="Images", min_width=NARROW)
            seed = gr.Number(label="Seed", info="-1: another one each time", value=-1, precision=0, minimum=-1,
                             min_width=NARROW)
        with gr.Row():
            dice = gr.Button("Random seed", size="sm", min_width=NARROW)
            reuse = gr.Button("Seed of the last image", size="sm", min_width=NARROW)
        advanced = _build_advanced(defaults)
        start, strength = _build_start()
        by_name = {"prompt": prompt, "concepts": chosen, "bias_mode": bias_mode, "bias": bias, "seed": seed,
                   "count": count, "strength": strength, **advanced}
        return cls([by_name[name] for name in Values._fields], upload, chips, dice, reuse, start)


def _build_advanced(defaults: GenerationSettings) -> dict[str, Any]:
    """Add the settings that beginners need not see; return them by their names in `Values`."""
    with gr.Accordion("Advanced", open=False):
        negative = gr.Textbox(label="Negative prompt", info="What to lead away from", max_lines=2)
        with gr.Row():
            steps = gr.Slider(1, MOST_STEPS, defaults.num_inference_steps, step=1, label="Sampling steps",
                              min_width=NARROW)
            guidance = gr.Slider(0, MOST_GUIDANCE, defaults.guidance_scale, step=0.5, label="Guidance",
                                 min_width=NARROW)
        with gr.Row():
            described = [(f"{name}: {entry.description}", name) for name, entry in SAMPLERS.items()]
            sampler = gr.Dropdown(label="Sampler", choices=described, value=defaults.sampler, min_width=NARROW)
            spacing = gr.Dropdown(label="Where the steps are", value=OWN_SPACING, min_width=NARROW, choices=[
                OWN_SPACING, *((f"{name}: {text}", name) for name, text in TIMESTEP_SPACINGS.items())])
        with gr.Row():
            height = gr.Number(label="Height", info="0: the model's", value=0, precision=0, minimum=0,
                               min_width=NARROW)
            width = gr.Number(label="Width", info="0: the model's", value=0, precision=0, minimum=0, min_width=NARROW)
        temperature = gr.Slider(0, MOST_TEMPERATURE, 0, step=0.01, label="Temperature",
                                info="How softly concepts act beyond their word; 0: as trained")
        lock = gr.Checkbox(label="Lock the layout of the whole prompt to the kind of subject")
    return {"negative_prompt": negative, "steps": steps, "guidance": guidance, "sampler": sampler, "spacing": spacing,
            "height": height, "width": width, "temperature": temperature, "global_locking": lock}


def _build_start() -> tuple[gr.ImageEditor, gr.Slider]:
    with gr.Accordion("Start from an image, or repaint a part of one", open=False):
        gr.Markdown("Drop an image, and paint over what is to change; unpainted: everything.")
        start = gr.ImageEditor(
            label="Image to start from", show_label=False, type="pil", image_mode="RGBA", height=380, layers=False,
            transforms=(), brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=30), elem_id="start")
        strength = gr.Slider(LEAST_STRENGTH, 1, 0.75, step=0.05, label="← keep the image · change it →")
    return start, strength


def random_seed() -> int:
    """Return a random seed that is short enough to be typed."""
    return secrets.randbelow(RANDOM_SEED_LIMIT)
