"""Callbacks that act on the process: Ctrl-C, and what Lightning sets for all of torch."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ldm.training.callbacks import StopAfterStep
from ldm.training.trainer import restored_torch_settings

TRAINER = SimpleNamespace(global_step=3)


@pytest.fixture(autouse=True)
def restore_handler() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_is_handled_once_in_the_main_thread() -> None:
    before, callback = signal.getsignal(signal.SIGINT), StopAfterStep()
    callback.on_train_start(TRAINER, None)
    assert signal.getsignal(signal.SIGINT) is not before
    signal.raise_signal(signal.SIGINT)
    assert callback.last_step == 3 and signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_ctrl_c_alone() -> None:
    before, callback, errors = signal.getsignal(signal.SIGINT), StopAfterStep(), []

    def start_training() -> None:
        try:
            callback.on_train_start(TRAINER, None)
        except ValueError as error:  # "signal only works in main thread of the main interpreter"
            errors.append(error)

    thread = threading.Thread(target=start_training)
    thread.start()
    thread.join()
    assert not errors and signal.getsignal(signal.SIGINT) is before


def test_an_exception_gives_ctrl_c_back() -> None:
    before, callback = signal.getsignal(signal.SIGINT), StopAfterStep()
    callback.on_train_start(TRAINER, None)
    callback.on_exception(TRAINER, None, RuntimeError())
    assert signal.getsignal(signal.SIGINT) is before


def test_settings_of_torch_are_restored_after_a_run() -> None:
    with pytest.raises(KeyError), restored_torch_settings():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
