"""Drawing by the script that a test module names."""
from __future__ import annotations

from pathlib import Path

import pytest
from helpers.model_files import Generate, Main, ModelFiles, script_generator


@pytest.fixture
def generate(main: Main, model_files: ModelFiles, tmp_path: Path) -> Generate:
    """Runs the script whose `main` a test module gives."""
    return script_generator(main, model_files.config, tmp_path)
