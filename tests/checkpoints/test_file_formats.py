"""Files are told by their content, whatever they are called, and named if they hold no tensors."""
from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoints.header import read_header
from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.common.file_formats import Format, check_config_file, format_of
from ldm.inference.model_config import read_model_config

NAMES = ("x.ckpt", "x.pt", "x.bin", "x.safetensors", "x.SAFETENSORS", "x.CKPT", "x")


def weights() -> dict[str, Tensor]:
    return {"input_blocks.0.0.weight": torch.arange(24.0).reshape(2, 3, 4), "b": torch.ones(2).half()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_suffixes_do_not_matter(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        torch.save({"state_dict": weights(), "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    read = read_state_dict(path)
    assert read.keys() == weights().keys() and all(torch.equal(read[key], value) for key, value in weights().items())
    assert read_header(path).shapes == {key: tuple(value.shape) for key, value in weights().items()}


def a_zip(path: Path, **files: str) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.read_bytes()


FOREIGN: dict[str, tuple[Any, str]] = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 343816754\n", "LFS pointer.*lfs pull"),
    "page": (b"\n<!DOCTYPE html><html><head><title>Access denied</title></head></html>", "a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "XML text"),
    "message": (b'{"error":"Repository not found"}', "server's error message .Repository not found"),
    "index": (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "index of several weight files"),
    "text": (b"hello " * 50, "a text file"),
    "gzip": (gzip.compress(b"x" * 99), "gzip archive; unpack"),
    "image": (b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "an image"),
    "GGUF": (b"GGUF" + b"\3\0\0\0" * 20, "GGUF file"),
    "zeros": (b"\0" * 5000, "its download or copy was not completed"),
}


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.bin"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_named(tmp_path: Path, name: str, kind: str) -> None:
    content, message = FOREIGN[kind]
    (tmp_path / name).write_bytes(content)
    for read in (read_state_dict, read_header):
        with pytest.raises(UserError, match=f"{name}: is .*{message}") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_zip_archives_of_other_files(tmp_path: Path) -> None:
    a_zip(tmp_path / "x.ckpt", **{"readme.txt": "see model.ckpt"})
    with pytest.raises(UserError, match="a zip archive of other files; unpack it"):
        read_state_dict(tmp_path / "x.ckpt")


@pytest.mark.parametrize("content", [
    {"a": torch.ones(2)}, FOREIGN["LFS"][0], FOREIGN["page"][0], FOREIGN["image"][0]], ids=range(4))
def test_configs_that_are_none(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "config.yaml"
    save_file(content, path) if isinstance(content, dict) else path.write_bytes(content)
    for read in (check_config_file, read_model_config):
        with pytest.raises(UserError, match="config.yaml: is .*, not a config"):
            read(path)


def test_configs_in_json_are_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"target": "a.B", "params": {}}}))
    assert read_model_config(tmp_path / "config.json").model.target == "a.B"


class Harm:
    """Creates a file when it is unpickled without precautions."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("new_format", [True, False])
def test_reading_a_header_runs_nothing(tmp_path: Path, new_format: bool) -> None:
    content = {"state_dict": weights(), "callbacks": [Harm(tmp_path / "mark")]}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
    header = read_header(tmp_path / "x.ckpt")
    assert set(header.shapes) == set(weights()) and not (tmp_path / "mark").exists()
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Harm(tmp_path / "mark"), protocol=2))
    assert format_of(tmp_path / "bare.ckpt") is Format.PICKLE
    assert read_header(tmp_path / "bare.ckpt").shapes == {} and not (tmp_path / "mark").exists()
