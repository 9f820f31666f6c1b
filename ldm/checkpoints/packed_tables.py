"""Pack large token-embedding tables of which few rows were trained, and unpack them."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.common.errors import UserError

# How the tensors of a packed table are called in files: the trained rows, their indices, the row in place of all
# others, and the number of rows.
PARTS = ("rows", "row_numbers", "rest", "size")


def pack_table(name: str, table: Tensor, used: Tensor) -> dict[str, Tensor]:
    """Return the tensors to store for `table` (V, d), of which only the rows with indices `used` were trained.

    All other rows become one row: the one that they have in common, or else the mean of the trained rows.
    """
    used = used.unique()
    unused = torch.ones(len(table), dtype=torch.bool).index_fill(0, used, False)
    all_equal = len(table[unused]) > 0 and bool((table[unused] == table[unused][:1]).all())
    rest = table[unused][0] if all_equal else table[used].float().mean(0).to(table.dtype)
    stored = (table[used], used, rest, torch.tensor(len(table)))
    return {f"{name}.{part}": value for part, value in zip(PARTS, stored, strict=True)}


def unpack_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors with every packed table complete again.

    Raises:
        UserError: if the tensors of a packed table are incomplete or contradictory.
    """
    packed = {key.removesuffix(".row_numbers") for key in tensors if key.endswith(".row_numbers")}
    unpacked = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in packed}
    for name in packed:
        unpacked[name] = _unpack_table(name, tensors)
    return unpacked


def _unpack_table(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    missing = [part for part in PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise UserError(f"packed token table {name} has no {', '.join(missing)}; copy or make the file again")
    rows, indices, rest, size = (tensors[f"{name}.{part}"] for part in PARTS)
    consistent = size.ndim == 0 and indices.ndim == rest.ndim == 1 and rows.shape == (len(indices), len(rest))
    if not consistent or (len(indices) and not 0 <= indices.min() <= indices.max() < size):
        raise UserError(f"packed token table {name}: its tensors do not fit together; copy or make the file again")
    table = rest.repeat(int(size), 1)
    table[indices] = rows
    return table
