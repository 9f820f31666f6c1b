"""The export script, and that the other tools read what it writes: diffusers itself, others by their layout."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.model_files import error_line, load_main
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import load_concepts
from ldm.concepts.word_export import export_word
from ldm.modules.encoders.clip import TOKENIZER

main = load_main("export_concept")
WIDTHS = {768: {"clip_l": 768}, 1024: {"clip_h": 1024}, 2048: {"clip_l": 768, "clip_g": 1280}}


def save_concept(path: Path, width: int, placeholder: str = "<my-teddy>") -> Tensor:
    """Write a concept of Perfusion; return its word embedding."""
    concept = Concept(placeholder, "teddy bear", torch.randn(1, width).half().float(), torch.ones(width),
                      torch.ones(width), {"attn2": torch.ones(3)}, base="f" * 64)
    save_perfusion_concepts(path, [concept])
    return concept.embedding


def export(path: Path, tool: str) -> list[Path]:
    main([str(path), "--to", tool, "--out", str(path.parent / tool)])
    return sorted((path.parent / tool).iterdir())


@pytest.mark.parametrize("width", WIDTHS)
def test_comfyui_and_the_web_ui(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = save_concept(tmp_path / "c.safetensors", width)
    (comfyui,) = export(tmp_path / "c.safetensors", "comfyui")
    stored = load_file(comfyui)
    assert comfyui.name == "my-teddy.safetensors"
    assert {name: part.shape[1] for name, part in stored.items()} == WIDTHS[width]
    assert torch.equal(torch.cat([stored[name] for name in WIDTHS[width]], 1).float(), vector)
    (web_ui,) = export(tmp_path / "c.safetensors", "a1111")
    if width == 2048:
        assert load_file(web_ui).keys() == {"clip_l", "clip_g"}
    else:
        content = torch.load(web_ui, weights_only=True)
        assert torch.equal(content["string_to_param"]["*"], vector) and content["name"] == "my-teddy"
    for path in (comfyui, web_ui):
        (word,) = load_concepts(path)  # and back
        assert word.placeholder == "<my-teddy>" and torch.equal(word.vectors, vector)
    out = capsys.readouterr().out
    assert "the word <my-teddy> alone, without the edit" in out and "write embedding:my-teddy in prompts" in out


def word(vectors: Tensor, **parts: int) -> FinetunedConcept:
    return FinetunedConcept("textual-inversion", "<my-teddy>", "teddy bear", vectors, word_parts=parts)


def tower(kind: Any, width: int) -> Any:
    return kind(CLIPTextConfig(hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                               vocab_size=49408, max_position_embeddings=16, projection_dim=8))


def embedding_of(pipe: Any, text: str, second: str = "") -> Tensor:
    """Return the embedding (k, width) that a prompt gets from the tokens of a word."""
    tokenizer, encoder = getattr(pipe, f"tokenizer{second}"), getattr(pipe, f"text_encoder{second}")
    tokens = tokenizer(pipe.maybe_convert_prompt(text, tokenizer), return_tensors="pt", add_special_tokens=False)
    return encoder.get_input_embeddings()(tokens["input_ids"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_loads_the_word_of_two_text_encoders(count: int, tmp_path: Path) -> None:
    vectors = torch.randn(count, 40)
    first, second = export_word(word(vectors, clip_l=16, clip_g=24), "diffusers", tmp_path)
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2)]
    pipe = StableDiffusionXLPipeline(None, tower(CLIPTextModel, 16), tower(CLIPTextModelWithProjection, 24),
                                     *tokenizers, None, None, add_watermarker=False)
    pipe.load_textual_inversion(str(first))
    pipe.load_textual_inversion(str(second), text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    assert torch.equal(embedding_of(pipe, "<my-teddy>"), vectors[:, :16])
    assert torch.equal(embedding_of(pipe, "<my-teddy>", "_2"), vectors[:, 16:])
    assert torch.equal(load_concepts(first)[0].vectors, vectors)  # and back, from both files


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["diffusers", "a1111"])
def test_diffusers_loads_words_of_one_text_encoder(tool: str, tmp_path: Path) -> None:
    vectors = torch.randn(2, 16)
    (path,) = export_word(word(vectors, clip_l=16), tool, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    pipe = StableDiffusionPipeline(None, tower(CLIPTextModel, 16), tokenizer, None, None, None, None,
                                   requires_safety_checker=False)
    pipe.load_textual_inversion(str(path))
    assert torch.equal(embedding_of(pipe, "<my-teddy>" if tool == "diffusers" else "my-teddy"), vectors)


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_concept(tmp_path / "bert.safetensors", 1280)
    for name, word in (("one", "<teddy>"), ("two", "teddy")):
        save_concept(tmp_path / f"{name}.safetensors", 768, word)
    (tmp_path / "text.safetensors").write_text("some text, and no concept at all")
    for names, message in ((["bert"], "whose text encoder no other tool has"),
                           (["one", "two"], "several concepts would be called teddy"),
                           (["text"], "is a text file"), (["none"], "no such file")):
        files = [str(tmp_path / f"{name}.safetensors") for name in names]
        assert message in error_line(main, [*files, "--to", "comfyui", "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()
