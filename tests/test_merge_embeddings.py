"""The merge script as a user runs it: once as its own process, otherwise in this process to save time."""
from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import merge_embeddings
from ldm.common.paths import quote_command
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.embedding_file import load_learned_words, save_learned_words
from ldm.concepts.storage import load_concepts
from ldm.concepts.thumbnail import read_thumbnail, stored_thumbnail
from ldm.modules.covariance_files import save_covariance
from ldm.modules.encoders.modules import TOKENIZER

ROOT = Path(__file__).resolve().parents[1]


def save_concept(path: Path, placeholder: str, super_category: str, base: str = "f" * 64) -> Path:
    torch.manual_seed(len(str(path)))
    vectors = {"embedding": torch.randn(1, 4), "target_input": torch.randn(6), "super_input": torch.randn(6)}
    outputs = {"middle_block.1.attn2": torch.randn(5)}
    concept = Concept(placeholder, super_category, target_outputs_v=outputs, base=base, **vectors)
    return save_perfusion_concepts(path, [concept])


def merge(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_embeddings.py", *map(str, arguments)])
    merge_embeddings.main()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    one = save_concept(tmp_path / "one.safetensors", "<pet>", "dog")
    return one, save_concept(tmp_path / "other.safetensors", "<pet>", "teddy bear")


@pytest.mark.slow
def test_the_output_lists_the_concepts_and_how_to_use_them(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "new folder" / "both.safetensors"
    command = [sys.executable, "merge_embeddings.py", "--manager_ckpts", *files, "--output_path", output]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    merged = load_perfusion_concepts(output)
    assert [concept.placeholder for concept in merged] == ["<pet>", "<pet-2>"]
    for concept, path in zip(merged, files, strict=True):
        (original,) = load_perfusion_concepts(path)
        mine, theirs = dict(concept.tensors()), dict(original.tensors())
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert f"<pet>: dog, from {files[0]}\n" in result.stdout
    assert f"<pet-2>: teddy bear, from {files[1]}, was <pet>\n" in result.stdout
    assert f"{output.stat().st_size / 1000:.1f} KB" in result.stdout
    assert f'--concept {quote_command(output)} --prompt "a photo of a <pet> next to a <pet-2>"' in result.stdout


def test_placeholders_can_be_given_and_an_input_can_be_overwritten(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--placeholders", "<rex>", "<bear>"]
    merge(monkeypatch, "--manager_ckpts", *files, "--output_path", files[0], *words)
    assert [concept.placeholder for concept in load_perfusion_concepts(files[0])] == ["<rex>", "<bear>"]
    assert "(replaced)" in capsys.readouterr().out


def test_errors_are_one_line(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "both.safetensors"
    foreign = save_concept(tmp_path / "foreign.safetensors", "<x>", "cat", base="0" * 64)
    before = foreign.read_bytes()
    for inputs, target, words, message in (
        ((files[0], foreign), output, (), str(foreign)),
        ((files[0], tmp_path / "none.safetensors"), output, (), "no such file"),
        (files, tmp_path, (), "is a folder"),
        (files, foreign / "x.safetensors", (), "cannot be written"),
        (files, output, ("--placeholders", "<Teddy>", "<teddy>"), "placeholder <teddy> is given twice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            merge(monkeypatch, "--manager_ckpts", *inputs, "--output_path", target, *words)
        errors = capsys.readouterr().err
        assert stopped.value.code == 2
        assert errors.startswith("error: ")
        assert message in errors
        assert errors.count("\n") == 1
    assert not output.exists()
    assert foreign.read_bytes() == before


def test_an_older_file_gets_its_dual_from_a_covariance_and_merges_without(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are as older ones: without duals."""
    covariance = save_covariance(tmp_path / "c.safetensors", 2 * torch.eye(6), source="", captions=1, tokens="",
                                 encoder="")
    newer, output = tmp_path / "newer.safetensors", tmp_path / "both.safetensors"
    merge(monkeypatch, "--manager_ckpts", files[0], "--output_path", newer, "--covariance", covariance)
    assert "From older files" not in capsys.readouterr().out
    (upgraded,) = load_perfusion_concepts(newer)
    torch.testing.assert_close(upgraded.dual, upgraded.target_input / 2 / (1 + 1e-4))
    merge(monkeypatch, "--manager_ckpts", newer, files[1], "--output_path", output)
    assert "From older files, which lack" in (printed := capsys.readouterr().out) and ": <pet-2>." in printed
    first, second = load_perfusion_concepts(output)
    assert torch.equal(first.dual, upgraded.dual) and second.dual is None


def test_a_merged_file_may_have_a_thumbnail(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    output = tmp_path / "out.safetensors"
    for path in files:
        merge(monkeypatch, "--manager_ckpts", path, "--output_path", path, "--thumbnail", tmp_path / "red.png")
    merge(monkeypatch, "--manager_ckpts", *files, "--output_path", output, "--thumbnail")
    assert read_thumbnail(stored_thumbnail(output)).size == (128, 64)
    merge(monkeypatch, "--manager_ckpts", *files, "--output_path", output)
    assert stored_thumbnail(output) == ""
    with pytest.raises(SystemExit):
        merge(monkeypatch, "--manager_ckpts", output, "--output_path", output, "--thumbnail")
    assert "none of the files has one; name an image" in capsys.readouterr().err


@pytest.fixture
def public_files(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of Textual Inversion's public code for Stable Diffusion, both with the placeholder "*"."""
    for name, vectors in (("a", torch.arange(1536.0).view(2, 768)), ("b", torch.full((1, 768), 0.1))):
        words = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
        torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}, tmp_path / f"{name}.pt")
    return tmp_path / "a.pt", tmp_path / "b.pt"


@pytest.mark.parametrize(("answers", "word"), [(["*", "two tokens", "@"], "@"), (["%"], "%"), ([], "@")])
def test_public_files_are_merged_and_ask_for_words(
    answers: list[str], word: str, public_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
    output = tmp_path / "c.pt"
    merge(monkeypatch, "--manager_ckpts", *public_files, "--output_path", output, "-sd")
    first, second = load_learned_words(output)
    assert (first.word, first.token, second.word) == ("*", 265, word)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    assert [second.token] == tokenizer(word, add_special_tokens=False)["input_ids"]
    for merged, path in ((first, public_files[0]), (second, public_files[1])):
        assert torch.equal(merged.vectors, load_learned_words(path)[0].vectors)
    assert f"  {word}: 1 vectors, from {public_files[1]}" in capsys.readouterr().out


def test_public_files_take_any_words_by_flag(
    public_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "c.pt"
    merge(monkeypatch, "--manager_ckpts", *public_files, "--output_path", output, "--placeholders", "<a>", "<b>")
    assert [(word.word, word.token) for word in load_learned_words(output)] == [("<a>", 49408), ("<b>", 49409)]


def test_public_files_and_concept_files_combine_to_concept_files(
    files: tuple[Path, Path], public_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    word = save_learned_words(tmp_path / "style.pt", {}, {"<style>": torch.arange(8.0).view(2, 4) / 3})
    both = tmp_path / "both.safetensors"
    merge(monkeypatch, "--manager_ckpts", word, *files, "--output_path", both)
    assert f"{both}: 3 concepts" in capsys.readouterr().out
    *concepts, style = load_concepts(both)
    assert [concept.placeholder for concept in concepts] == ["<pet>", "<pet-2>"]
    assert torch.equal(concepts[0].embedding, load_perfusion_concepts(files[0])[0].embedding)
    assert (style.placeholder, style.method) == ("<style>", "textual-inversion") and style.fits_any_base
    assert torch.equal(style.vectors, load_learned_words(word)[0].vectors)
    merge(monkeypatch, "--manager_ckpts", both, "--output_path", both, "--placeholders", "<a>", "<b>", "<c>")
    assert [concept.placeholder for concept in load_concepts(both)] == ["<a>", "<b>", "<c>"]
    merge(monkeypatch, "--manager_ckpts", *public_files, "--output_path", tmp_path / "words.safetensors")
    assert [concept.placeholder for concept in load_concepts(tmp_path / "words.safetensors")] == ["*", "*-2"]


def test_files_that_do_not_combine(
    files: tuple[Path, Path], public_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    wide_of_two = tmp_path / "two.safetensors"
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, wide_of_two)
    wide = save_learned_words(tmp_path / "wide.pt", {"*": torch.tensor(1)}, {"*": torch.zeros(1, 9)})
    for inputs, name, words, message in (
        ((files[0], public_files[0]), "c.safetensors", (), "only concepts of one base model can be used together"),
        ((wide_of_two, wide_of_two), "c.pt", (), "has vectors for two text encoders"),
        ((public_files[0], wide), "c.pt", (), "have width 9, those of"),
        (public_files, "c.pt", ("--placeholders", "<a>"), "give 2 different words"),
    ):
        with pytest.raises(SystemExit):
            merge(monkeypatch, "--manager_ckpts", *inputs, "--output_path", tmp_path / name, *words)
        assert message in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_the_script_does_not_import_slow_libraries() -> None:
    slow = "('pytorch_lightning', 'transformers')"
    probe = f"import sys, merge_embeddings; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
