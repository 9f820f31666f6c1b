"""Settings that hold for every test, and the world that what draws is tried in."""
from __future__ import annotations

import logging
import os
import random

from ldm.common.threads import use_passive_waiting

use_passive_waiting()  # before torch is imported

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.model_files import ModelFiles, write_model_files  # noqa: E402
from hypothesis import settings  # noqa: E402

from ldm.common.errors import set_log_level  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: it then runs on the CPU, number by number

# A first example pays for imports and caches, and machines are shared: time says nothing about correctness here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def seeded_module() -> None:
    """What is drawn for all tests of a file does not depend on the tests before them."""
    _seed()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Nor does what a test draws: it passes alone where it passes among others, and always."""
    _seed()


@pytest.fixture(autouse=True)
def nothing_told_by_the_way() -> None:
    """A command that a test or a fixture runs in this process has its loggers tell more, for good."""
    set_log_level(logging.NOTSET)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_model_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_model_files(tmp_path_factory.mktemp("world"))


@pytest.fixture
def model_files(shared_model_files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    """Its files, and its cache in use."""
    monkeypatch.setenv("PERFUSION_CACHE", str(shared_model_files.folder / "cache"))
    return shared_model_files
