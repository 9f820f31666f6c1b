"""The package as `pip install .` copies it: it finds its tokenizers, configs and model without the checkout."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import ldm
from ldm.common.paths import resolve_path
from ldm.modules.encoders.modules import BERTTokenizer, FrozenCLIPEmbedder
print(ldm.__file__)
print(resolve_path("models/mini/model.safetensors"), resolve_path("configs/stable-diffusion/v1-inference.yaml"))
encoder = FrozenCLIPEmbedder("models/mini/text_encoder", max_length=16)  # its folder has no tokenizer
print(encoder.word_pieces("cat"), BERTTokenizer(max_length=4)("cat").tolist())
"""


@pytest.mark.slow
def test_a_copied_package_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=tmp_path,
                            env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")})
    package, files, tokens = result.stdout.splitlines()
    assert package == str(tmp_path / "lib" / "ldm" / "__init__.py")
    bundled = tmp_path / "lib" / "ldm" / "bundled"
    assert files.split() == [str(bundled / "models" / "mini" / "model.safetensors"),
                             str(bundled / "configs" / "stable-diffusion" / "v1-inference.yaml")]
    assert tokens == "[2368] [[101, 4937, 102, 0]]"
