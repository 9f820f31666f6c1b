"""The list of runs on the page, and the one that is chosen: its progress, its results, and what can be done with it."""
from __future__ import annotations

import html
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from ldm.common.errors import UserError
from ldm.data.images import scan_folder
from ldm.web.messages import user_errors
from ldm.web.run_folder import RunFolder, RunSettings, RunState
from ldm.web.run_progress import RunProgress, read_progress
from ldm.web.site import Site

REFRESH_SECONDS = 2
LINES_OF_LOG = 12
ACTIVE = (RunState.RUNNING, RunState.WAITING)


class RunList:
    """Builds the list inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.

    Attributes:
        chosen: the dropdown whose value is the name of the chosen run.
        outputs: the components that `refresh` returns values for.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    def build(self) -> None:
        """Add the components and their events."""
        self.thumbnails = gr.Gallery(label="Your concepts", columns=5, height=150, allow_preview=False, buttons=[],
                                     object_fit="cover")
        self.names = gr.State([])
        self.chosen = gr.Dropdown(label="Show", choices=[], interactive=True)
        self.status = gr.HTML(elem_id="run-status")
        self.plot = gr.LinePlot(x="step", y="loss", height=170, visible=False, x_title="step", y_title="loss")
        self.previews = gr.Image(label="Before, during and after training", interactive=False, buttons=["download"],
                                 height=420, visible=False)
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm")
            self.resume = gr.Button("Go on", size="sm")
            self.delete = gr.Button("Delete", size="sm", variant="stop")
            self.download = gr.DownloadButton("Concept file", size="sm", visible=False)
        with gr.Row():
            self.new_title = gr.Textbox(label="Name", max_lines=1, scale=3)
            self.rename = gr.Button("Rename", size="sm", scale=1)
        with gr.Accordion("Log", open=False):
            self.log = gr.Textbox(show_label=False, lines=LINES_OF_LOG, interactive=False)
        self.outputs = [self.thumbnails, self.names, self.chosen, self.status, self.plot, self.previews, self.stop,
                        self.resume, self.delete, self.download, self.log]
        self._connect()

    def _connect(self) -> None:
        timer = gr.Timer(REFRESH_SECONDS)
        timer.tick(self.refresh, [self.chosen], self.outputs, show_progress="hidden", api_visibility="private")
        self.chosen.change(self.refresh, [self.chosen], self.outputs, show_progress="hidden").then(
            self.title_of, [self.chosen], [self.new_title])
        self.thumbnails.select(self.choose, [self.names], [self.chosen])
        self.stop.click(self.stop_run, [self.chosen], []).then(self.refresh, [self.chosen], self.outputs)
        self.resume.click(self.resume_run, [self.chosen], []).then(self.refresh, [self.chosen], self.outputs)
        self.delete.click(self.delete_run, [self.chosen], []).then(self.refresh, [self.chosen], self.outputs)
        self.rename.click(self.rename_run, [self.chosen, self.new_title], []).then(
            self.refresh, [self.chosen], self.outputs)

    # Showing

    def refresh(self, chosen: str | None) -> tuple[Any, ...]:
        """Return the list of runs and the state of the chosen one."""
        runs = [run for run in self.site.queue.runs() if (run.path / "run.json").is_file()]
        names = [run.name for run in runs]
        if chosen not in names:
            chosen = names[0] if names else None
        choices, images = [], []
        for run in runs:
            label = f"{_title(run)}: {self._describe(run)}"
            choices.append((label, run.name))
            images.append((_thumbnail(run), label))
        shown = self._show(self.site.queue.run(chosen)) if chosen else _nothing()
        return images, names, gr.Dropdown(choices=choices, value=chosen), *shown

    def _show(self, run: RunFolder) -> tuple[Any, ...]:
        progress, state = read_progress(run), self.site.queue.state(run)
        losses = pd.DataFrame(progress.losses, columns=["step", "loss"])
        can_go_on = state in (RunState.STOPPED, RunState.INTERRUPTED, RunState.FAILED)
        has_previews = progress.previews is not None
        return (_status(run, state, progress), gr.LinePlot(losses, visible=len(losses) > 1),
                gr.Image(str(progress.previews) if has_previews else None, visible=has_previews),
                gr.Button(interactive=state in ACTIVE), gr.Button(interactive=can_go_on),
                gr.Button(interactive=state is not RunState.RUNNING),
                gr.DownloadButton(value=None if run.concept is None else str(run.concept),
                                  visible=run.concept is not None),
                "\n".join(run.log_tail(LINES_OF_LOG)))

    def _describe(self, run: RunFolder) -> str:
        state = self.site.queue.state(run)
        progress = read_progress(run)
        return f"{state.value}, step {progress.step} of {progress.steps}" if progress.steps else state.value

    def title_of(self, name: str | None) -> str:
        """Return the title of a run."""
        return _title(self.site.queue.run(name)) if name else ""

    def choose(self, names: list[str], event: gr.SelectData) -> str:
        """Return the name of the run whose thumbnail was clicked."""
        return names[event.index]

    # Acting

    @user_errors
    def stop_run(self, name: str | None) -> None:
        """Stop a run; what it has learned is saved."""
        self.site.queue.stop(self._required(name))

    @user_errors
    def resume_run(self, name: str | None) -> None:
        """Put a stopped run into the queue again."""
        self.site.queue.enqueue(self._required(name))

    @user_errors
    def delete_run(self, name: str | None) -> None:
        """Delete a run."""
        self.site.queue.delete(self._required(name))

    @user_errors
    def rename_run(self, name: str | None, title: str) -> None:
        """Change the title of a run."""
        self._required(name).rename(title)

    def _required(self, name: str | None) -> RunFolder:
        if not name:
            raise UserError("no run is chosen; choose one in the list")
        return self.site.queue.run(name)


def _title(run: RunFolder) -> str:
    settings = _settings(run)
    return run.name if settings is None else settings.title


def _settings(run: RunFolder) -> RunSettings | None:
    try:
        return run.read_settings()
    except UserError:
        return None


def _thumbnail(run: RunFolder) -> Image.Image | str:
    """Return the path of the run's first photo."""
    try:
        images = scan_folder(run.photos).images
    except UserError:
        images = ()
    return str(images[0]) if images else Image.new("RGB", (32, 32), "gray")


def _status(run: RunFolder, state: RunState, progress: RunProgress) -> str:
    """Return the state, a bar, and the time left or the error as HTML. All texts of users are escaped."""
    settings = _settings(run)
    words = "" if settings is None else f" as <code>{html.escape(settings.placeholder)}</code>"
    lines = [f"<b>{html.escape(_title(run))}</b>{words}: {state.value}"]
    if progress.steps:
        lines.append(f'<progress value="{progress.step}" max="{progress.steps}" style="width: 100%" '
                     f'aria-label="training steps"></progress>step {progress.step} of {progress.steps}')
    if state is RunState.RUNNING and progress.seconds_left is not None:
        lines.append(f"about {_duration(progress.seconds_left)} left")
    if state is RunState.FAILED:
        lines.append(html.escape(run.error()))
    if state is RunState.INTERRUPTED:
        lines.append('the training ended without a word; "Go on" continues it')
    return "<br>".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _nothing() -> tuple[Any, ...]:
    off = gr.Button(interactive=False)
    return ("No concept yet: add photos and press Teach.", gr.LinePlot(visible=False), gr.Image(visible=False), off,
            off, off, gr.DownloadButton(visible=False), "")
