"""FrozenCLIPEmbedder with a tiny tower, against transformers' model of the same tower."""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoints.load import load_weights
from ldm.common.errors import UserError
from ldm.common.words import replace_words
from ldm.modules.encoders.clip import KNOWN_TOWERS
from ldm.modules.encoders.modules import TOKENIZER, FrozenCLIPEmbedder, split_at_placeholders

PROMPTS = ["a photo of a teddy bear", "", "It's a café -- with 3 supercalifragilistic owls!"]
WIDTH, WORDS = 8, 49408
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 24,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
    "initializer_factor": 20.0,
}


@pytest.fixture(scope="module", autouse=True)
def tokenizers_are_read_once() -> Iterator[None]:
    """Cache the tokenizers: reading CLIP's word pieces takes most of a second."""
    with mock.patch.object(CLIPTokenizer, "from_pretrained", functools.cache(CLIPTokenizer.from_pretrained)):
        yield


@pytest.fixture(scope="module")
def tower() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def folder(tower: CLIPTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(str(folder), max_length=24)


def reference_tokens(prompts: list[str], length: int = 24) -> Tensor:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def test_equals_the_plain_tower(encoder: FrozenCLIPEmbedder, tower: CLIPTextModel) -> None:
    expected = tower(reference_tokens(PROMPTS)).last_hidden_state
    assert encoder(PROMPTS).shape == (3, 24, WIDTH)
    assert torch.allclose(encoder(PROMPTS), expected, atol=1e-5)
    assert torch.allclose(encoder.encode(PROMPTS[0]), expected[:1], atol=1e-5)


def test_tokens_equal_clips(encoder: FrozenCLIPEmbedder) -> None:
    assert torch.equal(encoder.tokenize(PROMPTS), reference_tokens(PROMPTS))
    assert encoder.word_pieces("supercalifragilistic") == reference_tokens(["supercalifragilistic"])[0, 1:6].tolist()


@pytest.mark.parametrize("layer_idx", [0, 1, -1])
def test_hidden_layers(folder: Path, tower: CLIPTextModel, layer_idx: int) -> None:
    hidden = FrozenCLIPEmbedder(str(folder), max_length=24, layer="hidden", layer_idx=layer_idx)
    output = tower(reference_tokens(PROMPTS), output_hidden_states=True)
    assert torch.allclose(hidden(PROMPTS), output.hidden_states[layer_idx], atol=1e-5)
    if layer_idx == -1:  # the output of the last layer lacks the final norm only
        assert torch.allclose(tower.final_layer_norm(hidden(PROMPTS)), output.last_hidden_state, atol=1e-5)


def test_known_towers_draw_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN_TOWERS, "tiny", {key: SHAPE[key] for key in SHAPE if key != "vocab_size"
                                               and not key.endswith("token_id")})
    before = torch.get_rng_state()
    encoder = FrozenCLIPEmbedder("tiny", max_length=24)
    assert encoder.awaits_weights and torch.equal(torch.get_rng_state(), before)


def test_the_pooled_layer_is_the_encoding_of_the_end_token(folder: Path, tower: CLIPTextModel) -> None:
    pooled = FrozenCLIPEmbedder(str(folder), max_length=24, layer="pooled")
    assert torch.allclose(pooled(PROMPTS), tower(reference_tokens(PROMPTS)).pooler_output[:, None], atol=1e-5)


def test_public_code_reaches_the_table_and_extends_it(folder: Path) -> None:
    encoder = FrozenCLIPEmbedder(str(folder), max_length=24)
    assert encoder.transformer.text_model.embeddings.token_embedding.weight is encoder.token_table
    assert copy.deepcopy(encoder).transformer.text_model.embeddings is not encoder.transformer.embeddings
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)  # the other tests share it
    encoder.tokenizer.add_tokens("<new1>")  # as Custom Diffusion adds its words
    encoder.transformer.resize_token_embeddings(len(encoder.tokenizer))
    encoder.transformer.get_input_embeddings().weight.data[-1] = encoder.token_table[encoder.word_pieces("owl")]
    assert encoder.tokenize(["<new1>"])[0, 1] == len(encoder.tokenizer) - 1
    assert torch.allclose(encoder("a <new1> here"), encoder("a owl here"), atol=1e-5)


