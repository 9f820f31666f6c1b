"""LoRAs beside concepts: what the model is identified by, what locked keys are, and what cannot go together."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import WIDTH, build_model
from safetensors.torch import save_file
from torch import Tensor

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.inference.encoding import base_model_of, build_prompt_encoder
from ldm.inference.loras import add_loras
from ldm.inference.settings import LoraFile
from ldm.modules.attention import name_text_layers

LAYER = "input_blocks.1.1.transformer_blocks.0.attn2"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return build_model(tmp_path).requires_grad_(False)


@pytest.fixture
def lora(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA of W_K of one layer, of one layer of the text encoder, and of a layer that no model has."""
    names = {f"lora_unet_{LAYER.replace('.', '_')}_to_k": (32, WIDTH), "lora_unet_none": (3, 3),
             "lora_te_text_model_encoder_layers_1_mlp_fc2": (WIDTH, 24)}
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, columns)
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", tensors


def concept_of(model: Any, **changes: Any) -> Concept:
    layers = name_text_layers(model.model.diffusion_model)
    values = {name: torch.randn(len(layer.to_v.weight)) for name, layer in layers.items()}
    return Concept("<teddy>", "teddy bear", torch.randn(1, WIDTH), torch.randn(WIDTH), torch.randn(WIDTH), values,
                   dual=torch.randn(WIDTH), **{**base_model_of(model).stored, **changes})


def test_a_lora_changes_weights_and_not_what_the_base_model_is(
    model: Any, lora: tuple[Path, dict[str, Tensor]], caplog: pytest.LogCaptureFixture,
) -> None:
    path, tensors = lora
    concept, before = concept_of(model), base_model_of(model)
    to_k = name_text_layers(model.model.diffusion_model)[LAYER].to_k.weight
    merged = to_k + 0.5 * sum_of(tensors, f"lora_unet_{LAYER.replace('.', '_')}_to_k")
    with caplog.at_level(logging.INFO):
        add_loras(model, [f"{path}:0.5"])
    assert torch.allclose(to_k, merged, atol=1e-6) and base_model_of(model) == before
    assert f"LoRA {path} at 0.5: 1 layers of the U-Net, 1 of the text encoder" in caplog.messages[0]
    assert "1 names fit no layer of this model and are left out (lora_unet_none)" in caplog.messages[1]
    # keys are locked to the super-category under the weights with the LoRA
    encoder = build_prompt_encoder(model, [concept], None)
    assert len(caplog.messages) == 2  # no word of another base model
    keys = encoder._stacked_edit.target_outputs_k[LAYER]
    assert torch.allclose(keys[0], merged @ concept.super_input, atol=1e-5)


def sum_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]


def test_concepts_that_replace_the_same_weights_are_refused(model: Any, lora: tuple[Path, dict[str, Tensor]]) -> None:
    weights = {f"{LAYER}.{name}.weight": torch.zeros(32, WIDTH) for name in ("to_k", "to_v")}
    concept = FinetunedConcept("custom-diffusion", "<mug>", "mug", torch.zeros(1, WIDTH), weights,
                               **base_model_of(model).stored)
    build_prompt_encoder(model, [concept])
    add_loras(model, [lora[0]])
    with pytest.raises(UserError, match="Custom Diffusion, which replaces weights that a LoRA has changed"):
        build_prompt_encoder(model, [concept])
    build_prompt_encoder(model, [FinetunedConcept("textual-inversion", "<cup>", "cup", torch.zeros(1, WIDTH))])


@pytest.mark.parametrize(("text", "path", "scale"), [
    ("style.safetensors", "style.safetensors", 1), ("style.safetensors:0.8", "style.safetensors", 0.8),
    ("a:b/style:-1", "a:b/style", -1), (r"C:\loras\style.pt", r"C:\loras\style.pt", 1),
    (r"C:\loras\style.pt:.5", r"C:\loras\style.pt", 0.5), ("C:5", "C:5", 1), ("style:v2.pt", "style:v2.pt", 1)])
def test_scale_follows_the_file(text: str, path: str, scale: float) -> None:
    assert LoraFile.parse(text) == LoraFile(path, scale)


def test_a_file_whose_name_ends_as_a_scale_does(tmp_path: Path) -> None:
    (tmp_path / "style:2").touch()
    assert LoraFile.parse(f"{tmp_path}/style:2") == LoraFile(f"{tmp_path}/style:2", 1)
    assert LoraFile.parse(f"{tmp_path}/style:2:3") == LoraFile(f"{tmp_path}/style:2", 3)
    with pytest.raises(UserError, match="the scale must be a finite number"):
        LoraFile.parse("style.safetensors:inf")


@pytest.mark.parametrize(("tensors", "named"), [
    ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 4, 1, 1)}, "is a .*, not a LoRA; give it with"),
    ({"emb_params": torch.zeros(1, 768)}, "is a Textual Inversion embedding, not a LoRA; give it with --concept"),
    ({"0.target_input": torch.zeros(1), "0.super_input": torch.zeros(1)}, "is a concept of this project, not a LoRA"),
    ({"decoder.conv_in.weight": torch.zeros(1, 1, 1, 1)}, "autoencoder .*, not a LoRA; give a file that a LoRA"),
    (None, "no such file; a scale is written after a colon"),
])
def test_other_files_are_named(model: Any, tmp_path: Path, tensors: dict[str, Tensor] | None, named: str) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=named):
        add_loras(model, [f"{tmp_path}/x.safetensors:0.5"])
