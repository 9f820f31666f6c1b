"""Load pretrained text towers whose word table may be packed, that is, stored without the rows never trained.

See `ldm.checkpoints.packed_tables` for the format. Readers always get a whole table.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ldm.checkpoints.packed_tables import unpack_tables
from ldm.common.errors import UserError, brief_reason
from ldm.common.file_formats import check_not_foreign
from ldm.common.files import load_tensors


def load_pretrained(cls: Any, path: str | Path) -> Any:
    """Call `cls.from_pretrained(path)`, with packed tables unpacked and parameters in float32.

    Args:
        cls: a model class of `transformers`.
        path: a folder, or the name of a model on the hub.

    Raises:
        UserError: if the weights are cut off, or some that the model needs are missing.
        OSError, ValueError: from `transformers`, if there is no such model.
    """
    file = Path(path) / "model.safetensors"
    if file.is_file():
        stored = unpack_tables(load_tensors(file)[0])
        state = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
        config = cls.config_class.from_pretrained(path)
        with no_progress_bar():
            model, report = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    else:
        for weights in Path(path).glob("*.bin"):
            check_not_foreign(weights)
        model, report = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers and go on
        raise UserError(f"{path}: has no weights for {missing[0]} ({len(missing)} missing); copy or download it again")
    return model


def load_packed(model: nn.Module, folder: str | Path, settings: str) -> None:
    """Load the weights of a folder into a model, with packed tables unpacked.

    Args:
        settings: name of the file that the model was built from, for the error message.

    Raises:
        UserError: if the weights are cut off, or do not fit the model.
    """
    try:
        model.load_state_dict(unpack_tables(load_tensors(Path(folder) / "model.safetensors")[0]))
    except RuntimeError as error:
        reason = brief_reason(error)
        raise UserError(f"{folder}: its weights do not fit its {settings} ({reason}); copy it again") from None


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide the progress bar of `transformers`: tensors that are in memory load at once."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
