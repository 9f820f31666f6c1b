"""The list of runs on the page, and the one that is chosen: its progress, its results, and what can be done with it."""
from __future__ import annotations

from typing import Any

import gradio as gr

from ldm.common.errors import UserError
from ldm.web.choice import choice
from ldm.web.events import OWN, QUIET
from ldm.web.messages import user_errors
from ldm.web.run_folder import RunFolder, RunState
from ldm.web.run_progress import read_progress
from ldm.web.run_view import describe_run, previews_of, status_of, thumbnail_of, title_of
from ldm.web.site import Site

REFRESH_SECONDS = 2
LINES_OF_LOG = 12
CAN_STOP = (RunState.RUNNING, RunState.WAITING)
CAN_GO_ON = (RunState.STOPPED, RunState.INTERRUPTED, RunState.FAILED)


class RunList:
    """Builds the list inside of an open `gr.Blocks`.

    Args:
        site: what all tabs share.

    Attributes:
        chosen: the dropdown whose value is the name of the chosen run.
        inputs: the components whose values `refresh` takes.
        outputs: the components that `refresh` returns values for.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    def build(self) -> None:
        """Add the components and their events."""
        gr.Markdown("### Your concepts")
        self.thumbnails = gr.Gallery(label="Your concepts", show_label=False, columns=4, height="auto", buttons=[],
                                     allow_preview=False, object_fit="cover", elem_id="thumbnails", visible=False)
        self.names, self.shown_list, self.shown_run = gr.State([]), gr.State(""), gr.State("")
        self.chosen = choice(label="Show")
        self.status = gr.HTML(elem_id="run-status")
        self.plot = gr.LinePlot(x="step", y="loss", height=170, visible=False, x_title="step", y_title="loss",
                                label="Loss", show_label=False)
        self.previews = gr.HTML(elem_id="previews")
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", min_width=80)
            self.resume = gr.Button("Go on", size="sm", min_width=80)
            self.download = gr.DownloadButton("Concept file", size="sm", visible=False, min_width=80)
            self.delete = gr.Button("Delete", size="sm", variant="stop", min_width=80)
        with gr.Row(visible=False) as self.confirmation:
            gr.Markdown("Delete this run with its photos and its concept?")
            self.delete_for_good = gr.Button("Delete for good", size="sm", variant="stop", min_width=80)
            self.keep = gr.Button("Keep it", size="sm", min_width=80)
        with gr.Row(elem_classes="beside"):
            self.new_title = gr.Textbox(label="Name", max_lines=1, scale=3, min_width=140)
            self.rename = gr.Button("Rename", size="sm", scale=1, min_width=80)
        with gr.Accordion("Log", open=False):
            self.log = gr.Textbox(label="Log", show_label=False, lines=LINES_OF_LOG, interactive=False)
        self.inputs = [self.chosen, self.shown_list, self.shown_run]
        self.outputs = [self.shown_list, self.shown_run, self.thumbnails, self.names, self.chosen, self.status,
                        self.plot, self.previews, self.stop, self.resume, self.delete, self.download, self.log]
        self._connect()

    def _connect(self) -> None:
        refresh = (self.refresh, self.inputs, self.outputs)
        gr.Timer(REFRESH_SECONDS).tick(*refresh, **QUIET)
        self.chosen.change(*refresh, **QUIET).then(self.read_title, [self.chosen], [self.new_title], **QUIET)
        self.thumbnails.select(self.choose, [self.names], [self.chosen], **QUIET)
        self.stop.click(self.stop_run, [self.chosen], [], **QUIET).then(*refresh, **QUIET)
        self.resume.click(self.resume_run, [self.chosen], [], **QUIET).then(*refresh, **QUIET)
        self.rename.click(self.rename_run, [self.chosen, self.new_title], [], **QUIET).then(*refresh, **QUIET)
        self.delete.click(lambda: gr.Row(visible=True), [], [self.confirmation], **QUIET)
        gr.on([self.keep.click, self.delete_for_good.click, self.chosen.change], lambda: gr.Row(visible=False), [],
              [self.confirmation], **QUIET)
        self.delete_for_good.click(self.delete_run, [self.chosen], [], **OWN).then(*refresh, **QUIET)

    # Showing

    def refresh(self, chosen: str | None, shown_list: str, shown_run: str) -> tuple[Any, ...]:
        """Return the list of runs and the state of the chosen one; nothing for what is shown already.

        Args:
            chosen: name of the chosen run; if it is gone, the newest one is chosen.
            shown_list: what the list shows, as this returned it before.
            shown_run: what is shown of the chosen run, likewise.
        """
        runs = self.site.queue.prepared_runs()
        names = [run.name for run in runs]
        if chosen not in names:
            chosen = names[0] if names else None
        choices = [(f"{title_of(run)}: {describe_run(run, self.site.queue.state(run))}", run.name) for run in runs]
        listed = repr((choices, chosen))
        items = (gr.skip(), gr.skip(), gr.skip())
        if listed != shown_list:
            # The captions change with every step, the thumbnails do not.
            images = [(thumbnail_of(run), title_of(run)) for run in runs]
            items = gr.Gallery(images, visible=bool(images)), names, gr.Dropdown(choices=choices, value=chosen)
        described = repr(_signature(self.site.queue.run(chosen), self.site.queue.state(self.site.queue.run(chosen)))
                         if chosen else None)
        details = (gr.skip(),) * 8
        if described != shown_run:
            details = self._show(self.site.queue.run(chosen)) if chosen else _nothing()
        return listed, described, *items, *details

    def _show(self, run: RunFolder) -> tuple[Any, ...]:
        import pandas as pd

        progress, state = read_progress(run), self.site.queue.state(run)
        losses = pd.DataFrame(progress.losses, columns=["step", "loss"])
        return (status_of(run, state, progress), gr.LinePlot(losses, visible=len(losses) > 1),
                previews_of(progress),
                gr.Button(interactive=state in CAN_STOP), gr.Button(interactive=state in CAN_GO_ON),
                gr.Button(interactive=state is not RunState.RUNNING),
                gr.DownloadButton(value=None if run.concept is None else str(run.concept),
                                  visible=run.concept is not None),
                "\n".join(run.log_tail(LINES_OF_LOG)))

    def read_title(self, name: str | None) -> str:
        """Return the title of a run."""
        try:
            return title_of(self.site.queue.run(name)) if name else ""
        except UserError:
            return ""

    def choose(self, names: list[str], event: gr.SelectData) -> Any:
        """Return the name of the run whose thumbnail was clicked."""
        return names[event.index] if event.index < len(names) else gr.skip()

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


def _signature(run: RunFolder, state: RunState) -> tuple[Any, ...]:
    """Return what changes whenever something that is shown of a run changes."""
    progress = read_progress(run)
    written = None if progress.previews is None else progress.previews.stat().st_mtime_ns
    return run.name, title_of(run), state, progress.step, written, run.concept, run.log_tail(LINES_OF_LOG)


def _nothing() -> tuple[Any, ...]:
    off = gr.Button(interactive=False)
    return ("No concept yet: add photos and press Teach.", gr.LinePlot(visible=False), "", off,
            off, off, gr.DownloadButton(visible=False), "")
