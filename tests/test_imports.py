"""Heavy libraries are imported only when needed: --help and bad flags are answered without torch."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import main
from ldm.data.module import DataModuleFromConfig
from ldm.modules.encoders import modules
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder
from ldm.training.callbacks import ImageLogger, SetupCallback
from ldm.util import get_obj_from_str

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import runpy, sys
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "transformers", "pytorch_lightning", "open_clip", "numpy"} & set(sys.modules)
    print("imported:", sorted(heavy))
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main.py", "merge_embeddings.py", "scripts/txt2img.py", "scripts/img2img.py",
                                    "scripts/inpaint.py"])
@pytest.mark.parametrize(("flags", "status"), [(["--help"], 0), (["--seed", "x", "--output_path"], 2)])
def test_help_and_bad_flags_need_no_torch(script: str, flags: list[str], status: int) -> None:
    result = subprocess.run([sys.executable, "-c", RUN, script, *flags], capture_output=True, text=True, cwd=ROOT,
                            check=False)
    assert "imported: []" in result.stdout and result.returncode == status, result.stdout + result.stderr


def test_public_names_are_imported_lazily() -> None:
    assert get_obj_from_str("main.DataModuleFromConfig") is DataModuleFromConfig
    assert get_obj_from_str("main.ImageLogger") is ImageLogger and main.SetupCallback is SetupCallback
    assert get_obj_from_str("ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder") is FrozenOpenCLIPEmbedder
    for module in (main, modules):
        assert not hasattr(module, "NoSuchName")
