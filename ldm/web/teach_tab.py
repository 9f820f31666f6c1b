"""The tab "Teach": photos, masks, words, a preset, and the runs."""
from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.data.images import list_images
from ldm.training.likely_kinds import likely_kinds
from ldm.web.messages import user_errors
from ldm.web.photo_review import leave_out
from ldm.web.presets import PRESETS, preset_steps, suggest_placeholder
from ldm.web.run_folder import RunFolder, RunSettings, check_title
from ldm.web.run_list import RunList
from ldm.web.run_queue import shown_command, training_arguments
from ldm.web.site import Site
from ldm.web.uploads import add_photos

EXAMPLE = "models/mini/examples/teddy"
EXAMPLE_KIND = "teddy bear"
CROPS = {"around the subject": "subject", "the center": "center"}


@dataclass(frozen=True)
class TeachForm:
    """The components that describe a run."""

    kind: gr.Dropdown
    word: gr.Textbox
    title: gr.Textbox
    preset: gr.Radio
    steps: gr.Number
    seed: gr.Number
    crop: gr.Radio

    @property
    def inputs(self) -> list[Any]:
        return [self.kind, self.word, self.title, self.preset, self.steps, self.seed, self.crop]


class TeachTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.config_steps = OmegaConf.select(site.training_config, "lightning.trainer.max_steps") or 200

    def build(self) -> RunList:
        """Add the components and their events; return the list of runs, for the other tabs."""
        draft = gr.BrowserState("", storage_key="perfusion-draft")
        with gr.Row():
            with gr.Column(scale=5):
                self._build_photos(draft)
                form = self._build_form()
                teach = gr.Button("Teach", variant="primary")
                message = gr.Markdown(elem_id="teach-message")
                command = gr.Textbox(label="The same in a terminal", interactive=False, lines=2, buttons=["copy"])
            with gr.Column(scale=6):
                runs = RunList(self.site)
                runs.build()
        self._connect(draft, form, teach, message, command, runs)
        return runs

    def _build_photos(self, draft: gr.BrowserState) -> None:
        self.files = gr.File(label="Photos of one subject: 1 to 20, five are a good number", file_count="multiple",
                             height=140)
        self.example = gr.Button("Use the example: a teddy", size="sm")
        self.photos = gr.Gallery(label="What training will see: each photo's crop and, beside it, its mask",
                                 columns=3, height=260, allow_preview=False, buttons=[])
        self.problems = gr.Markdown(elem_id="photo-problems")
        with gr.Row():
            self.chosen = gr.Dropdown(label="One of the photos", choices=[], interactive=True, scale=3)
            self.leave_out = gr.Button("Leave out, or use again", size="sm", scale=2)
        with gr.Accordion("Paint or erase the mask of this photo", open=False):
            self.load_mask = gr.Button("Show its mask", size="sm")
            self.editor = gr.ImageEditor(label="Colored: the subject", type="pil", image_mode="RGBA", height=420,
                                         layers=False, transforms=(), sources=(),
                                         brush=gr.Brush(colors=["#ff40a0"], color_mode="fixed", default_size=24),
                                         eraser=gr.Eraser(default_size=24))
            self.save_mask = gr.Button("Use this mask", size="sm")

    def _build_form(self) -> TeachForm:
        with gr.Row():
            kind = gr.Dropdown(label="What is it?", info="the kind of subject, in plain words", choices=[],
                               allow_custom_value=True, interactive=True)
            word = gr.Textbox(label="Its word in prompts", placeholder="<my-teddy>", max_lines=1)
        preset = gr.Radio(label="How long?", choices=[(value.label, name) for name, value in PRESETS.items()],
                          value="balanced")
        with gr.Accordion("Advanced", open=False):
            title = gr.Textbox(label="Name in the list", info="empty: its word", max_lines=1)
            with gr.Row():
                steps = gr.Number(label="Training steps", info="0: as above", value=0, precision=0, minimum=0)
                seed = gr.Number(label="Seed", info="the same seed learns the same concept", value=23, precision=0,
                                 minimum=0)
            crop = gr.Radio(label="Part of each photo", choices=list(CROPS.items()), value="subject")
        return TeachForm(kind, word, title, preset, steps, seed, crop)

    def _connect(self, draft: gr.BrowserState, form: TeachForm, teach: gr.Button, message: gr.Markdown,
                 command: gr.Textbox, runs: RunList) -> None:
        shown = [self.photos, self.chosen, self.problems]
        self.files.upload(self.add_files, [self.files, draft, form.kind, form.crop],
                          [draft, self.files, form.kind, *shown])
        self.example.click(self.use_example, [draft, form.crop], [draft, self.files, form.kind, form.word, *shown])
        form.kind.change(self.change_kind, [draft, form.kind, form.crop], [form.word, *shown])
        form.crop.change(self.review, [draft, form.kind, form.crop], shown)
        self.leave_out.click(self.toggle_photo, [draft, self.chosen, form.kind, form.crop], shown)
        self.load_mask.click(self.edit_mask, [draft, self.chosen, form.kind], [self.editor])
        self.save_mask.click(self.keep_mask, [draft, self.chosen, self.editor, form.kind, form.crop], shown)
        teach.click(self.teach, [draft, *form.inputs], [draft, message, command, *shown, runs.chosen]).then(
            runs.refresh, [runs.chosen], runs.outputs)

    # Photos

    @user_errors
    def add_files(self, files: list[str] | None, draft: str, kind: str, crop: str) -> tuple[Any, ...]:
        """Copy uploaded photos into the draft of a run, and review them."""
        run = self._draft(draft)
        refused = add_photos(run, files or [])
        if not any(run.photos.iterdir()):
            raise UserError("; ".join(refused) or "no photos; choose some")
        suggestions = likely_kinds(run.photos, self.site.training_config)
        kinds = gr.Dropdown(choices=suggestions, value=kind or (suggestions[0] if suggestions else None))
        return run.name, None, kinds, *self._shown(run, kind or (suggestions or [""])[0], crop, refused)

    @user_errors
    def use_example(self, draft: str, crop: str) -> tuple[Any, ...]:
        """Copy the bundled example's photos into a new draft."""
        run = self.site.queue.create()
        add_photos(run, list_images(EXAMPLE))
        kinds = gr.Dropdown(choices=[EXAMPLE_KIND], value=EXAMPLE_KIND)
        return run.name, None, kinds, "<my-teddy>", *self._shown(run, EXAMPLE_KIND, crop)

    @user_errors
    def change_kind(self, draft: str, kind: str, crop: str) -> tuple[Any, ...]:
        """Fill in the word for a kind of subject, and look for it in the photos."""
        word = "<my-teddy>" if kind == EXAMPLE_KIND else suggest_placeholder(kind or "")
        return word, *self.review(draft, kind, crop)

    @user_errors
    def review(self, draft: str, kind: str, crop: str) -> tuple[Any, ...]:
        """Show crops and masks of the draft's photos."""
        if not draft or not kind:
            return gr.skip(), gr.skip(), gr.skip()
        return self._shown(self._draft(draft), kind, crop)

    def _shown(self, run: RunFolder, kind: str, crop: str, refused: list[str] | None = None) -> tuple[Any, ...]:
        """Return the gallery, the choice of one photo, and what is wrong with some files."""
        if not kind or not any(run.photos.iterdir()):
            return [], gr.Dropdown(choices=[]), "\n".join(f"- {line}" for line in refused or [])
        reviewed = self.site.photos.review(run, kind, crop)
        images = [(photo.shown, f"{photo.name}: not used" if photo.note else photo.name) for photo in reviewed]
        problems = [*(refused or []), *(f"{photo.name}: {photo.note}" for photo in reviewed if photo.note)]
        names = [photo.name for photo in reviewed]
        return images, gr.Dropdown(choices=names, value=names[0]), "\n".join(f"- {line}" for line in problems)

    @user_errors
    def toggle_photo(self, draft: str, name: str | None, kind: str, crop: str) -> tuple[Any, ...]:
        """Leave a photo out of training, or use it again."""
        run = self._existing(draft)
        leave_out(run, self._required(name))
        return self._shown(run, kind, crop)

    @user_errors
    def edit_mask(self, draft: str, name: str | None, kind: str) -> Any:
        """Show a photo and its mask in the editor."""
        return self.site.photos.mask_to_edit(self._existing(draft), self._required(name), kind)

    @user_errors
    def keep_mask(self, draft: str, name: str | None, edited: dict, kind: str, crop: str) -> tuple[Any, ...]:
        """Store the mask in the editor."""
        run = self._existing(draft)
        self.site.photos.save_mask(run, self._required(name), edited or {}, kind)
        return self._shown(run, kind, crop)

    # Teaching

    @user_errors
    def teach(self, draft: str, kind: str, word: str, title: str, preset: str, steps: float, seed: float, crop: str
              ) -> tuple[Any, ...]:
        """Put the draft into the queue; return an empty form and the command that does the same."""
        run = self._existing(draft)
        settings = self.settings(kind, word, title, preset, int(steps or 0), int(seed or 0), crop)
        arguments = training_arguments(settings, run)
        self.check(run, settings)
        self.site.photos.complete_masks(run, settings.super_category, crop)
        run.write_settings(settings)
        self.site.queue.enqueue(run)
        started = f"**{settings.title}** is in the list on the right; you can close this page meanwhile."
        return "", started, shown_command(arguments), [], gr.Dropdown(choices=[], value=None), "", run.name

    def settings(self, kind: str, word: str, title: str, preset: str, steps: int, seed: int, crop: str) -> RunSettings:
        """Return the settings of a run from the values of the form.

        Raises:
            UserError: a value is missing or cannot be used.
        """
        if not (kind or "").strip():
            raise UserError('what is it? Say the kind of subject in plain words, such as "teddy bear"')
        word = (word or suggest_placeholder(kind)).strip()
        site = self.site.settings
        steps = steps or preset_steps(preset, self.config_steps)
        every = f"lightning.modelcheckpoint.every_n_train_steps={max(10, min(100, steps // 10))}"
        return RunSettings(
            title=check_title(title or word), super_category=kind.strip(), placeholder=word, config=site.base,
            checkpoint=site.model.checkpoint, max_steps=steps, seed=seed, crop=crop, overrides=(every,),
            created=time.time())

    def check(self, run: RunFolder, settings: RunSettings) -> None:
        """Raise UserError if training would refuse the photos or words, before the run waits for its turn."""
        from ldm.cli.training import parse_training_options
        from ldm.training.early_checks import check_files
        from ldm.training.plan import plan_run

        options = parse_training_options(training_arguments(settings, run))
        check_files(replace(options, masks=None))
        plan_run(replace(options, masks=None))

    def _draft(self, name: str) -> RunFolder:
        """Return the draft of that name, or a new one."""
        try:
            run = self.site.queue.run(name)
        except UserError:
            return self.site.queue.create()
        return run if not (run.path / "run.json").is_file() else self.site.queue.create()

    def _existing(self, name: str) -> RunFolder:
        if not name:
            raise UserError("no photos yet; add some first")
        return self.site.queue.run(name)

    @staticmethod
    def _required(name: str | None) -> str:
        if not name:
            raise UserError("no photo is chosen; choose one")
        return name
