"""Fixtures and settings for all tests."""
from __future__ import annotations

import logging
import os
import random

from ldm.common.threads import use_passive_waiting

use_passive_waiting()  # before torch is imported
# Test processes that run side by side share the cores, also among the commands that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.model_files import ModelFiles, write_model_files  # noqa: E402
from hypothesis import settings  # noqa: E402

from ldm.common.errors import set_log_level  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: it then runs on the CPU

# The first example of a test includes imports and caching, and machines are shared, so there is no deadline.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def seeded_module() -> None:
    """Seed all generators, so that fixtures of a module do not depend on the tests before them."""
    _seed()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed all generators, so that a test does not depend on the tests before it."""
    _seed()


@pytest.fixture(autouse=True)
def reset_log_level() -> None:
    """Undo the log level that a command sets when a test or a fixture runs it in this process."""
    set_log_level(logging.NOTSET)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_model_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """The files of a tiny model and two concepts, written once."""
    return write_model_files(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model_files(shared_model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    """The files of a tiny model and two concepts, with their cache in use."""
    monkeypatch.setenv("PERFUSION_CACHE", str(shared_model_files.folder / "cache"))
    return shared_model_files
