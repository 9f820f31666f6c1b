"""Packed word tables, and pretrained towers with one inside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.packed_tables import pack_table, unpack_tables
from ldm.common.errors import UserError
from ldm.modules.encoders.vocabulary import load_pretrained

TABLE = "embeddings.token_embedding.weight"
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SHAPE, "vocab_size": 30, "max_position_embeddings": 6}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.data())
def test_used_rows_stay_and_the_others_become_one(rows: int, width: int, data: st.DataObject) -> None:
    table = torch.randn(rows, width)
    used = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=30)))
    packed = pack_table("words.weight", table, used)
    assert packed["words.weight.rows"].shape == (len(set(used.tolist())), width)
    other = torch.ones(2)
    whole = unpack_tables({**packed, "other.weight": other})
    assert whole.keys() == {"words.weight", "other.weight"} and whole["other.weight"] is other
    again = whole["words.weight"]
    assert again.shape == table.shape and torch.equal(again[used], table[used])
    unused = sorted(set(range(rows)) - set(used.tolist()))
    if len(unused) > 1:
        assert torch.allclose(again[unused], table[used.unique()].mean(0).expand(len(unused), -1), atol=1e-6)
    again_packed = pack_table("words.weight", again, used)
    assert torch.equal(unpack_tables(again_packed)["words.weight"], again)


def test_a_row_that_all_unused_rows_share_stays() -> None:
    table = torch.randn(6, 3)
    table[[0, 2, 5]] = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(unpack_tables(pack_table("w", table, torch.tensor([1, 3, 4])))["w"], table)


def test_half_precision_stays() -> None:
    packed = pack_table("words.weight", torch.randn(5, 3).half(), torch.tensor([1, 3]))
    assert unpack_tables(packed)["words.weight"].dtype == torch.float16


def test_tensors_without_packed_tables_stay() -> None:
    tensors = {"a.rows": torch.ones(1), "b.size": torch.ones(1)}
    assert unpack_tables(tensors) == tensors


def packed(**changes: Tensor | None) -> dict[str, Tensor]:
    parts = {
        "rows": torch.ones(2, 3),
        "row_numbers": torch.tensor([0, 4]),
        "rest": torch.zeros(3),
        "size": torch.tensor(5),
    }
    return {f"w.{key}": value for key, value in {**parts, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": None},
        {"rest": None},
        {"size": None},
        {"size": torch.tensor(4)},
        {"size": torch.tensor([5, 5])},
        {"rows": torch.ones(1, 3)},
        {"rows": torch.ones(2, 4)},
        {"rest": torch.zeros(1)},
        {"rest": torch.zeros(3, 3)},
        {"row_numbers": torch.tensor([0, -1])},
        {"row_numbers": torch.tensor([[0, 4]])},
    ],
)
def test_missing_or_inconsistent_parts_are_refused(changes: dict[str, Tensor | None]) -> None:
    assert unpack_tables(packed())["w"].sum() == 6
    with pytest.raises(UserError, match="packed token table w"):
        unpack_tables(packed(**changes))


@pytest.fixture(scope="module")
def tower() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**TEXT)).eval()


@pytest.fixture(scope="module")
def folder(tower: CLIPTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    tower.save_pretrained(folder)
    return folder


def encode(model: CLIPTextModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).last_hidden_state


def copy_packed(folder: Path, target: Path, used: Tensor, half: bool = False, without: str = "") -> Path:
    """Copy a tower and pack its word table; `without` is the ending of a key to leave out."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    state = {key: value.half() if half else value for key, value in load_file(folder / "model.safetensors").items()}
    name = next(key for key in state if key.endswith(TABLE))
    state |= pack_table(name, state.pop(name), used)
    save_file(
        {key: value for key, value in state.items() if not without or not key.endswith(without)},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


@pytest.mark.parametrize("half", [False, True])
def test_a_packed_tower_loads_in_full_precision(folder: Path, tower: CLIPTextModel, tmp_path: Path, half: bool) -> None:
    used = torch.tensor([1, 2, 5, 29])
    model = load_pretrained(CLIPTextModel, copy_packed(folder, tmp_path, used, half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokens = torch.tensor([[1, 5, 2, 29], [2, 2, 1, 29]])
    assert torch.allclose(encode(model, tokens), encode(tower, tokens), atol=1e-2 if half else 1e-6)
    before = tower.get_input_embeddings().weight[used].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[3], before, atol=1e-3)


def test_a_tower_that_is_not_packed_loads(folder: Path, tower: CLIPTextModel, tmp_path: Path) -> None:
    tokens = torch.arange(6)[None]
    assert torch.equal(encode(load_pretrained(CLIPTextModel, folder), tokens), encode(tower, tokens))
    shutil.copytree(folder, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    assert torch.equal(encode(load_pretrained(CLIPTextModel, tmp_path / "bin"), tokens), encode(tower, tokens))


def test_the_text_tower_of_a_clip_loads(tmp_path: Path) -> None:
    torch.manual_seed(1)
    clip = CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config={**SHAPE, "image_size": 8, "patch_size": 4}, projection_dim=4)
    ).eval()
    clip.save_pretrained(tmp_path)
    tokens = torch.arange(6)[None]
    expected = encode(clip.text_model, tokens)
    assert torch.equal(encode(load_pretrained(CLIPTextModel, tmp_path), tokens), expected)
    packed_folder = copy_packed(tmp_path, tmp_path / "packed", torch.arange(30))
    assert torch.equal(encode(load_pretrained(CLIPTextModel, packed_folder), tokens), expected)
    loaded = load_pretrained(CLIPModel, packed_folder)
    assert all(torch.equal(value, clip.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("without", ["final_layer_norm.weight", "mlp.fc1.bias", "position_embedding.weight"])
def test_missing_weights_are_an_error(folder: Path, tmp_path: Path, without: str) -> None:
    with pytest.raises(UserError, match=without):
        load_pretrained(CLIPTextModel, copy_packed(folder, tmp_path, torch.arange(30), without=without))


def test_missing_weights_in_other_formats_are_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    state = load_file(folder / "model.safetensors")
    state.pop(next(key for key in state if key.endswith("final_layer_norm.bias")))
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="final_layer_norm.bias"):
        load_pretrained(CLIPTextModel, tmp_path)


def test_cut_off_weights_are_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="not a complete"):
        load_pretrained(CLIPTextModel, tmp_path / "cut")


def test_folders_without_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(OSError):
        load_pretrained(CLIPTextModel, tmp_path)
