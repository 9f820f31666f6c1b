"""The tab "Teach": photos, masks, words, a preset, and the runs."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr
from omegaconf import OmegaConf

from ldm.common.errors import UserError
from ldm.web.choice import choice
from ldm.web.command_box import command_box
from ldm.web.events import OWN, QUIET
from ldm.web.messages import as_html, user_errors
from ldm.web.model_imports import import_models
from ldm.web.presets import suggest_placeholder
from ldm.web.run_folder import RunFolder, RunSettings
from ldm.web.run_list import RunList
from ldm.web.run_queue import shown_command, training_arguments
from ldm.web.site import Site
from ldm.web.teach_form import TeachForm, TeachValues
from ldm.web.uploads import add_photos

EXAMPLE = "models/mini/examples/teddy"
EXAMPLE_KIND, EXAMPLE_WORD = "teddy bear", "<my-teddy>"
STEPS_OF_NO_CONFIG = 200
WITH_MASKS = "What training will see: the crop of each photo, and beside it the same under its mask."
WITHOUT_KIND = "Say what it is, and the masks appear."


class TeachTab:
    """Builds the tab inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.config_steps = OmegaConf.select(site.training_config, "lightning.trainer.max_steps") or STEPS_OF_NO_CONFIG

    def build(self) -> RunList:
        """Add the components and their events; return the list of runs, for the other tabs."""
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._build_photos()
                self.form = TeachForm.build(self.site.settings.base)
                self.button = gr.Button("Teach", variant="primary")
                self.message = gr.HTML(elem_id="teach-message")
                self.command = command_box("teach-command")
            with gr.Column(scale=6, min_width=320):
                self.runs = RunList(self.site)
                self.runs.build()
        self._connect()
        return self.runs

    def _build_photos(self) -> None:
        gr.Markdown("### Photos of one subject\n1 to 20; five are a good number.")
        self.files = gr.File(label="Photos of one subject", show_label=False, file_count="multiple", height=130,
                             elem_id="photo-files")
        with gr.Row():
            self.example = gr.Button("Use the example: a teddy", size="sm", min_width=140)
            self.discard = gr.Button("Remove all photos", size="sm", min_width=140)
        self.problems = gr.HTML(elem_id="photo-problems")
        self.photos = gr.Gallery(label="Photos and masks", show_label=False, columns=3, height="auto",
                                 object_fit="contain", allow_preview=False, buttons=[], elem_id="reviewed-photos",
                                 visible=False)
        with gr.Row(elem_classes="beside"):
            self.chosen = choice(label="One of the photos", scale=3, min_width=140)
            self.leave_out = gr.Button("Leave out, or use again", size="sm", scale=2, min_width=140)
        with gr.Accordion("Paint or erase the mask of this photo", open=False):
            self.load_mask = gr.Button("Show its mask", size="sm")
            gr.Markdown("Colored: the subject.")
            self.editor = gr.ImageEditor(label="Mask of the photo", show_label=False, type="pil", image_mode="RGBA",
                                         height=420, layers=False, transforms=(), sources=(),
                                         brush=gr.Brush(colors=["#ff40a0"], color_mode="fixed", default_size=24),
                                         eraser=gr.Eraser(default_size=24))
            self.save_mask = gr.Button("Use this mask", size="sm")

    def _connect(self) -> None:
        form, shown = self.form, [self.photos, self.chosen, self.problems]
        busy = {**OWN, "show_progress_on": self.problems}
        self.restored = [*form.inputs, *shown]
        self.files.upload(self.add_files, [self.files, *form.inputs], [self.files, form.kind, form.word, *shown],
                          **busy)
        self.example.click(self.use_example, form.inputs, self.restored, **busy)
        self.discard.click(self.discard_photos, [], self.restored, **busy)
        form.kind.input(self.change_kind, form.inputs, [form.word, *shown], **busy)
        form.crop.input(self.change_crop, form.inputs, shown, **busy)
        for part in (form.word, form.preset, form.title, form.steps, form.seed):
            part.change(self.keep_form, form.inputs, [], trigger_mode="always_last", **QUIET)
        self.photos.select(self.choose_photo, [], [self.chosen], **QUIET)
        self.leave_out.click(self.toggle_photo, [self.chosen, *form.inputs], shown, **busy)
        self.load_mask.click(self.edit_mask, [self.chosen, form.kind], [self.editor], **OWN)
        self.save_mask.click(self.keep_mask, [self.chosen, self.editor, *form.inputs], shown, **busy)
        self.button.click(self.teach, form.inputs, [self.message, self.command, *self.restored, self.runs.chosen],
                          show_progress_on=self.message, **OWN).success(
            self.runs.refresh, self.runs.inputs, self.runs.outputs, **QUIET)

    # Photos

    def restore(self) -> tuple[Any, ...]:
        """Return the form and the photos of the draft, for a page that is loaded."""
        kept = self.site.draft.read_form()
        values = TeachValues(**{name: kept[name] for name in TeachValues._fields if name in kept})
        run = self.site.draft.find()
        if run is None:  # the form is empty already; photos may be on their way
            return (gr.skip(),) * len(self.restored)
        try:
            return *values._replace(kind=_choices(values.kind)), *self._review(run, values)
        except FileNotFoundError:  # another tab removed the photos meanwhile
            return (gr.skip(),) * len(self.restored)
        except UserError as error:
            return *values._replace(kind=_choices(values.kind)), _gallery([]), _photo_choice([]), as_html([str(error)])

    @user_errors
    def add_files(self, files: list[str] | None, *form: Any) -> tuple[Any, ...]:
        """Copy uploaded photos into the draft, and review them."""
        values, run = TeachValues(*form), self.site.draft.find_or_create()
        refused = add_photos(run, files or [])
        if not any(run.photos.iterdir()):
            raise UserError("; ".join(refused) or "no photos; choose some")
        kinds = self._likely_kinds(run)
        if not values.kind and kinds:
            values = values._replace(kind=kinds[0], word=values.word or suggest_placeholder(kinds[0]))
        self.keep_form(*values)
        return None, _choices(values.kind, kinds), values.word, *self._review(run, values, refused)

    @user_errors
    def use_example(self, *form: Any) -> tuple[Any, ...]:
        """Copy the bundled example's photos into an empty draft."""
        import_models()
        from ldm.data.images import list_images

        run = self.site.draft.find_or_create()
        if any(run.photos.iterdir()):
            raise UserError("there are photos already; remove them first")
        add_photos(run, list_images(EXAMPLE))
        values = TeachValues(*form)._replace(kind=EXAMPLE_KIND, word=EXAMPLE_WORD)
        self.keep_form(*values)
        return *values._replace(kind=_choices(EXAMPLE_KIND)), *self._review(run, values)

    @user_errors
    def discard_photos(self) -> tuple[Any, ...]:
        """Delete the draft; return an empty form."""
        self.site.draft.discard()
        return self._empty()

    @user_errors
    def change_kind(self, *form: Any) -> tuple[Any, ...]:
        """Fill in the word for a kind of subject, and look for it in the photos."""
        values = TeachValues(*form)
        values = values._replace(word=suggest_placeholder(values.kind or ""))
        self.keep_form(*values)
        return values.word, *self.change_crop(*values)

    @user_errors
    def change_crop(self, *form: Any) -> tuple[Any, ...]:
        """Show crops and masks of the draft's photos."""
        values, run = TeachValues(*form), self.site.draft.find()
        self.keep_form(*values)
        if run is None:
            return gr.skip(), gr.skip(), gr.skip()
        return self._review(run, values)

    def keep_form(self, *form: Any) -> None:
        """Store the form beside the photos, so that a reload keeps it."""
        if self.site.draft.find() is not None:
            self.site.draft.write_form(TeachValues(*form)._asdict())

    def choose_photo(self, event: gr.SelectData) -> Any:
        """Return the name of the photo that was clicked."""
        return (event.value or {}).get("caption", "").partition(":")[0] or gr.skip()

    @user_errors
    def toggle_photo(self, name: str | None, *form: Any) -> tuple[Any, ...]:
        """Leave a photo out of training, or use it again."""
        run = self.site.draft.find_or_create()
        run.toggle_photo(_required(name))
        return self._review(run, TeachValues(*form), chosen=name)

    @user_errors
    def edit_mask(self, name: str | None, kind: str | None) -> Any:
        """Show a photo and its mask in the editor."""
        if not kind:
            raise UserError("what is it? Say the kind of subject first")
        return self.site.photos.mask_to_edit(self.site.draft.with_photos(), _required(name), kind)

    @user_errors
    def keep_mask(self, name: str | None, edited: dict | None, *form: Any) -> tuple[Any, ...]:
        """Store the mask in the editor."""
        run, values = self.site.draft.with_photos(), TeachValues(*form)
        self.site.photos.save_mask(run, _required(name), edited or {}, values.kind or "")
        return self._review(run, values, chosen=name)

    def _review(self, run: RunFolder, values: TeachValues, refused: list[str] | None = None,
                chosen: str | None = None) -> tuple[Any, ...]:
        """Return the gallery, the choice of one photo, and what is wrong with some files."""
        reviewed = self.site.photos.review(run, (values.kind or "").strip(), values.crop)
        images = [(photo.shown, f"{photo.name}: not used" if photo.note else photo.name) for photo in reviewed]
        problems = [*(refused or []), *(f"{photo.name}: {photo.note}" for photo in reviewed if photo.note)]
        note = WITH_MASKS if values.kind else WITHOUT_KIND
        names = [photo.name for photo in reviewed]
        return _gallery(images), _photo_choice(names, chosen), as_html([*problems, *([note] if images else [])])

    def _likely_kinds(self, run: RunFolder) -> list[str]:
        import_models()
        from ldm.training.likely_kinds import likely_kinds

        return likely_kinds(run.photos, self.site.training_config)

    @staticmethod
    def _empty() -> tuple[Any, ...]:
        return *TeachValues()._replace(kind=_choices(None)), _gallery([]), _photo_choice([]), ""

    # Teaching

    @user_errors
    def teach(self, *form: Any) -> tuple[Any, ...]:
        """Put the draft into the queue; return the command that does the same, and an empty form."""
        run = self.site.draft.with_photos()
        settings = self.start(run, TeachValues(*form))
        started = f"{settings.title} is in the list of your concepts; you can close this page meanwhile."
        command = shown_command(training_arguments(settings, run))
        return as_html([started]), gr.Code(command, visible=True), *self._empty(), gr.Dropdown(
            choices=[(settings.title, run.name)], value=run.name)

    def start(self, run: RunFolder, values: TeachValues) -> RunSettings:
        """Put a run with photos into the queue; return its settings.

        Raises:
            UserError: training would refuse the photos or words.
        """
        settings = values.settings(self.site.settings, self.config_steps)
        check_training(settings, run)
        self.site.photos.complete_masks(run, settings.super_category, settings.crop or "subject")
        run.write_settings(settings)
        self.site.queue.enqueue(run)
        return settings


def check_training(settings: RunSettings, run: RunFolder) -> None:
    """Raise UserError if training would refuse the photos or words, before the run waits for its turn."""
    from ldm.cli.training import parse_training_options
    from ldm.training.early_checks import check_files
    from ldm.training.plan import plan_run

    # Masks are checked when they are painted; those that are missing come later.
    options = replace(parse_training_options(training_arguments(settings, run)), masks=None)
    check_files(options)
    plan_run(options)


def _choices(kind: str | None, kinds: list[str] | None = None) -> Any:
    """Return the dropdown of kinds, with one of them chosen."""
    listed = [*(kinds or []), *([kind] if kind and kind not in (kinds or []) else [])]
    return gr.Dropdown(choices=listed, value=kind)


def _gallery(images: list[Any]) -> Any:
    """Return the gallery of photos, which is hidden without any."""
    return gr.Gallery(images, visible=bool(images))


def _photo_choice(names: list[str], chosen: str | None = None) -> Any:
    """Return the dropdown of photos, with one of them chosen."""
    return gr.Dropdown(choices=names, value=chosen if chosen in names else (names or [None])[0])


def _required(name: str | None) -> str:
    if not name:
        raise UserError("no photo is chosen; choose one")
    return name
