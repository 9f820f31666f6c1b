"""The world that the drawing scripts are tried in, made once for all of them."""
from __future__ import annotations

from pathlib import Path

import pytest
from drawing_world import Draw, Main, World, drawer, make_world


@pytest.fixture(scope="session")
def drawing_world_files(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(drawing_world_files: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Its files, and its cache in use."""
    monkeypatch.setenv("PERFUSION_CACHE", str(drawing_world_files.folder / "cache"))
    return drawing_world_files


@pytest.fixture
def draw(main: Main, world: World, tmp_path: Path) -> Draw:
    """Runs the script whose `main` a test module gives."""
    return drawer(main, world.config, tmp_path)
