"""The script that computes the covariance: once as a process on a tiny model, otherwise in this process."""
from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import CLIPTextConfig

from ldm.checkpoints import load
from ldm.modules.covariance import encoder_fingerprint, token_covariance
from ldm.modules.covariance_files import load_covariance
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compute_covariance.py"
WIDTH, LENGTH, START, END = 16, 12, 49406, 49407
CAPTIONS = ["a photo of a red mug", "an old teddy bear", "two mugs on a table"]
LONG = "one two three four five six seven eight nine ten eleven"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("scripts.compute_covariance")


@pytest.fixture(scope="module")
def encoder_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("text_encoder")
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                   vocab_size=END + 1, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=END,
                   pad_token_id=END).save_pretrained(folder)
    return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(folder), "max_length": LENGTH}}


@pytest.fixture(scope="module")
def embedder(encoder_config: dict[str, object]) -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    return instantiate_from_config(encoder_config)


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    """A config without a real model, a file of captions, and the output file."""
    config, captions = tmp_path / "config.yaml", tmp_path / "captions.txt"
    config.write_text("model: {target: none}\n")
    captions.write_text("\n\n".join([*CAPTIONS, LONG]), encoding="utf8")
    return SimpleNamespace(config=config, captions=captions, output=tmp_path / "new" / "c.safetensors")


@pytest.fixture
def loaded(embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces loading a model: the model has nothing but a text encoder."""
    monkeypatch.setattr(load, "load_model", lambda *_: SimpleNamespace(cond_stage_model=embedder))


def run(script: ModuleType, files: SimpleNamespace, *flags: object) -> None:
    paths = ["--config", files.config, "--captions", files.captions, "--output", files.output]
    script.main([str(part) for part in [*paths, "--device", "cpu", *flags]])


def latent_diffusion(encoder_config: dict[str, object]) -> dict[str, object]:
    first_stage = {"embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1],
            "num_res_blocks": 1, "attention_resolutions": [1], "num_heads": 2, "use_spatial_transformer": True,
            "transformer_depth": 1, "context_dim": WIDTH, "legacy": False}
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "image_size": 8, "channels": 4, "conditioning_key": "crossattn", "cond_stage_key": "caption",
        "use_ema": False, "cond_stage_config": encoder_config,
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}}}


@pytest.mark.slow
@pytest.mark.parametrize("config_names_output", [False, True])
def test_the_script_writes_the_covariance_of_a_checkpoint(
    encoder_config: dict[str, object], files: SimpleNamespace, tmp_path: Path, config_names_output: bool
) -> None:
    section = latent_diffusion(encoder_config)
    model = instantiate_from_config(section)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    if config_names_output:
        section = {"target": "ldm.personalization.perfusion.Perfusion",
                   "params": {**section["params"], "covariance": str(files.output)}}
    OmegaConf.save({"model": section}, files.config)
    command = [sys.executable, SCRIPT, "--config", files.config, "--ckpt", tmp_path / "model.ckpt",
               "--captions", files.captions, "--output", files.output, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "captions: 3 used, 1 too long and left out (captions.txt)" in result.stderr
    assert f"written to {files.output}" in result.stderr
    encoder = model.cond_stage_model
    expected = token_covariance(encoder, CAPTIONS, progress=False)
    torch.testing.assert_close(load_covariance(files.output, encoder_fingerprint(encoder)), expected.float())


@pytest.mark.parametrize(("tokens", "count"), [("words", 6 + 4 + 5), ("no_padding", 15 + 6), ("all", 36)])
@pytest.mark.usefixtures("loaded")
def test_the_report_tells_how_many_tokens_count(
    script: ModuleType, files: SimpleNamespace, embedder: FrozenCLIPEmbedder, tokens: str, count: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        run(script, files, "--tokens", tokens, "--batch_size", 2)
    assert f"tokens counted: {count} ({tokens}: " in caplog.text
    assert "condition number: " in caplog.text
    assert f"of at most {WIDTH}" in caplog.text
    expected = token_covariance(embedder, CAPTIONS, tokens, progress=False)
    torch.testing.assert_close(load_covariance(files.output), expected.float())


@pytest.mark.usefixtures("loaded")
def test_the_limit_applies_to_given_and_default_captions(
    script: ModuleType, files: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(script, files, "--limit", 2)
        script.main(["--config", str(files.config), "--limit", "7", "--output", str(files.output), "--device", "cpu"])
    first, second = (line for line in caplog.messages if line.startswith("captions: "))
    assert "captions.txt" in first
    assert "open_clip" in second
    used = [[int(word) for word in line.replace(",", "").split() if word.isdecimal()][:2] for line in (first, second)]
    assert [sum(pair) for pair in used] == [2, 7]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file"), (b"\n", "no captions in it"), (b"\x00\x01\xff", "not a UTF-8 text file")])
def test_an_unusable_caption_file_is_a_one_line_error(
    script: ModuleType, files: SimpleNamespace, content: bytes | None, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files.captions.unlink()
    if content is not None:
        files.captions.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run(script, files)
    assert stopped.value.code == 2
    flag = "--captions " if content is None else ""  # before torch is imported
    assert f"error: {flag}{files.captions}: {message}" in capsys.readouterr().err
    assert not files.output.exists()


def failure(script: ModuleType, files: SimpleNamespace, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    with pytest.raises(SystemExit):
        run(script, files, *flags)
    return capsys.readouterr().err


def test_errors_name_what_cannot_be_used(
    script: ModuleType, files: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no base model: name its checkpoint with --ckpt" in failure(script, files, capsys)
    assert "is a folder" in failure(script, files, capsys, "--output", files.config.parent)
    assert "nothing.yaml: no such file" in failure(script, files, capsys, "--config", "nothing.yaml")
    assert "--limit: 0: must be 1 or more" in failure(script, files, capsys, "--limit", 0)
    assert "--tokens some: give one of words" in failure(script, files, capsys, "--tokens", "some")
    monkeypatch.setattr(load, "load_model", lambda *_: SimpleNamespace(cond_stage_model=None))
    assert "has no text encoder" in failure(script, files, capsys)
    files.config.write_text("data: {}\n")
    assert "describes no model" in failure(script, files, capsys)
