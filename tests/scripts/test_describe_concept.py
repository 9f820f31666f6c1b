"""The script says in words what concept files hold."""
from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.concept_values import FIRST, make_concept, randn
from PIL import Image

from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import save_concepts
from ldm.concepts.thumbnail import make_thumbnail


def test_files_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"clip_l": 3, "clip_g": 5}
    concepts = [make_concept("<a>", date="2026-01-31", used_layers=[FIRST], base_name="dreamer", dual=None),
                make_concept("<b>", trained_keys=True)]
    both = save_perfusion_concepts(tmp_path / "both.safetensors", concepts)
    two_parts = make_concept(embedding=randn(1, 8), word_parts=parts)
    wide = save_perfusion_concepts(tmp_path / "wide.safetensors", [two_parts])
    word = save_concepts(tmp_path / "word.safetensors", [FinetunedConcept("textual-inversion", "<w>", "cat",
                                                                          torch.ones(2, 768))])
    import_module("scripts.describe_concept").main([str(both), str(wide), str(word)])
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("both.safetensors: Perfusion, 2 concepts, ", "<a> super-category teddy bear base model dreamer, ",
                 "learned on 2026-01-31", "gate bias 0.75, temperature 0.1, 1 of 2 layers", "2 layers, keys trained",
                 "dual vector no, from an older version", "dual vector yes", "clip_l (3 numbers) and clip_g (5 num",
                 "pooled vector of super-category", "word.safetensors: Textual Inversion, 1 concept, "):
        assert text in printed, text


def test_a_thumbnail_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = import_module("scripts.describe_concept").main
    shown = make_concept(thumbnail=make_thumbnail(Image.new("RGB", (40, 20))))
    path = save_perfusion_concepts(tmp_path / "a.safetensors", [shown])
    main([str(path), "--thumbnail", str(tmp_path / "a.jpg")])
    assert Image.open(tmp_path / "a.jpg").size == (40, 20)
    assert "thumbnail" in capsys.readouterr().out
    plain = save_perfusion_concepts(tmp_path / "b.safetensors", [make_concept()])
    for arguments, message in (
        ([plain, "--thumbnail", tmp_path / "b.jpg"], "holds no thumbnail"),
        ([plain, path, "--thumbnail", tmp_path / "b.jpg"], "2 files; give one"),
        ([path, "--thumbnail", path / "b.jpg"], "--thumbnail"),
        ([tmp_path / "none.safetensors"], "no such file"),
    ):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
