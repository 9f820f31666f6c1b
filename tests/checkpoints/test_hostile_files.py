"""Malicious and broken files: each gives one line, none of their code runs, and nothing is left behind."""
from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.load import load_weights, read_state_dict
from ldm.checkpoints.pickled import PRINTED_CHARACTERS, printable
from ldm.common.errors import UserError


class Call:
    """Calls `function` with `arguments` when it is unpickled without precautions."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced

    def __call__(self) -> None:
        """Objects must be callable to be pickled as functions."""


HARM: dict[str, Callable[[Path], Any]] = {
    "system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "getattr": lambda mark: Call(Call(getattr, mark, "touch")),
    "write": lambda mark: Call(Path.touch, mark),
    "load": lambda mark: Call(torch.load, str(mark)),
    "hub": lambda mark: Call(torch.hub.download_url_to_file, "http://127.0.0.1:9", str(mark)),
    "import": lambda mark: Call(__import__, "os"),
    "popen": lambda mark: Call(__import__("subprocess").Popen, ["touch", str(mark)]),
}


def refusal(path: Path) -> str:
    """Return the error message for a file. Asserts that it is one line and that no other file appeared."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UserError) as refused:
        read_state_dict(path)
    message = str(refused.value)
    assert str(path) in message and message.isprintable() and len(message) < 500 + len(str(path))
    assert sorted(path.parent.rglob("*")) == before
    return message


@pytest.mark.parametrize("name", ["system", "eval", "getattr", "write", "popen"])
def test_the_files_are_harmful_to_plain_unpickling(tmp_path: Path, name: str) -> None:
    unpickled = pickle.loads(pickle.dumps(HARM[name](tmp_path / "mark"), protocol=2))
    if name == "popen":
        unpickled.wait()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("how", ["zip", "legacy", "bare", "protocol 4"])
def test_code_is_not_run(tmp_path: Path, name: str, wrapped: bool, how: str) -> None:
    harm = HARM[name](tmp_path / "mark")
    content = {"state_dict": {"a": torch.ones(2)}, "optimizer": [harm]} if wrapped else harm
    path = tmp_path / "x.ckpt"
    if how in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if how == "bare" else 4))
    refusal(path)
    assert not (tmp_path / "mark").exists()


def test_the_function_that_a_file_requests_is_named(tmp_path: Path) -> None:
    torch.save(Call(eval, "1"), tmp_path / "x.ckpt")
    assert "it asks for builtins.eval" in refusal(tmp_path / "x.ckpt").replace("__builtin__", "builtins")


def test_the_names_in_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    code = b"\x80\x02cos\x1b[2J\nsys" + b"x" * 9999 + b"\n."
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/version", "3\n")
    message = refusal(tmp_path / "x.ckpt")
    assert "it asks for" in message and "\\x1b[2J" in message
    assert printable("a" * 999) == "a" * PRINTED_CHARACTERS + "…"
    torch.save({"\x1b[31m": torch.ones(1), "two\nlines": torch.ones(1)}, tmp_path / "keys.ckpt")
    with pytest.raises(UserError) as refused:
        load_weights(nn.Linear(2, 2), tmp_path / "keys.ckpt")
    assert str(refused.value).isprintable()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def test_the_oldest_format_of_torch_is_refused(tmp_path: Path) -> None:
    """It is a tar archive, which torch would unpack."""
    harm = pickle.dumps(HARM["system"](tmp_path / "mark"), protocol=2)
    with tarfile.open(tmp_path / "x.ckpt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            add(archive, name, harm)
        add(archive, "../escaped", b"")
    assert "tar" in refusal(tmp_path / "x.ckpt")
    assert not (tmp_path / "mark").exists() and not (tmp_path.parent / "escaped").exists()


def test_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    refusal(tmp_path / "script.ckpt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.ckpt")
    refusal(tmp_path / "module.ckpt")


def test_compressed_zip_files_are_refused(tmp_path: Path) -> None:
    """This one has a thousandth of its size on the disk."""
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"0" * 10_000_000)
    assert "compressed" in refusal(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("factor", [2**12, 2**20, 2**40, 2**58])
@pytest.mark.parametrize("new_format", [False, True])
def test_tensors_larger_than_the_file(tmp_path: Path, factor: int, new_format: bool) -> None:
    torch.save({"a": torch.ones(7)}, tmp_path / "good.ckpt", _use_new_zipfile_serialization=new_format)
    wrong = struct.pack("<BBq", 0x8A, 8, 7 * factor)  # LONG1 instead of BININT1 7, the size of storage and tensor
    if not new_format:
        (tmp_path / "x.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes().replace(b"K\x07", wrong))
    else:
        with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as bad:
            for part in good.namelist():
                bad.writestr(part, good.read(part).replace(b"K\x07", wrong))
    refusal(tmp_path / "x.ckpt")


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), new_format=st.booleans())
def test_a_flipped_byte_is_refused_or_read(tmp_path: Path, position: int, value: int, new_format: bool) -> None:
    path = tmp_path / "flipped.ckpt"
    torch.save({"state_dict": {"a": torch.ones(5), "b": torch.zeros(2, 3)}}, path,
               _use_new_zipfile_serialization=new_format)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        tensors = read_state_dict(path)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert all(isinstance(value.sum().item(), float | int | bool | complex) for value in tensors.values())


