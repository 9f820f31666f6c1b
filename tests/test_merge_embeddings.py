"""The merge script as a user runs it: once as its own process, otherwise in this process to save time."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merge_embeddings
from ldm.common.paths import quote_command
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts

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


def test_the_script_does_not_import_slow_libraries() -> None:
    slow = "('pytorch_lightning', 'transformers')"
    probe = f"import sys, merge_embeddings; print([m for m in {slow} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
