"""Word tables of text encoders that were trained on few words, stored without the rows that training never touched.

A table `X.weight` (V, d) is kept in a file as `X.weight.rows` (k, d), `X.weight.row_numbers` (k,), `X.weight.rest`
(d,), the one row that stands for all other words, and `X.weight.size` (). Whoever reads the file gets a whole table.
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
from ldm.common.errors import UserError
from ldm.common.files import load_tensors


def load_pretrained(cls: Any, path: str | Path) -> Any:
    """`cls.from_pretrained(path)` for a folder or a hub name, packed tables unpacked; parameters in float32.

    Raises:
        UserError: weights are cut off, or some that the model needs are missing.
        OSError, ValueError: what `transformers` raises where there is no such model.
    """
    file = Path(path) / "model.safetensors"
    if file.is_file():
        stored = unpack_tables(load_tensors(file)[0])
        whole = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
        config = cls.config_class.from_pretrained(path)
        with _without_bars():
            model, report = cls.from_pretrained(None, config=config, state_dict=whole, output_loading_info=True)
    else:
        model, report = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers and go on
        raise UserError(f"{path}: has no weights for {missing[0]} ({len(missing)} missing); copy or download it again")
    return model


def load_packed(model: nn.Module, folder: str | Path, settings: str) -> None:
    """Gives a model the weights in a folder, packed tables unpacked; `settings` is the file that the model is built by.

    Raises:
        UserError: they are cut off, or are not those of this model.
    """
    try:
        model.load_state_dict(unpack_tables(load_tensors(Path(folder) / "model.safetensors")[0]))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its weights do not fit its {settings} ({reason}); copy it again") from None


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """`transformers` shows no progress bar while this lasts: tensors that are in memory take no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