def test_a_placeholder_is_one_token(encoder: FrozenCLIPEmbedder) -> None:
    row = encoder.tokenize(["a photo of <my-teddy> on Teddy*'s table"], ["teddy*", "<my-teddy>"])[0].tolist()
    before, between, after = (encoder.word_pieces(text) for text in ("a photo of", "on", "'s table"))
    expected = [49406, *before, WORDS + 1, *between, WORDS, *after]
    assert row == expected + [49407] * (24 - len(expected))


def extend_table(tower: CLIPTextModel, vectors: Tensor) -> tuple[CLIPTextModel, nn.Parameter]:
    """Return a copy of the tower whose word table ends with the vectors, and its table, which is trainable."""
    longer = copy.deepcopy(tower)
    table = nn.Parameter(torch.cat([tower.get_input_embeddings().weight.detach(), vectors]))
    longer.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=False))
    return longer, longer.get_input_embeddings().weight


def test_vectors_and_gradients_equal_those_of_a_longer_table(
    encoder: FrozenCLIPEmbedder, tower: CLIPTextModel
) -> None:
    vectors = torch.randn(2, WIDTH, requires_grad=True)
    tokens = encoder.tokenize(["a <one> and a two next to a <one>", "two owls", "no thing"], ["<one>", "two"])
    longer, table = extend_table(tower, vectors.detach())
    weights = torch.randn(3, 24, WIDTH)
    ours, theirs = encoder.encode_tokens(tokens, vectors), longer(tokens).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert vectors.grad.abs().sum(1).gt(0).all()
    assert torch.allclose(vectors.grad, table.grad[WORDS:], atol=1e-4)
    assert all(p.grad is None for p in encoder.parameters())


def test_unused_vectors_get_no_gradient(encoder: FrozenCLIPEmbedder) -> None:
    vectors = torch.randn(2, WIDTH, requires_grad=True)
    encoder.encode_tokens(encoder.tokenize(["a two"], ["<one>", "two"]), vectors).sum().backward()
    assert not vectors.grad[0].any()


def test_the_vector_of_a_word_acts_as_that_word(encoder: FrozenCLIPEmbedder) -> None:
    bear = encoder.token_table[encoder.word_pieces("bear")]
    tokens = encoder.tokenize(["a photo of a <mine>, sitting"], ["<mine>"])
    assert torch.allclose(encoder.encode_tokens(tokens, bear), encoder("a photo of a bear, sitting"), atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "placeholders", "expected"),
    [
        ("a CAT and a cat", ["cat"], ["a ", 0, " and a ", 0]),
        ("a <toy-2> and <toy>", ["<toy>", "<toy-2>"], ["a ", 1, " and ", 0]),
        ("my red teddy bear", ["teddy", "red teddy bear"], ["my ", 1]),
        ("teddys steady teddy", ["teddy"], ["teddys steady ", 0]),
        ("a sks* dog (x.y) xay", ["sks*", "x.y"], ["a ", 0, " dog (", 1, ") xay"]),
        ("*", ["*"], [0]),
        ("<A><b>,<a>", ["<a>", "<b>"], [0, 1, ",", 0]),
        ("Straße", ["straße"], [0]),
        ("ſock", ["sock"], [0]),
        ("nothing here", ["cat"], ["nothing here"]),
        ("nothing", [], ["nothing"]),
        ("", ["cat"], []),
    ],
)
def test_split_at_placeholders(prompt: str, placeholders: list[str], expected: list[str | int]) -> None:
    assert split_at_placeholders(prompt, placeholders) == expected


