"""The box that shows a command, with a button that copies it."""
from __future__ import annotations

import gradio as gr


def command_box(name: str) -> gr.Code:
    """Return the box, hidden until there is a command.

    Args:
        name: its id in the page.
    """
    return gr.Code(label="The same in a terminal", language="shell", interactive=False, lines=1, max_lines=6,
                   wrap_lines=True, visible=False, elem_id=name)
