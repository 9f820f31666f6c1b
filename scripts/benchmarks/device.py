"""Describe the device, and measure its rate of matrix products and the memory that a function takes on it."""
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

from scripts.benchmarks.common import BenchmarkSettings, time_calls

MATRIX_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 2048}
PROCESS_STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # resets the peak memory when written to `clear_refs`, see proc(5)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a step's matrix products: 16 bits on CUDA."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that autocasts to bfloat16 on CUDA and does nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def matrix_rate(device: torch.device, rounds: int = 5) -> float:
    """Measure the floating-point operations per second of the product of two large matrices.

    The fastest round counts, because it is the least disturbed one.
    """
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=compute_dtype(device)) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)
        synchronize(device)

    return 2 * side**3 / min(time_calls(multiply, rounds))


def describe_benchmark(settings: BenchmarkSettings) -> dict[str, Any]:
    """Return the machine, the versions and the settings that the results belong to."""
    device = settings.device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device_name(device),
        "kind": device.type,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "precision": str(compute_dtype(device)).removeprefix("torch."),
        "shape": settings.shape.name,
        "quick": settings.quick,
        "compile": settings.compile,
        "rounds": settings.rounds,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Return the product name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", file.read_text()) if file.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Return the free memory in bytes; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s*(\d+) kB", file.read_text()) if file.is_file() else None
    return int(match[1]) * 1024 if match else None


def memory_of(objects: Iterable[nn.Module | torch.optim.Optimizer | Tensor]) -> int:
    """Return the bytes of all tensors of modules and optimizers; memory that several share counts once."""
    sizes = {}
    for item in objects:
        for tensor in _tensors_of(item):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors_of(item: nn.Module | torch.optim.Optimizer | Tensor) -> Iterable[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, nn.Module):
        return [*item.parameters(), *item.buffers()]
    return [value for state in item.state.values() for value in state.values() if isinstance(value, Tensor)]


@dataclass
class PeakMemory:
    """Measure the peak memory of a function, relative to the memory in use before it.

    On CUDA, this is the memory of tensors. On a CPU under Linux, it is the resident memory of the process. Other
    systems are not supported.
    """

    device: torch.device

    @property
    def is_supported(self) -> bool:
        return self.device.type == "cuda" or (self.device.type == "cpu" and os.access(CLEAR_REFS, os.W_OK))

    def measure(self, function: Callable[[], object]) -> int | None:
        """Call the function and return its peak memory in bytes; None if that is not supported."""
        if not self.is_supported:
            function()
            return None
        before = self._reset()
        function()
        synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _process_memory("VmHWM")
        return max(0, peak - before)

    def _reset(self) -> int:
        """Reset the peak and return the memory in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        gc.collect()
        # Return freed memory to the system: the function would reuse it unnoticed.
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
        CLEAR_REFS.write_text(RESET_PEAK)
        return _process_memory("VmRSS")


def _process_memory(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    match = re.search(rf"{name}:\s*(\d+) kB", PROCESS_STATUS.read_text())
    return int(match[1]) * 1024 if match else 0
