"""Dropdowns whose choices change while the page is open."""
from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr


def choice(**options: Any) -> gr.Dropdown:
    """Return a dropdown that, at first, knows no choices but passes on what was chosen.

    A page that was started anew knows nothing of tabs that are open still, and other programs have not seen any
    choices. What is chosen is checked where it is used.

    Args:
        options: those of `gr.Dropdown`.
    """
    component = gr.Dropdown(choices=[], interactive=True, **options)
    component.preprocess = partial(_keep_texts, several=bool(component.multiselect))  # a class would need a stub file
    return component


def _keep_texts(value: Any, several: bool) -> str | list[str] | None:
    """Return the chosen text or texts; None or [] for anything else."""
    if several:
        return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []
    return value if isinstance(value, str) else None
