"""A fixture that generates images by the script of a test module."""
from __future__ import annotations

from pathlib import Path

import pytest
from helpers.model_files import Generate, Main, ModelFiles, script_generator


@pytest.fixture
def generate(main: Main, model_files: ModelFiles, tmp_path: Path) -> Generate:
    """Run the script whose `main` the fixture `main` of a test module returns."""
    return script_generator(main, model_files.config, tmp_path)
