"""Prompts with concepts of a method that this version does not know are encoded as those of any other."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.finetuned_prompt_encoder import FinetunedPromptEncoder
from ldm.concepts.fingerprint import BaseModel, base_fingerprint
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.modules.attention import name_text_layers

NEW = "norm-inversion"  # a method that no list in this project names
PROMPT = "a <one> by a <two>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return tiny_models.build_model(tmp_path_factory.mktemp("base"), use_ema=False).eval()


def load_two(model: nn.Module, folder: Path, weight: str = "", with_inputs: bool = False) -> list[FinetunedConcept]:
    """Save and load two concepts of the new method, which replace one weight of the U-Net if it is named."""
    width = tiny_models.WIDTH
    unet = model.model.diffusion_model
    base = base_fingerprint(name_text_layers(unet))
    generator = torch.Generator().manual_seed(0)
    loaded = []
    for word in ("<one>", "<two>"):
        weights = {}
        if weight:
            own = dict(unet.named_parameters())[weight].detach()
            weights[weight] = own + torch.randn(own.shape, generator=generator)
        inputs = torch.randn(1, width, generator=generator) if with_inputs else torch.zeros(0, 0)
        vectors = torch.randn(1, width, generator=generator)
        concept = FinetunedConcept(NEW, word, "cat", vectors, weights, inputs, base=base)
        loaded += load_concepts(save_concepts(folder / f"{word[1:-1]}.safetensors", [concept], torch.float32))
    return loaded


def make_encoder(model: nn.Module, concepts: list[FinetunedConcept]) -> FinetunedPromptEncoder:
    def inverse_covariance() -> Tensor:
        return torch.eye(tiny_models.WIDTH)

    return FinetunedPromptEncoder(model.cond_stage_model, model.model.diffusion_model, concepts,
                                  BaseModel(concepts[0].base),
                                  inverse_covariance)


def test_word_vectors_are_used(model: nn.Module, tmp_path: Path) -> None:
    concepts = load_two(model, tmp_path)
    encoder = model.cond_stage_model
    tokens = encoder.tokenize([PROMPT], ["<one>", "<two>"])
    expected = encoder.encode_tokens(tokens, torch.cat([concept.vectors for concept in concepts]))
    context = make_encoder(model, concepts).encode([PROMPT])
    torch.testing.assert_close(context.encoding, expected)
    assert context.weights == {}


def test_weights_of_one_concept_are_used_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    first, _ = load_two(model, tmp_path, weight="out.2.weight")
    weights = make_encoder(model, [first]).encode(["a <one>"]).weights
    assert torch.equal(weights["out.2.weight"], first.weights["out.2.weight"])


def test_weights_that_read_text_are_merged(model: nn.Module, tmp_path: Path) -> None:
    name = next(iter(name_text_layers(model.model.diffusion_model))) + ".to_k.weight"
    concepts = load_two(model, tmp_path, weight=name, with_inputs=True)
    merged = make_encoder(model, concepts).encode([PROMPT]).weights[name]
    for concept in concepts:
        torch.testing.assert_close(concept.inputs @ merged.T, concept.inputs @ concept.weights[name].T,
                                   rtol=1e-4, atol=1e-4)


def test_other_weights_are_not_merged(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Norm Inversion changes weights of the U-Net that cannot be merged"):
        make_encoder(model, load_two(model, tmp_path, weight="out.2.weight"))
