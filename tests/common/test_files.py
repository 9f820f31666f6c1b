from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.float16), "n": torch.tensor(7)}


def test_tensors_and_metadata_survive(tmp_path: Path) -> None:
    notes = {"words": ["<my-teddy>", "ünïcode"], "steps": 400, "name": "text", "none": None}
    path = save_tensors(tmp_path / "deep" / "er" / "x.safetensors", TENSORS, notes)
    tensors, metadata = load_tensors(path)
    assert metadata == notes and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items())


def test_views_and_shared_memory_are_stored_completely(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    views = {"table": table, "row": table[1], "turned": table.T, "every": table[:, ::2].requires_grad_()}
    stored, _ = load_tensors(save_tensors(tmp_path / "x.safetensors", views, {}))
    assert all(torch.equal(stored[key], value) for key, value in views.items())


def test_metadata_that_is_not_json_stays_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "count": "3"})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"format": "pt", "count": 3}


def test_deeply_nested_metadata_stays_text(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    deep = "[" * 100_000
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"perfusion": deep})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"perfusion": deep}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    content = save_tensors(tmp_path / "whole.safetensors", TENSORS, {"steps": 400}).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"cut.safetensors: not a complete safetensors file"):
        load_tensors(tmp_path / "cut.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="other.safetensors"):
        load_tensors(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("name", "message"), [("none.safetensors", "no such file"), (".", "is a folder")])
def test_missing_files(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tensors(tmp_path / name)
