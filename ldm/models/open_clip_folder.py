"""Read CLIP models from folders in the layout of open_clip (Ilharco et al., OpenCLIP)."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import open_clip

from ldm.modules.encoders.vocabulary import load_packed

SETTINGS = "open_clip_config.json"


@contextlib.contextmanager
def silence_logging() -> Iterator[None]:
    """Nothing is logged while this lasts: what goes wrong is raised as well.

    `open_clip` tells on the root logger of every step, and warns of a model without weights before it can be given any.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def load_openclip(folder: str | Path) -> open_clip.CLIP:
    """The CLIP in a folder as `open_clip` keeps it, packed word tables unpacked; parameters in float32.

    Raises:
        UserError: its weights are cut off, or are not those of the model that its settings describe.
        ValueError, OSError: what `open_clip` raises for settings that it cannot read.
    """
    with silence_logging():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    load_packed(model, folder, SETTINGS)
    return model
