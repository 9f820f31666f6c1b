"""Drawing by the script that a test module names."""
from __future__ import annotations

from pathlib import Path

import pytest
from helpers.image_world import Draw, Main, World, drawer


@pytest.fixture
def draw(main: Main, world: World, tmp_path: Path) -> Draw:
    """Runs the script whose `main` a test module gives."""
    return drawer(main, world.config, tmp_path)
