"""Apply a function to the parts of a data set in parallel."""
from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

log = logging.getLogger(__name__)


def parallel_data_prefetch(
    func: Callable[..., Any], data: Iterable[Any], n_proc: int, target_data_type: str = "ndarray",
    cpu_intensive: bool = True, use_worker_id: bool = False,
) -> Any:
    """Apply `func` to `n_proc` parts of `data` in parallel.

    Args:
        func: maps a part to its result; with `use_worker_id` it also gets `worker_id`, the index of the part.
        data: an array or an iterable; of a dict, the values.
        n_proc: number of parts, each with a process or thread of its own.
        target_data_type: "ndarray" to work on arrays, "list" to work on lists, or anything else for lists whose results
            are not joined.
        cpu_intensive: whether to use processes rather than threads.

    Returns:
        The results in the order of the parts: joined to one array along the first axis ("ndarray"), joined to one list
        ("list"), or a list with one result for each part.

    Raises:
        ValueError: if `data` is an array although a list is expected.
        TypeError: if `data` cannot be iterated over.
        RuntimeError: if `func` fails in a worker.
    """
    import numpy as np

    parts = _split(data, n_proc, target_data_type)
    results = _run_workers(func, parts, cpu_intensive, use_worker_id)
    if target_data_type == "ndarray":
        return np.concatenate([np.asarray(result) for result in results], axis=0)
    if target_data_type == "list":
        return [item for result in results for item in result]
    return results


def _split(data: Iterable[Any], count: int, target_data_type: str) -> Sequence[Any]:
    """Return at most `count` parts of the data, as arrays or as lists."""
    import numpy as np

    if not isinstance(data, Iterable):
        raise TypeError(f"data to prefetch must be an array or another iterable, not {type(data).__name__}")
    if isinstance(data, np.ndarray) and target_data_type == "list":
        raise ValueError("data to prefetch is an array, but target_data_type is list")
    if isinstance(data, dict):
        log.warning("data to prefetch is a dict: only its values are used")
        data = data.values()
    if target_data_type == "ndarray":
        return np.array_split(np.asarray(data if isinstance(data, np.ndarray) else list(data)), count)
    items = list(data)
    length = max(1, -(-len(items) // count))
    return [items[start : start + length] for start in range(0, len(items), length)]


def _run_workers(func: Callable[..., Any], parts: Sequence[Any], use_processes: bool, use_worker_id: bool
                 ) -> list[Any]:
    """Return the results of all parts in order. Each part has a worker of its own, which inherits `func`."""
    done: Any = multiprocessing.Queue() if use_processes else queue.Queue()
    make_worker: Any = multiprocessing.Process if use_processes else threading.Thread
    workers = [make_worker(target=_work, args=(func, part, index, use_worker_id, done), daemon=True)
               for index, part in enumerate(parts)]
    for worker in workers:
        worker.start()
    results: dict[int, Any] = {}
    try:
        for _ in workers:
            index, result, failure = done.get()
            if failure is not None:
                raise RuntimeError(f"worker {index} failed: {failure}")
            results[index] = result
    finally:
        if use_processes and len(results) < len(workers):
            for worker in workers:
                worker.terminate()
        for worker in workers:
            worker.join()
    return [results[index] for index in range(len(workers))]


def _work(func: Callable[..., Any], part: Any, index: int, use_worker_id: bool, done: Any) -> None:
    """Put the index, the result and the failure of one part into the queue `done`."""
    try:
        result = func(part, worker_id=index) if use_worker_id else func(part)
    except Exception as error:  # noqa: BLE001 - the parent process raises it
        done.put((index, None, f"{type(error).__name__}: {error}"))
    else:
        done.put((index, result, None))
