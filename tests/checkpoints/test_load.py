"""Reading checkpoints in every format, and loading them into modules."""
from __future__ import annotations

import collections
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.load import load_model, load_weights, read_state_dict
from ldm.checkpoints.packed_tables import pack_table
from ldm.common.errors import UserError


class Tiny(nn.Module):
    """Two layers that load a checkpoint as the models do."""

    def __init__(self, width: int = 3, ckpt_path: str | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, 1)
        if ckpt_path is not None:
            load_weights(self, ckpt_path)


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Tiny().state_dict()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("new_format", [False, True])
def test_every_kind_of_ckpt(tmp_path: Path, wrapped: bool, new_format: bool) -> None:
    content = {"state_dict": weights(), "global_step": 5} if wrapped else weights()
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
    assert equal(read_state_dict(tmp_path / "x.ckpt"), weights())


def test_safetensors(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "x.safetensors")
    assert equal(read_state_dict(tmp_path / "x.safetensors"), weights())


def test_packed_token_tables_are_unpacked(tmp_path: Path) -> None:
    table = torch.randn(9, 4)
    save_file({**weights(), **pack_table("words.weight", table, torch.arange(9))}, tmp_path / "x.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "x.safetensors")["words.weight"], table)


class Harmful:
    """Creates a folder when it is unpickled without precautions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, new_format: bool, hidden: bool) -> None:
    harmful = Harmful(tmp_path / "marker")
    pickle.loads(pickle.dumps(harmful))
    assert harmful.marker.exists()  # the attack works without precautions
    harmful.marker.rmdir()
    content = {"state_dict": weights(), "callbacks": {ModelCheckpoint: [harmful]}} if hidden else harmful
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="holds more than weights") as refused:
        read_state_dict(tmp_path / "x.ckpt")
    assert not harmful.marker.exists()
    assert "\n" not in str(refused.value) and ("mkdir" in str(refused.value) or not new_format)


def test_a_harmful_class_of_a_training_package_is_not_run(tmp_path: Path) -> None:
    class Loader:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.save, (str(tmp_path / "marker"), [1])

    torch.save({"state_dict": weights(), "more": Loader()}, tmp_path / "x.ckpt")
    assert equal(read_state_dict(tmp_path / "x.ckpt"), weights())
    assert not (tmp_path / "marker.npy").exists()


def test_public_checkpoints_with_the_state_of_their_training_run(tmp_path: Path) -> None:
    """Stable Diffusion 1 has callbacks of Lightning as keys; other files hold configs and NumPy values."""
    torch.save(
        {
            "state_dict": weights(),
            "epoch": 3,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5), "scores": np.arange(3.0)}},
            "hyper_parameters": OmegaConf.create({"lr": 1e-4, "list": [1, {"a": None}], "name": "x"}),
            "counts": collections.defaultdict(int),
        },
        tmp_path / "x.ckpt",
    )
    before = dict(torch.serialization._weights_only_unpickler._get_user_allowed_globals())
    assert equal(read_state_dict(tmp_path / "x.ckpt"), weights())
    assert torch.serialization._weights_only_unpickler._get_user_allowed_globals() == before


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999), new_format=st.booleans())
def test_truncated_ckpt(tmp_path: Path, share: float, new_format: bool) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=new_format)
    content = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cut.ckpt") as refused:
        read_state_dict(tmp_path / "cut.ckpt")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), protocol=st.booleans())
def test_other_content_is_refused_in_one_line(tmp_path: Path, content: bytes, protocol: bool) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02" + content if protocol else content)
    with pytest.raises(UserError, match="x.ckpt") as refused:
        read_state_dict(tmp_path / "x.ckpt")
    assert "\n" not in str(refused.value)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    (tmp_path / "text.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>404</html>")
    torch.save(nn.Linear(2, 2), tmp_path / "whole_module.ckpt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name) as refused:
            read_state_dict(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": 5}, [torch.ones(1)], 5, None, {"a": 1}])
def test_checkpoints_without_weights(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="holds no weights"):
        read_state_dict(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", ["none.ckpt", "none.safetensors", "folder"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_load(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in weights().items()}, tmp_path / "x.safetensors")
    module = Tiny()
    load_weights(module, tmp_path / "x.safetensors")
    for key, value in module.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, weights()[key].to(dtype).float())


def refusal(module: nn.Module, state: dict[str, Tensor], folder: Path) -> str:
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.save(state, folder / "x.ckpt")
    with pytest.raises(UserError) as refused:
        load_weights(module, folder / "x.ckpt")
    assert equal(module.state_dict(), before)
    return str(refused.value)


def test_missing_and_unexpected_keys_are_counted_and_named(tmp_path: Path) -> None:
    state = weights(1)
    state["third.weight"] = state.pop("second.weight")
    message = refusal(Tiny(), state, tmp_path)
    assert "1 keys missing (second.weight)" in message and "1 keys unexpected (third.weight)" in message
    message = refusal(Tiny(), {f"other.{number}": torch.ones(1) for number in range(7)}, tmp_path)
    assert "4 keys missing (first.weight, first.bias, second.weight, …)" in message
    assert "7 keys unexpected (other.0, other.1, other.2, …)" in message


def test_wrong_shapes_are_named_with_both_shapes(tmp_path: Path) -> None:
    message = refusal(Tiny(), Tiny(width=5).state_dict(), tmp_path)
    assert "3 keys of another shape (first.weight (5, 2) for (3, 2)" in message


def test_unexpected_keys_alone_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({**weights(1), "third.weight": torch.ones(1)}, tmp_path / "x.ckpt")
    module = Tiny()
    with caplog.at_level(logging.WARNING):
        load_weights(module, tmp_path / "x.ckpt")
    assert "1 keys unexpected (third.weight)" in caplog.text and equal(module.state_dict(), weights(1))


def test_keys_that_no_model_reads_are_ignored_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unread = (
        "model_ema.decay",
        "model_ema.thirdweight",
        "loss.discriminator.main.0.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    )
    torch.save({**weights(1), **dict.fromkeys(unread, torch.ones(1))}, tmp_path / "x.ckpt")
    with caplog.at_level(logging.WARNING):
        load_weights(Tiny(), tmp_path / "x.ckpt")
    assert not caplog.text


def with_averages(seed: int) -> dict[str, Tensor]:
    """Weights and, under the names of public files, others that are their averages."""
    averages = {f"model_ema.{key.replace('.', '')}": value for key, value in weights(seed + 1).items()}
    return {**weights(seed), **averages, "model_ema.decay": torch.tensor(0.9999)}


def test_averages_replace_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": with_averages(1)}, tmp_path / "x.ckpt")
    module = Tiny()
    with caplog.at_level(logging.INFO):
        load_weights(module, tmp_path / "x.ckpt")
    assert equal(module.state_dict(), weights(2)) and "using the moving averages of 4 weights" in caplog.text
    load_weights(module, tmp_path / "x.ckpt", ignore_keys=["model_ema."])
    assert equal(module.state_dict(), weights(1))


def test_a_part_loads_its_weights_from_a_whole_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for prefix in ("model.", "model.diffusion_model.", "first_stage_model.", "cond_stage_model."):
        model = {prefix + key: value for key, value in weights(1).items()}
        torch.save({**model, "elsewhere.weight": torch.ones(1)}, tmp_path / "x.ckpt")
        module = Tiny()
        assert load_weights(module, tmp_path / "x.ckpt") == set(module.state_dict())
        assert equal(module.state_dict(), weights(1))
    assert not caplog.records


def test_ignored_keys_stay_unchanged(tmp_path: Path) -> None:
    state = weights(1)
    state.pop("second.bias")
    state["second.weight"] = torch.ones(8, 8)
    torch.save(state, tmp_path / "x.ckpt")
    module = Tiny()
    before = module.second.weight.clone()
    load_weights(module, tmp_path / "x.ckpt", ignore_keys=["second."])
    assert torch.equal(module.second.weight, before) and torch.equal(module.first.weight, weights(1)["first.weight"])


def model_config(**params: Any) -> dict[str, Any]:
    return {"model": {"target": "test_load.Tiny", "base_learning_rate": 1.0, "params": params}}


def test_load_model_returns_a_frozen_model_with_the_files_weights(tmp_path: Path) -> None:
    torch.save(weights(1), tmp_path / "a.ckpt")
    torch.save(weights(2), tmp_path / "b.ckpt")
    own = model_config(ckpt_path=str(tmp_path / "a.ckpt"))
    assert equal(load_model(own).state_dict(), weights(1))
    for config in (own, model_config(), OmegaConf.create(own)):
        model = load_model(config, tmp_path / "b.ckpt")
        assert equal(model.state_dict(), weights(2))
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "named"), [(model_config(), "--ckpt"), ({"data": {}}, "model"), ({"model": {}}, "--ckpt")]
)
def test_configs_without_a_model_or_weights(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_model(config)
