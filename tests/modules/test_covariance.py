"""The covariance against plain loops over the encodings of Transformers; its files and its cache."""
from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig

from ldm.common.errors import UserError
from ldm.common.files import load_tensors, save_tensors
from ldm.modules import covariance_files
from ldm.modules.covariance import (
    condition_number,
    default_captions,
    encoder_fingerprint,
    estimate_covariance,
    mean_energy,
    read_captions,
    spread_evenly,
    token_covariance,
)
from ldm.modules.covariance_files import cached_covariance, load_covariance, save_covariance
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.rank_one import invert_covariance

WIDTH, LENGTH, START, END = 16, 12, 49406, 49407
CAPTIONS = ["a photo of a red mug", "", "mug", "the old teddy bear sits on a chair", "two mugs"]
LONG = "one two three four five six seven eight nine ten eleven"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                   vocab_size=END + 1, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=END,
                   pad_token_id=END).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    embedder = FrozenCLIPEmbedder(str(folder), max_length=LENGTH)
    for parameter in embedder.parameters():
        parameter.mul_(10)  # larger weights, so that words attend to each other
    return embedder


def loop_covariance(embedder: FrozenCLIPEmbedder, captions: list[str], tokens: str) -> Tensor:
    """Average products token by token in float64, with captions padded to the full length by the tokenizer."""
    products = []
    for caption in captions:
        row = embedder.tokenizer(caption, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
        encoding = embedder.transformer(input_ids=row).last_hidden_state[0].double()
        words = LENGTH - 1 - int((row == END).sum())
        for position, vector in enumerate(encoding):
            counts = 1 <= position <= words
            if tokens == "all" or (tokens == "no_padding" and position <= words + 1) or counts:
                products.append(torch.outer(vector, vector))
    return torch.stack(products).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["words", "no_padding", "all"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_covariance_is_the_mean_over_the_tokens_that_count(
    embedder: FrozenCLIPEmbedder, tokens: str, batch_size: int
) -> None:
    found = token_covariance(embedder, CAPTIONS, tokens, batch_size, progress=False)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, loop_covariance(embedder, CAPTIONS, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "count"), [("words", 6 + 0 + 1 + 8 + 2), ("no_padding", 17 + 2 * 5), ("all", 60)])
def test_an_estimate_reports_its_counts(embedder: FrozenCLIPEmbedder, tokens: str, count: int) -> None:
    found = estimate_covariance(embedder, CAPTIONS, tokens, progress=False)
    assert (found.tokens, found.captions, found.skipped) == (count, 5, 0)


def test_captions_that_are_too_long_are_left_out_and_counted(
    embedder: FrozenCLIPEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = estimate_covariance(embedder, [LONG, *CAPTIONS], progress=False)
    assert (found.captions, found.skipped) == (5, 1)
    assert "1 of 6 captions left out: more than 10 tokens" in caplog.text
    assert torch.equal(found.covariance, token_covariance(embedder, CAPTIONS, progress=False))


def test_a_caption_of_the_maximum_length_counts_completely(embedder: FrozenCLIPEmbedder) -> None:
    longest = [LONG.rpartition(" ")[0]]
    for tokens, count in (("words", 10), ("no_padding", 12), ("all", 12)):
        assert estimate_covariance(embedder, longest, tokens, progress=False).tokens == count


def test_an_encoder_that_is_not_causal_gets_padding(
    embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embedder.encode_tokens

    def reads_ahead(tokens: Tensor) -> Tensor:
        encoding = plain(tokens)
        return encoding + encoding.mean(1, keepdim=True)

    monkeypatch.setattr(embedder, "encode_tokens", reads_ahead)
    found = token_covariance(embedder, CAPTIONS, progress=False)
    vectors = [row[1:1 + len(embedder.word_pieces(caption))] for caption, row in
               zip(CAPTIONS, reads_ahead(embedder.tokenize(CAPTIONS)), strict=True)]
    rows = torch.cat(vectors).double()
    torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("captions", "tokens", "message"), [
    (["", " "], "words", "no token"), ([], "all", "no token"), ([LONG], "all", "no token"),
    (["mug"], "some", "tokens 'some': give one of words, no_padding, all"),
])
def test_an_empty_selection_is_refused(
    embedder: FrozenCLIPEmbedder, captions: list[str], tokens: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        token_covariance(embedder, captions, tokens, progress=False)


def test_encodings_that_are_not_finite_are_refused(
    embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embedder.encode_tokens
    monkeypatch.setattr(embedder, "encode_tokens", lambda tokens: plain(tokens) / 0)
    with pytest.raises(UserError, match="not finite"):
        token_covariance(embedder, CAPTIONS, progress=False)


def test_the_result_can_be_used_in_training(embedder: FrozenCLIPEmbedder) -> None:
    found = token_covariance(embedder, CAPTIONS, progress=False)
    vector = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
    (found @ vector).square().sum().backward()  # fails for tensors of inference mode
    assert vector.grad.any()


def test_the_default_captions_are_class_names_in_templates() -> None:
    captions = default_captions()
    assert len(captions) == 80_000
    assert "a photo of a tench." in captions
    assert default_captions(100) == spread_evenly(captions, 100)


@pytest.mark.parametrize("limit", [1, 80, 800, 1000, 8192, 79_999])
def test_a_subset_is_spread_over_names_and_templates(limit: int) -> None:
    pairs = [(name, template) for name in range(1000) for template in range(80)]
    chosen = spread_evenly(pairs, limit)
    assert len(set(chosen)) == len(chosen) == limit
    blocks = Counter(name // 10 for name, _ in chosen)
    templates = Counter(template for _, template in chosen)
    assert max(blocks.values()) <= limit / 100 + 3
    assert max(templates.values()) <= limit / 80 + 1


def test_a_larger_subset_contains_the_smaller_one() -> None:
    words = [str(number) for number in range(97)]
    assert spread_evenly(words, 50)[:20] == spread_evenly(words, 20)
    assert spread_evenly(words, None) == spread_evenly(words, 97) == spread_evenly(words, 1000) == words


@pytest.mark.slow
def test_the_estimate_converges(embedder: FrozenCLIPEmbedder) -> None:
    corpus = default_captions(3000)
    whole = token_covariance(embedder, corpus, progress=False)
    parts = [token_covariance(embedder, corpus[:limit], progress=False) for limit in (40, 1200)]
    few, many = ((part - whole).norm() / whole.norm() for part in parts)
    assert many < few / 2
    assert many < 0.02


def test_the_condition_number_is_that_of_the_ridged_covariance() -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = rows.T @ rows * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])  # one column empty
    covariance[4] = 0
    inverse = invert_covariance(covariance, ridge=1e-3).double()
    assert condition_number(covariance, ridge=1e-3) == pytest.approx(np.linalg.cond(inverse.numpy()), rel=1e-4)


def test_the_mean_energy_of_the_corpus_bounds_similarity() -> None:
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 0] += 5
    covariance = rows.T @ rows / len(rows)
    inverse = invert_covariance(covariance).double()
    energies = torch.stack([row @ inverse @ row for row in rows])
    assert mean_energy(covariance) == pytest.approx(energies.mean().item(), rel=1e-5)
    assert mean_energy(covariance, ridge=0) == pytest.approx(6)
    similarities = rows @ inverse @ rows.T / energies
    assert (similarities.square().mean(0).sqrt() <= energies.rsqrt() * (1 + 1e-6)).all()


def test_the_fingerprint_depends_on_weights_and_layer_but_not_on_precision(
    embedder: FrozenCLIPEmbedder, folder: Path
) -> None:
    original = {name: tensor.clone() for name, tensor in embedder.state_dict().items()}
    fingerprints = []
    for layer in ({}, {"layer": "hidden", "layer_idx": 1}):
        other = FrozenCLIPEmbedder(str(folder), max_length=LENGTH, **layer)
        other.load_state_dict({name: tensor.half() for name, tensor in original.items()})
        fingerprints += [encoder_fingerprint(other), encoder_fingerprint(other.half())]
    assert fingerprints[0] == fingerprints[1] == encoder_fingerprint(embedder)
    assert fingerprints[2] == fingerprints[3] != fingerprints[0]
    other.token_table[5, 3] += 0.5
    assert encoder_fingerprint(other) != fingerprints[2]


def save_random(path: Path, encoder: str = "e" * 64) -> Tensor:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_covariance(path, rows.T @ rows, source="captions.txt", captions=9, tokens="words", encoder=encoder)
    return rows.T @ rows


def test_a_file_contains_float32_and_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "new" / "c.safetensors"
    covariance = save_random(path)
    assert torch.equal(load_covariance(path), covariance.float())
    assert torch.equal(load_covariance(path, "e" * 64), covariance.float())
    assert load_tensors(path)[1]["covariance"] == {
        "format_version": 1, "source": "captions.txt", "captions": 9, "tokens": "words", "encoder": "e" * 64}


def test_a_file_of_another_encoder_is_refused(tmp_path: Path) -> None:
    save_random(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"c\.safetensors: .*eeeeeeeeeeee.*ffffffffffff.*compute_covariance\.py"):
        load_covariance(tmp_path / "c.safetensors", "f" * 64)


@pytest.mark.parametrize(("tensors", "metadata"), [
    ({"covariance": torch.eye(3)}, {}),
    ({"other": torch.eye(3)}, {"covariance": {"format_version": 1, "encoder": ""}}),
    ({"covariance": torch.eye(3)}, {"covariance": {"format_version": 2, "encoder": ""}}),
    ({"covariance": torch.eye(3)}, {"covariance": ["format_version"]}),
    ({"covariance": torch.ones(2, 3)}, {"covariance": {"format_version": 1, "encoder": ""}}),
    ({"covariance": torch.full((2, 2), float("nan"))}, {"covariance": {"format_version": 1, "encoder": ""}}),
])
def test_files_without_a_covariance_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]
) -> None:
    path = save_tensors(tmp_path / "c.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"c\.safetensors: .*compute_covariance\.py"):
        load_covariance(path)


class CallCounter:
    """Counts the calls of a text encoder."""

    def __init__(self, embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.plain = 0, embedder.encode_tokens
        monkeypatch.setattr(embedder, "encode_tokens", self.encode)

    def encode(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return self.plain(tokens)

    def was_called(self) -> bool:
        runs, self.runs = self.runs, 0
        return runs > 0


@pytest.fixture
def counter(embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch) -> CallCounter:
    return CallCounter(embedder, monkeypatch)


def test_it_is_computed_once_per_encoder_corpus_and_choice_of_tokens(
    embedder: FrozenCLIPEmbedder, counter: CallCounter, tmp_path: Path
) -> None:
    first = cached_covariance(embedder, tmp_path, CAPTIONS, progress=False)
    assert counter.was_called()
    assert torch.equal(cached_covariance(embedder, tmp_path, CAPTIONS, progress=False), first)
    assert not counter.was_called()
    torch.testing.assert_close(first, loop_covariance(embedder, CAPTIONS, "words").float(), rtol=1e-5, atol=1e-5)
    cached_covariance(embedder, tmp_path, CAPTIONS, "all", progress=False)
    assert counter.was_called()
    cached_covariance(embedder, tmp_path, CAPTIONS[1:], progress=False)
    assert counter.was_called()
    weight = embedder.token_table[700]
    weight += 1
    cached_covariance(embedder, tmp_path, CAPTIONS, progress=False)
    weight -= 1
    assert counter.was_called()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_broken_cache_file_is_replaced(
    embedder: FrozenCLIPEmbedder, counter: CallCounter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = cached_covariance(embedder, tmp_path, CAPTIONS, progress=False)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    counter.was_called()
    assert torch.equal(cached_covariance(embedder, tmp_path, CAPTIONS, progress=False), first)
    assert counter.was_called()
    assert "computing it again" in caplog.text
    assert torch.equal(load_covariance(path, encoder_fingerprint(embedder)), first)


def test_a_cache_that_cannot_be_written_is_not_an_error(
    embedder: FrozenCLIPEmbedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = cached_covariance(embedder, tmp_path / "file", CAPTIONS, progress=False)
    assert found.shape == (WIDTH, WIDTH)
    assert "PERFUSION_CACHE" in caplog.text


@pytest.mark.parametrize("variable", [True, False])
def test_the_cache_is_in_the_users_folder_or_at_home(
    embedder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: bool
) -> None:
    monkeypatch.setattr(covariance_files, "default_captions", lambda limit: [f"{limit} mugs"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PERFUSION_CACHE", raising=False)
    if variable:
        monkeypatch.setenv("PERFUSION_CACHE", str(tmp_path / "elsewhere"))
    found = cached_covariance(embedder, progress=False)
    assert len(list((tmp_path / ("elsewhere" if variable else ".cache/perfusion")).glob("*.safetensors"))) == 1
    assert torch.equal(found, token_covariance(embedder, ["8192 mugs"], progress=False).float())


def test_caption_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa mug\r\n\n  \n ein Bär \n".encode())
    assert read_captions(path) == ["a mug", "ein Bär"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "no such file"), (b"", "no captions"), (b"\n \n", "no captions"),
    (b"\xff\xfe\x00a", "not a UTF-8 text file"),
    (b"PK\x03\x00\x00", "not a UTF-8 text file"),
])
def test_invalid_caption_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"captions\.txt: {message}"):
        read_captions(path)
