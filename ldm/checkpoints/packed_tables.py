"""Pack large token-embedding tables of which few rows were ever trained, and unpack them."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.common.errors import UserError

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
