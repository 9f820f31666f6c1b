"""The form that describes a run: what the subject is, its word, and how to train."""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from ldm.common.errors import UserError
from ldm.web.choice import choice
from ldm.web.numbers import whole_number_in
from ldm.web.presets import config_presets, preset_labels, preset_steps, suggest_placeholder
from ldm.web.run_folder import RunSettings, check_title
from ldm.web.site import SiteSettings

CROPS = {"around the subject": "subject", "the center": "center"}
MOST_STEPS, LARGEST_SEED = 100_000, 2 ** 32 - 1
LONGEST_WORD = 60
DEFAULT_PRESET, DEFAULT_SEED = "balanced", 23


class TeachValues(NamedTuple):
    """The values of the form, in the order of its components; those of an empty form by default."""

    kind: str | None = None
    word: str = ""
    preset: str = DEFAULT_PRESET
    title: str = ""
    steps: float = 0
    seed: float = DEFAULT_SEED
    crop: str = "subject"

    def settings(self, site: SiteSettings, config_steps: int) -> RunSettings:
        """Return the settings of a run.

        Args:
            site: the base model.
            config_steps: training steps of its config.

        Raises:
            UserError: a value is missing or cannot be used.
        """
        kind = (self.kind or "").strip()
        if not kind:
            raise UserError('what is it? Say the kind of subject in plain words, such as "teddy bear"')
        word = (self.word or suggest_placeholder(kind)).strip()
        for name, text in (("the kind of subject", kind), ("the word", word)):
            if len(text) > LONGEST_WORD:
                raise UserError(f"{name} has {len(text)} characters; give at most {LONGEST_WORD}")
        presets = preset_labels(site.base)
        if self.preset not in presets:
            raise UserError(f"how long? Choose one of {', '.join(presets)}")
        config, steps = site.base, whole_number_in("training steps", self.steps, 0, MOST_STEPS) or None
        own = config_presets(site.base).get(self.preset)
        if own is not None:
            config = own.config
        else:
            steps = steps or preset_steps(self.preset, config_steps)
        return RunSettings(
            title=check_title(self.title or word), super_category=kind, placeholder=word, config=config,
            checkpoint=site.model.checkpoint, max_steps=steps, seed=whole_number_in("seed", self.seed, 0, LARGEST_SEED),
            crop="center" if self.crop == "center" else "subject", overrides=_checkpoints(steps), created=time.time())


def _checkpoints(steps: int | None) -> tuple[str, ...]:
    """Return how often to save checkpoints, so that little is lost when the process is killed."""
    return () if steps is None else (f"lightning.modelcheckpoint.every_n_train_steps={max(10, min(100, steps // 10))}",)


@dataclass(frozen=True)
class TeachForm:
    """The components of the form."""

    kind: gr.Dropdown
    word: gr.Textbox
    preset: gr.Radio
    title: gr.Textbox
    steps: gr.Number
    seed: gr.Number
    crop: gr.Radio

    @classmethod
    def build(cls, base: str) -> TeachForm:
        """Add the components to the open `gr.Blocks`; `base` is the training config."""
        with gr.Row():
            kind = choice(label="What is it?", info="The kind of subject, in plain words",
                          allow_custom_value=True, min_width=140)
            word = gr.Textbox(label="Its word in prompts", info="Filled in from the kind", placeholder="<my-teddy>",
                              max_lines=1, min_width=140)
        preset = gr.Radio(label="How long?", choices=[(label, name) for name, label in preset_labels(base).items()],
                          value=DEFAULT_PRESET)
        with gr.Accordion("Advanced", open=False):
            title = gr.Textbox(label="Name in the list", info="Empty: its word", max_lines=1)
            with gr.Row():
                steps = gr.Number(label="Training steps", info="0: as above", value=0, precision=0, minimum=0,
                                  min_width=140)
                seed = gr.Number(label="Seed", info="The same seed learns the same concept", value=DEFAULT_SEED,
                                 precision=0, minimum=0, min_width=140)
            crop = gr.Radio(label="Part of each photo", choices=list(CROPS.items()), value="subject")
        return cls(kind, word, preset, title, steps, seed, crop)

    @property
    def inputs(self) -> list[Any]:
        """All components, in the order of `TeachValues`."""
        return [self.kind, self.word, self.preset, self.title, self.steps, self.seed, self.crop]
