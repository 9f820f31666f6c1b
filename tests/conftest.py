"""Settings that hold for every test, and the world that what draws is tried in."""
from __future__ import annotations

import os

import pytest
import torch
from drawing_world import World, make_world
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: it then runs on the CPU, number by number

# A first example pays for imports and caches, and machines are shared: time says nothing about correctness here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def drawing_world_files(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(drawing_world_files: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Its files, and its cache in use."""
    monkeypatch.setenv("PERFUSION_CACHE", str(drawing_world_files.folder / "cache"))
    return drawing_world_files
