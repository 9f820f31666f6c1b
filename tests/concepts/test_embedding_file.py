"""Files of Textual Inversion's public code, written and read with torch alone."""
from __future__ import annotations

import base64
import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.embedding_file import load_learned_words, save_learned_words
from ldm.concepts.fingerprint import BaseModel, check_base
from ldm.concepts.storage import load_concepts

WORDS = {"*": torch.arange(6.0).view(2, 3), "<mug>": torch.tensor([[0.1, -0.2, 1e-7]])}
TOKENS = {"*": torch.tensor(265), "<mug>": torch.tensor(49408)}


def parameter_dict(words: dict[str, Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({word: nn.Parameter(vectors) for word, vectors in words.items()})


def parameter_dict_of_an_old_torch(words: dict[str, Tensor]) -> nn.ParameterDict:
    """Return what torch 1.10 pickled: it had no list of keys, and hooks in ordered dictionaries."""
    old = parameter_dict(words)
    del old.__dict__["_keys"]
    old.__dict__["_parameters"] = OrderedDict(old._parameters)
    old.__dict__["_is_full_backward_hook"] = None
    return old


@pytest.mark.parametrize("content", [
    {"string_to_token": TOKENS, "string_to_param": parameter_dict(WORDS)},
    {"string_to_token": TOKENS, "string_to_param": parameter_dict_of_an_old_torch(WORDS)},
    {"string_to_token": {"*": 265, "<mug>": 49408}, "string_to_param": dict(WORDS), "step": 5, "name": "x"},
])
def test_public_files_load(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "embeddings.pt")
    words = load_learned_words(tmp_path / "embeddings.pt")
    assert [(word.word, word.token) for word in words] == [("*", 265), ("<mug>", 49408)]
    assert all(torch.equal(word.vectors, WORDS[word.word]) for word in words)


def test_learned_embeds_of_diffusers_load(tmp_path: Path) -> None:
    torch.save({"<cat-toy>": torch.arange(3.0)}, tmp_path / "learned_embeds.bin")
    (word,) = load_learned_words(tmp_path / "learned_embeds.bin")
    assert (word.word, word.token, word.vectors.tolist()) == ("<cat-toy>", None, [[0, 1, 2]])


def test_files_are_those_of_the_public_code(tmp_path: Path) -> None:
    path = save_learned_words(tmp_path / "new" / "embeddings.pt", TOKENS, WORDS)
    with torch.serialization.safe_globals([nn.ParameterDict, set]):
        content = torch.load(path, weights_only=True)  # as the public code reads it
    assert list(content) == ["string_to_token", "string_to_param"] and content["string_to_token"] == TOKENS
    parameters = content["string_to_param"]
    assert isinstance(parameters, nn.ParameterDict)
    assert all(torch.equal(parameters[word], WORDS[word]) for word in WORDS)
    assert len(list(parameters.parameters())) == 2 and all(value.requires_grad for value in parameters.values())


def test_public_files_are_concepts_for_any_base(tmp_path: Path) -> None:
    first, second = load_concepts(save_learned_words(tmp_path / "embeddings.pt", TOKENS, WORDS))
    assert (first.method_label, first.placeholder, second.placeholder) == ("Textual Inversion", "*", "<mug>")
    assert torch.equal(first.vectors, WORDS["*"]) and first.source == str(tmp_path / "embeddings.pt")
    check_base(first, BaseModel("0" * 64))
    layers = {"attn2": (320, 768)}
    with pytest.raises(UserError, match="was trained on .*another model"):
        check_base(replace(first, weights={"attn2.to_k.weight": torch.zeros(1)}), BaseModel("0" * 64, layers=layers))


# Files of other tools

L, G, H = torch.full((2, 768), 0.1), torch.full((2, 1280), 0.2), torch.full((1, 1024), 0.3)
WEB_UI = {"string_to_token": {"*": 265}, "string_to_param": {"*": L}, "name": "x", "step": 3, "sd_checkpoint": None,
          "sd_checkpoint_name": None}


@pytest.mark.parametrize(("content", "vectors", "parts"), [
    ({"clip_l": L, "clip_g": G}, torch.cat([L, G], 1), {"clip_l": 768, "clip_g": 1280}),
    ({"text_encoders_1": G, "text_encoders_0": L}, torch.cat([L, G], 1), {"clip_l": 768, "clip_g": 1280}),
    ({"clip_l": L}, L, {"clip_l": 768}),
    ({"clip_h": H}, H, {"clip_h": 1024}),
    ({"emb_params": L}, L, {"clip_l": 768}),
    (WEB_UI, L, {"clip_l": 768}),
])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_words_that_are_called_as_their_file(
    content: dict[str, Any], vectors: Tensor, parts: dict[str, int], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"my style{suffix}"
    if suffix == ".pt" and "emb_params" not in content:
        torch.save(content, path)
    else:
        path = path.with_suffix(".safetensors")
        save_file(content if content is not WEB_UI else {"string_to_param.*": L}, path)
    (word,) = load_concepts(path)
    assert word.placeholder == "<my-style>" and torch.equal(word.vectors, vectors) and word.word_parts == parts


def test_second_file_of_diffusers_is_for_the_second_text_encoder(tmp_path: Path) -> None:
    save_file({"<cat>": L}, tmp_path / "learned_embeds.safetensors")
    (alone,) = load_concepts(tmp_path / "learned_embeds.safetensors")
    save_file({"<cat>": G}, tmp_path / "learned_embeds_2.safetensors")
    (both,) = load_concepts(tmp_path / "learned_embeds.safetensors")
    assert torch.equal(alone.vectors, L) and torch.equal(both.vectors, torch.cat([L, G], 1))
    assert both.placeholder == "<cat>" and both.word_parts == {"clip_l": 768, "clip_g": 1280}
    save_file({"<dog>": G}, tmp_path / "learned_embeds_2.safetensors")
    assert torch.equal(load_concepts(tmp_path / "learned_embeds.safetensors")[0].vectors, L)


def test_images_of_the_web_ui(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"

    def write(text: str) -> None:
        info = PngInfo()
        info.add_text("sd-ti-embedding", text)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)

    content = {**WEB_UI, "string_to_param": {"*": {"TORCHTENSOR": L.tolist()}}}
    write(base64.b64encode(json.dumps(content).encode()).decode())
    (word,) = load_concepts(path)
    assert word.placeholder == "<cat>" and torch.equal(word.vectors, L)
    for damaged in (b"", b"!!", base64.b64encode(b"{"), base64.b64encode(b'{"a": {"TORCHTENSOR": "x"}}')):
        write(damaged.decode())
        with pytest.raises(UserError, match="whose embedding cannot be read"):
            load_concepts(path)
    write(base64.b64encode(b"[1]").decode())
    with pytest.raises(UserError, match="not written by Textual Inversion"):
        load_concepts(path)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match="is an image"):
        load_concepts(path)


def test_two_text_encoders_need_as_many_vectors(tmp_path: Path) -> None:
    save_file({"clip_l": L, "clip_g": G[:1]}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"different numbers of vectors .*\(clip_l 2, clip_g 1\)"):
        load_concepts(tmp_path / "x.safetensors")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize(("content", "named"), [
    ([1, 2], "not written by Textual Inversion"),
    ({}, "not written by Textual Inversion"),
    ({"*": "text"}, "not written by Textual Inversion"),
    ({"string_to_param": {"*": torch.zeros(2, 2, 2)}}, "not written by Textual Inversion"),
    ({"string_to_param": {"*": torch.zeros(2)}, "string_to_token": {"*": "x"}}, "not written by Textual Inversion"),
    ({"string_to_param": {"*": torch.tensor([float("nan")])}}, "not finite"),
    ({"string_to_param": Hostile()}, "holds more than weights"),
])
def test_other_files_are_refused(content: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "embeddings.pt")
    with pytest.raises(UserError, match=named):
        load_learned_words("embeddings.pt")
    assert not Path("touched").exists()


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_learned_words(tmp_path / "none.pt")
    path = save_learned_words(tmp_path / "embeddings.pt", TOKENS, WORDS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off"):
        load_learned_words(path)
