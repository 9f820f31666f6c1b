"""Write the checkpoints of a run, each complete or not at all."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io import TorchCheckpointIO

from ldm.common.atomic_write import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their final names, then rename them.

    Lightning writes them in the system's temporary folder, which may be smaller than the disk of the log folder, and
    then moves them, which is not atomic between two disks.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            FileNotWritten: (a UserError) the disk is full or does not allow it. An older file of that name stays.
        """
        path = Path(path)
        if path.is_symlink() and path.resolve().parent == path.parent.resolve():
            path.unlink()  # Lightning's last.ckpt with `save_last: link`; it must not overwrite the checkpoint it names
        write_atomically(path, lambda temporary: _save(checkpoint, temporary))


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write with `torch.save`. Raise OSError, and not torch's RuntimeError about positions, if the system fails."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause = error.__context__
        raise (cause if isinstance(cause, OSError) else error) from None
