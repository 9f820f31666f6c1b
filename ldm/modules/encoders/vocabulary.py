"""Word tables of text encoders that were trained on few words, stored without the rows that training never touched.

A table `X.weight` (V, d) is kept in a file as `X.weight.rows` (k, d), `X.weight.row_numbers` (k,), `X.weight.rest`
(d,), the one row that stands for all other words, and `X.weight.size` (). Whoever reads the file gets a whole table.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ldm.errors import UserError
from ldm.files import load_tensors

PARTS = ("rows", "row_numbers", "rest", "size")


def pack_table(name: str, table: Tensor, used: Tensor) -> dict[str, Tensor]:
    """The parts to store of `table` (V, d), of which only the rows `used` were trained.

    All others become one row: the one that they have in common already, or else the mean of those in use.
    """
    used = used.unique()
    others = torch.ones(len(table), dtype=torch.bool).index_fill(0, used, False)
    common = len(table[others]) > 0 and bool((table[others] == table[others][:1]).all())
    rest = table[others][0] if common else table[used].float().mean(0).to(table.dtype)
    parts = (table[used], used, rest, torch.tensor(len(table)))
    return {f"{name}.{part}": value for part, value in zip(PARTS, parts, strict=True)}


def unpack_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, every packed table whole again.

    Raises:
        UserError: a table's parts are incomplete or disagree.
    """
    packed = {key.removesuffix(".row_numbers") for key in tensors if key.endswith(".row_numbers")}
    whole = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in packed}
    return whole | {name: _unpacked(name, tensors) for name in packed}


def _unpacked(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    absent = [part for part in PARTS if f"{name}.{part}" not in tensors]
    if absent:
        raise UserError(f"packed word table {name} has no {', '.join(absent)}; copy or make the file again")
    rows, numbers, rest, size = (tensors[f"{name}.{part}"] for part in PARTS)
    fits = size.ndim == 0 and numbers.ndim == rest.ndim == 1 and rows.shape == (len(numbers), len(rest))
    if not fits or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < size):
        raise UserError(f"packed word table {name}: its parts do not fit together; copy or make the file again")
    table = rest.repeat(int(size), 1)
    table[numbers] = rows
    return table


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