@pytest.mark.parametrize(("text", "words", "expected"), [
    ("an SKS by a sks-2", {"sks": "mug", "sks-2": "owl"}, "a mug by an owl"),
    ("a sks by a Sks-2", {"sks": None, "sks-2": "owl"}, "a sks by an owl"),
    ("An sks by a Sks-2", {"sks": "mug", "sks-2": None}, "A mug by a Sks-2"),
    ("* and *-2", {"*": "mug", "*-2": "owl"}, "mug and owl"),
    ("a teddy, a my-teddy", {"teddy": "my-teddy", "my-teddy": "teddy"}, "a my-teddy, a teddy"),
    ("a sks", {}, "a sks")])
def test_replacing_placeholders_that_contain_each_other(text: str, words: dict[str, str | None], expected: str) -> None:
    assert replace_words(words, text) == replace_words(dict(reversed(words.items())), text) == expected


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("aB<->* ıſK.", max_size=4), max_size=6),
    st.lists(st.text("ab<->*iskK.", min_size=1, max_size=3), min_size=1, max_size=3, unique_by=str.casefold),
)
@example(["ı"], ["i"])
def test_splitting_keeps_all_text(words: list[str], placeholders: list[str]) -> None:
    prompt = " ".join(words)
    parts = split_at_placeholders(prompt, placeholders)
    patterns = [re.escape(part) if isinstance(part, str) else f"(?i:{re.escape(placeholders[part])})" for part in parts]
    assert re.fullmatch(r"\s*" + r"\s*".join(patterns) + r"\s*", prompt)


def test_prompts_that_are_too_long_are_refused(encoder: FrozenCLIPEmbedder) -> None:
    fits = " ".join(["owl"] * 22)
    assert encoder(fits).shape == (1, 24, WIDTH)
    for prompt, placeholders in ((fits + " owl", []), (fits + " <mine>", ["<mine>"])):
        with pytest.raises(UserError, match=r"has 23 tokens, but the text encoder takes 22; shorten it"):
            encoder.tokenize([prompt], placeholders)


def test_a_prompt_that_is_too_long_tells_the_vectors_of_placeholders(encoder: FrozenCLIPEmbedder) -> None:
    with pytest.raises(UserError, match=r"has 27 tokens \(24 of them are vectors of placeholders\), but"):
        encoder.tokenize(["a photo of <x> <y>"], ["<x>", "<y>"], [16, 8])


def test_a_prompt_in_parts_is_tokenized_part_by_part(encoder: FrozenCLIPEmbedder) -> None:
    joined, parts = encoder.tokenize(["a <x> teapot on", ["a <x>", " tea", "pot on"]], ["<x>"])
    assert not torch.equal(joined, parts)
    assert parts[1:5].tolist() == [*encoder.word_pieces("a"), len(encoder.token_table), *encoder.word_pieces("tea"),
                                   *encoder.word_pieces("pot")][:4]


def test_encoding_cuts_long_prompts_off_and_warns_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = FrozenCLIPEmbedder(str(folder), max_length=24)
    long = "a photo of " + "teddy bear " * 20
    with torch.no_grad():
        assert torch.equal(encoder.encode([long, "a cat"]), encoder.encode_tokens(reference_tokens([long, "a cat"])))
        encoder(long)
    (record,) = caplog.records
    assert "has 43 tokens, but the text encoder takes 22: the end" in record.getMessage()


def test_tokens_follow_the_weights_whatever_device_is_set(encoder: FrozenCLIPEmbedder) -> None:
    encoder.device = "cuda:3"  # as scripts do after they moved the model
    assert encoder.device == torch.device("cpu") and encoder("a cat").device == torch.device("cpu")


def test_frozen_encoders_stay_in_evaluation_mode(folder: Path) -> None:
    frozen = FrozenCLIPEmbedder(str(folder), max_length=24)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.train().training and not frozen.transformer.training
    free = FrozenCLIPEmbedder(str(folder), max_length=24, freeze=False)
    assert free.train().training and free.transformer.training
    free("a cat").sum().backward()
    rows = free.token_table.grad.abs().sum(1).nonzero().flatten().tolist()
    assert rows == sorted({49406, 49407, *free.word_pieces("a cat")})


