"""Read CLIP models from folders in the layout of open_clip (Ilharco et al., OpenCLIP)."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import open_clip

from ldm.modules.encoders.openclip_activation import check_activation
from ldm.modules.encoders.vocabulary import load_packed

SETTINGS = "open_clip_config.json"


@contextlib.contextmanager
def silence_logging() -> Iterator[None]:
    """Log nothing within this context.

    `open_clip` logs every step on the root logger, and warns about a model without weights before it can get any.
    Errors are raised as well, so nothing is lost.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)


def load_openclip(folder: str | Path) -> open_clip.CLIP:
    """Load the CLIP of a folder in open_clip's layout, in float32. Packed embedding tables are unpacked.

    Raises:
        UserError: if its weights are incomplete, or do not fit the model that its settings describe, or need another
            activation than these give it.
        ValueError, OSError: if `open_clip` cannot read the settings.
    """
    check_activation(folder, SETTINGS)
    with silence_logging():
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    load_packed(model, folder, SETTINGS)
    return model
