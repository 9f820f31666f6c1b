"""A run in words, as HTML and as a thumbnail."""
from __future__ import annotations

import html
from functools import partial
from urllib.parse import quote

from PIL import Image

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.web.model_imports import import_models
from ldm.web.run_folder import RunFolder, RunState
from ldm.web.run_progress import RunProgress, read_progress

THUMBNAIL, THUMBNAIL_SIZE = "thumbnail.png", 160
LONG = 90  # seconds from which a time is given in minutes
PREVIEWS = "The photos, and the same prompts before, during and after training"
INTERRUPTED = 'the training ended without a word; "Go on" continues it'


def title_of(run: RunFolder) -> str:
    """Return the title of a run; its folder's name if its settings are damaged."""
    try:
        return run.read_settings().title
    except UserError:
        return run.name


def describe_run(run: RunFolder, state: RunState) -> str:
    """Return the state of a run and its steps."""
    progress = read_progress(run)
    return f"{state.value}, step {progress.step} of {progress.steps}" if progress.steps else state.value


def thumbnail_of(run: RunFolder) -> str | Image.Image:
    """Return the path of a small image of the run's first photo, made once; something gray if there is none."""
    path = run.path / THUMBNAIL
    if path.is_file():
        return str(path)
    try:
        import_models()
        from ldm.data.images import crop_square, list_images, read_image

        image = crop_square(read_image(list_images(run.photos)[0]), THUMBNAIL_SIZE)
        return str(write_atomically(path, partial(image.save, format="PNG")))
    except UserError:  # the photos are gone, or the disk is full
        return Image.new("RGB", (32, 32), "gray")


def status_of(run: RunFolder, state: RunState, progress: RunProgress) -> str:
    """Return the state, a bar, and the time left or the error as HTML. All texts of users are escaped."""
    lines = [f"<b>{html.escape(title_of(run))}</b>{_word_of(run)}: {state.value}"]
    if progress.steps:
        lines.append(f'<progress value="{progress.step}" max="{progress.steps}" style="width: 100%" '
                     f'aria-label="progress of the training"></progress>step {progress.step} of {progress.steps}')
    if state is RunState.RUNNING and progress.seconds_left is not None:
        lines.append(f"about {_duration(progress.seconds_left)} left")
    if state is RunState.FAILED:
        lines.append(html.escape(run.error()))
    if state is RunState.INTERRUPTED:
        lines.append(INTERRUPTED)
    return "<br>".join(lines)


def previews_of(progress: RunProgress) -> str:
    """Return the sheet of previews as HTML: an image that opens in full size; "" if there is none yet."""
    if progress.previews is None:
        return ""
    changed = progress.previews.stat().st_mtime_ns
    address = html.escape(f"gradio_api/file={quote(str(progress.previews))}?changed={changed}")
    return f'<a href="{address}" target="_blank"><img src="{address}" alt="{PREVIEWS}"></a>'


def _word_of(run: RunFolder) -> str:
    try:
        return f" as <code>{html.escape(run.read_settings().placeholder)}</code>"
    except UserError:
        return ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < LONG else f"{seconds / 60:.0f} min"
