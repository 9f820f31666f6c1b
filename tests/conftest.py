"""Settings that hold for every test, and the world that what draws is tried in."""
from __future__ import annotations

import pytest
from drawing_world import World, make_world
from hypothesis import settings

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
