"""Read the tensors of checkpoints of any format, by content and not by suffix, without running any of their content."""
from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ldm.checkpoints.diffusers_folder import read_folder, under_own_names
from ldm.checkpoints.other_kinds import describe_unusable, identify_pickled
from ldm.checkpoints.packed_tables import unpack_tables
from ldm.checkpoints.pickled import read_pickled
from ldm.checkpoints.wrappings import strip_wrappers, unwrap_weights
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_format
from ldm.common.files import SAFETENSORS, load_tensors
from ldm.common.paths import resolve_path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint file or diffusers folder under CompVis's names, on the CPU.

    Dictionaries and prefixes that training tools wrap around weights are taken off. The tensors are memory-mapped if
    the format allows it: unused ones are not read.

    Raises:
        UserError: if the file is missing, incomplete, not a checkpoint, or holds objects whose code would have to run.
    """
    path = resolve_path(path)
    if path.is_dir():
        return read_folder(path, _read_file)
    return under_own_names(strip_wrappers(_read_file(path)))


def _read_file(path: Path) -> dict[str, Tensor]:
    found = check_format(path)
    if found is Format.SAFETENSORS or (found is Format.UNKNOWN and path.suffix.lower() == SAFETENSORS):
        return unpack_tables(load_tensors(path)[0])
    content = read_pickled(path)
    family = identify_pickled(content)
    if family is not None:
        raise UserError(f"{path}: {describe_unusable(family)}")
    weights = unwrap_weights(content, lambda value: isinstance(value, Tensor))
    if not weights:
        raise UserError(f"{path}: holds no weights; choose another file")
    return unpack_tables({key: value.detach() for key, value in weights.items()})