def test_keys_are_those_of_compvis(encoder: FrozenCLIPEmbedder) -> None:
    keys = list(encoder.state_dict())
    assert len(keys) == len(set(keys)) == len(encoder.transformer.state_dict())
    assert all(key.startswith("transformer.text_model.") for key in keys)
    assert "transformer.text_model.embeddings.token_embedding.weight" in keys


class Model(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.cond_stage_model = encoder
        self.transformer = nn.Linear(2, 2)


def without_text_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("old_buffer", [False, True])
def test_both_names_of_keys_load(
    encoder: FrozenCLIPEmbedder, tmp_path: Path, short: bool, nested: bool, old_buffer: bool
) -> None:
    def make() -> nn.Module:
        another = copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer})
        nn.init.normal_(another.transformer.final_layer_norm.weight)
        return Model(another) if nested else another

    source = make()
    state = without_text_model(source.state_dict()) if short else dict(source.state_dict())
    strict = make()
    strict.load_state_dict(state)
    from_file = make()
    if old_buffer:
        prefix = "cond_stage_model." if nested else ""
        state[f"{prefix}transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    load_weights(from_file, tmp_path / "x.ckpt")
    for loaded in (strict, from_file):
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())


def test_missing_weights_are_refused(encoder: FrozenCLIPEmbedder, tmp_path: Path) -> None:
    state = encoder.state_dict()
    state.pop("transformer.text_model.final_layer_norm.bias")
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="1 keys missing .transformer.text_model.final_layer_norm.bias"):
        load_weights(encoder, tmp_path / "x.safetensors")


def test_folders_without_weights_build_a_random_tower(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    encoder = FrozenCLIPEmbedder(str(tmp_path), max_length=24)
    assert encoder("a cat").shape == (1, 24, WIDTH)


def test_the_tower_of_stable_diffusion_needs_no_download() -> None:
    with torch.device("meta"):
        encoder = FrozenCLIPEmbedder()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert encoder.transformer.config.hidden_act == "quick_gelu" and encoder.max_length == 77


def test_a_folder_may_have_its_own_tokenizer(tmp_path: Path) -> None:
    words = ["a", "b</w>", "a</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: row for row, word in enumerate(words)}, merges=[("a", "b</w>")]).save_pretrained(
        tmp_path
    )
    CLIPTextModel(CLIPTextConfig(**{**SHAPE, "vocab_size": 6, "bos_token_id": 4, "eos_token_id": 5})).save_pretrained(
        tmp_path
    )
    encoder = FrozenCLIPEmbedder(str(tmp_path), max_length=6)
    assert encoder.tokenize(["ab <x> a"], ["<x>"]).tolist() == [[4, 3, 6, 2, 5, 5]]


def test_tokenizers_with_more_words_than_the_tower_are_refused(tmp_path: Path) -> None:
    CLIPTextConfig(**{**SHAPE, "vocab_size": 100}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="49408 word pieces, its model 100"):
        FrozenCLIPEmbedder(str(tmp_path), max_length=24)


def damage(folder: Path, how: str) -> None:
    if how == "cut":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "a weight":
        state = load_file(folder / "model.safetensors")
        save_file(
            {key: value for key, value in state.items() if "final_layer_norm" not in key},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    elif how == "config":
        (folder / "config.json").write_text("{")
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["cut", "a weight", "config", "all"])
def test_damaged_towers_are_refused(folder: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copied = shutil.copytree(folder, tmp_path / "copy")
    damage(copied, how)
    with pytest.raises(UserError, match="copy") as refused:
        FrozenCLIPEmbedder(str(copied), max_length=24)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layer": "first"}, "first"),
        ({"layer": "hidden"}, "layer_idx None"),
        ({"layer_idx": 1}, "layer_idx 1"),
        ({"layer": "hidden", "layer_idx": 3}, "2 layers"),
        ({"layer": "hidden", "layer_idx": -4}, "2 layers"),
        ({"max_length": 77}, "24 tokens"),
    ],
)
def test_impossible_options_are_refused(folder: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FrozenCLIPEmbedder(**{"version": str(folder), "max_length": 24, **options})
