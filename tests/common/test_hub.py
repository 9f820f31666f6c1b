"""Whether a model of the hub can be had, with folders of the cache made by hand and no network or a server of ours."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.common import hub
from ldm.common.errors import UserError, brief_reason
from ldm.common.hub import check_clip_name, check_model_name

ROOT = Path(__file__).resolve().parents[2]
NAME = "someone/some-model"


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty cache, and an address at which nobody listens."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy",
                 "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as error:
        check_model_name("segmenter", name, "give another")
    return str(error.value)


def test_a_name_without_network() -> None:
    start = time.monotonic()
    text = refusal(NAME)
    assert time.monotonic() - start < 2
    assert text == (f"segmenter {NAME}: no such folder, nor a model that was downloaded before, and "
                    f"{os.environ['HF_ENDPOINT']} cannot be reached; check the name and the network, or give another")


def test_a_name_that_the_libraries_may_not_look_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refusal(NAME)


def test_a_name_that_can_be_looked_up(server: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        check_model_name("segmenter", NAME, "")
        check_model_name("segmenter", NAME, "")
    assert [record.getMessage() for record in caplog.records] == [
        f"segmenter {NAME}: not on this machine yet; downloading it once from {server}"]
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_proxy_is_asked_in_place_of_the_hub(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "hub.invalid cannot be reached" in refusal(NAME)
    monkeypatch.setenv("http_proxy", server)
    check_model_name("segmenter", NAME, "")


def test_a_cached_model_is_used_without_a_network(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models--someone--some-model" / "snapshots" / "123"
    folder.mkdir(parents=True)
    assert "no such folder" in refusal(NAME)  # a download that did not finish
    (folder / "config.json").touch()
    check_model_name("segmenter", NAME, "")
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # the library must not try for minutes


@pytest.mark.parametrize("name", ["nowhere", "models/none/at/all", "/none/at", "~/none/at", "a b/c"])
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert refusal(name).endswith(f"{name}: no such folder; give another")


def test_folders(tmp_path: Path) -> None:
    check_model_name("segmenter", tmp_path, "")
    check_clip_name("CLIP", "models/mini/clip")


@pytest.mark.parametrize(("name", "message"), [
    ("ViT-B-33/openai", "do you mean ViT-B-32/openai?"), ("ViTB32/openai", "do you mean ViT-B-32/openai?"),
    ("nowhere", "no such folder; give a folder that holds a CLIP"), (NAME, "cannot be reached")])
def test_clips(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        check_clip_name("CLIP", name)
    check_clip_name("CLIP", "ViT-B-32/openai")


def test_a_slow_lookup_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.05)

    def look_up_slowly(*_: object) -> None:
        time.sleep(1)
        raise OSError("not found")

    monkeypatch.setattr(hub.socket, "create_connection", look_up_slowly)
    start = time.monotonic()
    assert "cannot be reached" in refusal(NAME) and time.monotonic() - start < 0.9


def test_reasons_end_at_words() -> None:
    address = "https://hub.example/" + "x" * 60
    assert brief_reason(f"short\n {address}") == f"short {address}"
    long = f"We could not connect to the hub. {'word ' * 20}see {address} and {address} for more"
    text = brief_reason(ValueError(long), 180)
    assert len(text) <= 184 and text.removesuffix(" ...") in long and not text.removesuffix(" ...").endswith("x" * 5)
    assert brief_reason("One sentence of some length ends here. Another one follows it", 45).endswith("ends here.")


MISTYPED = (
    ("main.py", "--base", "configs/perfusion.yaml", "--data_root", "photoss"),
    ("main.py", "--base", "configs/perfusion.yaml", "--masks", "maskss"),
    ("main.py", "--base", "configs/perfusion.yaml", "model.params.segmenter=CIDAS/clipsegg"),
    ("main.py", "--base", "configs/perfusion.yaml", "model.params.covariance=c.safetensors"),
    ("main.py", "--base", "configs/perfusion.yaml", "--actual_resume", "modle.safetensors"),
    ("main.py", "--resume", "logs/typo"),
    ("scripts/txt2img.py", "--prompt", "x", "--ckpt", "modle.safetensors"),
    ("scripts/txt2img.py", "--prompt", "x", "--concept", "teddyy.safetensors"),
    ("scripts/img2img.py", "--prompt", "x", "--init-img", "photoo.png"),
    ("scripts/inpaint.py", "--prompt", "x", "--init-img", "setup.py", "--mask", "maskk.png"),
    ("scripts/inpaint.py", "--prompt", "x", "--init-img", "setup.py", "--mask-word", "x", "--segmenter", "a/b"),
    ("scripts/attention_maps.py", "x", "--word", "x", "--segmenter", "a/b"),
    ("scripts/compute_covariance.py", "--config", "confg.yaml"),
    ("scripts/compute_covariance.py", "--config", "configs/perfusion.yaml", "--captions", "captionss.txt"),
    ("merge_embeddings.py", "--manager_ckpts", "a.safetensors", "b.safetensors", "--output_path", "c.safetensors"),
    ("evaluation/clip_eval.py", "--images", "photoss", "--photos", "models/mini/examples/teddy"),
    ("evaluation/clip_eval.py", "--concept", "teddyy.safetensors", "--photos", "models/mini/examples/teddy"),
    ("evaluation/clip_eval.py", "--images", "ldm", "--photos", "ldm", "--segmenter", "a/b"),
    ("evaluation/clip_eval.py", "--images", "ldm", "--photos", "ldm", "--clip", "ViT-B-33/openai"),
    ("evaluation/pareto.py", "--concept", "teddyy.safetensors", "--photos", "ldm"),
)


@pytest.mark.parametrize("command", [MISTYPED[0],
                                     *(pytest.param(each, marks=pytest.mark.slow) for each in MISTYPED[1:])],
                         ids=lambda words: " ".join(words))
def test_commands_answer_mistyped_names_before_torch_is_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    """A module called torch that cannot be imported stands first on the path."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and "torch was imported" not in result.stderr, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