def training_state() -> dict[str, Any]:
    """Return objects that training runs store beside the weights."""
    counts = collections.defaultdict(int, steps=5)
    settings = AttributeDict(lr=1e-4, nested=AttributeDict(a=[1]))
    when = datetime.datetime(2022, 8, 22), datetime.timedelta(1)
    arguments = argparse.Namespace(gpus=8, path=Path("logs"))
    return {"counts": counts, "hyper_parameters": settings, "when": when, "arguments": arguments,
            "optimizer": torch.optim.SGD, "words": nn.ParameterDict({"a": nn.Parameter(torch.ones(1))})}


@pytest.mark.parametrize("name", training_state())
def test_the_state_of_training_runs_is_ignored(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, name: training_state()[name]}, tmp_path / "x.ckpt")
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["a"], torch.ones(2))


def safetensors(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize("content", [
    b"", b"\0", struct.pack("<Q", 2**63), safetensors(entry(), length=2**62), safetensors(entry(), length=10**9),
    safetensors(entry(), data=b""), safetensors(entry(), data=b"\0" * 99), safetensors(entry(shape=(2**62,))),
    safetensors(entry(shape=(2**40, 2**40))), safetensors(entry(shape=(-4,))), safetensors(entry(offsets=(0, 2**60))),
    safetensors(entry(offsets=(16, 0))), safetensors(entry(offsets=(-16, 0))), safetensors(entry(dtype="X9")),
    safetensors({**entry(), "b": entry()["a"]}), safetensors(b"[" * 100_000), safetensors(b"{}x"), safetensors([]),
    safetensors({"a": 5}),
], ids=range(19))
def test_safetensors_with_a_false_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "not a complete safetensors file" in refusal(tmp_path / "x.safetensors")


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_safetensors(tmp_path: Path, share: float) -> None:
    save_file({"a": torch.ones(9), "b": torch.ones(3, 3)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:int(share * len(content))])
    assert "not a complete safetensors file" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("odd", [
    *(lambda dtype=dtype: torch.ones(2, 2, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.bool)),
    lambda: torch.ones(2, 2, dtype=torch.cfloat), lambda: torch.eye(2).to_sparse(),
    lambda: torch.ones(2, 2, device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8),
], ids=range(7))
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_other_dtypes_are_refused(tmp_path: Path, odd: Callable[[], Tensor]) -> None:
    torch.save({"weight": odd(), "bias": torch.ones(2)}, tmp_path / "x.ckpt")
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(UserError, match=r"1 keys that are no weights \(weight of numbers .*16- or 32-bit"):
        load_weights(module, tmp_path / "x.ckpt")
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_dtype_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2, dtype=dtype)}, tmp_path / "x.ckpt")
    module = nn.Linear(2, 2)
    load_weights(module, tmp_path / "x.ckpt")
    assert module.weight.dtype == torch.float32 and bool((module.weight == 1).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_cause_a_warning(tmp_path: Path, caplog: Any, bad: float) -> None:
    torch.save({"weight": torch.tensor([[1, bad], [1, 1]]), "bias": torch.ones(2)}, tmp_path / "x.ckpt")
    load_weights(nn.Linear(2, 2), tmp_path / "x.ckpt")
    assert "1 keys hold numbers that are not finite (weight)" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory map of the process from Linux")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_files_stay_mapped_while_their_tensors_exist(tmp_path: Path, suffix: str) -> None:
    path, tensors = tmp_path / f"x.{suffix}", {"a": torch.ones(5000), "b": torch.ones(3)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save({"state_dict": tensors}, path)

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    read = read_state_dict(path)
    assert mapped() and torch.equal(read["a"], tensors["a"])
    read["a"].zero_()
    assert torch.equal(read_state_dict(path)["a"], tensors["a"])  # the file itself is unchanged
    del read
    assert not mapped()
