"""What the device is, how fast it multiplies matrices, and how much memory a piece of work takes on it."""
from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.benchmarks.common import Settings, repeated

MATRIX_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 2048}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_THE_PEAK = "5"  # what `clear_refs` takes for it, see proc(5)


def wait(device: torch.device) -> None:
    """Until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def precision(device: torch.device) -> torch.dtype:
    """What the matrices of a step are multiplied in: 16 bits where that is fast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def matrix_rate(device: torch.device, rounds: int = 5) -> float:
    """Floating-point operations a second in the product of two large matrices in the precision of a step.

    The fastest round counts: a device's rate is what it reaches undisturbed.
    """
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=precision(device)) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)
        wait(device)

    return 2 * side**3 / min(repeated(multiply, rounds))


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures belong to, for the results file."""
    device = settings.device
    return {"device": device_name(device), "kind": device.type, "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity") else os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "precision": str(precision(device)).removeprefix("torch."), "shape": settings.shape.name,
            "quick": settings.quick, "compile": settings.compile, "rounds": settings.rounds,
            "date": datetime.datetime.now().isoformat(timespec="seconds")}


def device_name(device: torch.device) -> str:
    """The name that its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", described.read_text()) if described.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free now; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    described = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", described.read_text()) if described.is_file() else None
    return int(found[1]) * 1024 if found else None


def bytes_of(holders: Iterable[nn.Module | torch.optim.Optimizer | Tensor]) -> int:
    """What modules, tensors and optimisers' states take up together, memory that several share counted once."""
    storages = {}
    for holder in holders:
        for tensor in _tensors(holder):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(holder: nn.Module | torch.optim.Optimizer | Tensor) -> Iterable[Tensor]:
    if isinstance(holder, Tensor):
        return [holder]
    if isinstance(holder, nn.Module):
        return [*holder.parameters(), *holder.buffers()]
    return [value for state in holder.state.values() for value in state.values() if isinstance(value, Tensor)]


@dataclass
class MemoryWatch:
    """The most memory that a piece of work took beyond what was there before it.

    On CUDA what tensors take; on a CPU under Linux the process's pages. Elsewhere there is no such figure.
    """

    device: torch.device

    @property
    def works(self) -> bool:
        return self.device.type == "cuda" or (self.device.type == "cpu" and os.access(CLEAR, os.W_OK))

    def during(self, work: Callable[[], object]) -> int | None:
        """Bytes; None where they cannot be told."""
        if not self.works:
            work()
            return None
        before = self._start()
        work()
        wait(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")
        return max(0, peak - before)

    def _start(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what has been freed would hide what is taken
        if trim is not None:
            trim(0)
        CLEAR.write_text(FORGET_THE_PEAK)
        return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text())
    return int(found[1]) * 1024 if found else 0
