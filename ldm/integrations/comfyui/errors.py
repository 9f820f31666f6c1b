"""The error that the nodes raise for what a user can change."""
from __future__ import annotations


class PerfusionError(ValueError):
    """Bad input; the message names it and the remedy, and ComfyUI shows it at the node."""
