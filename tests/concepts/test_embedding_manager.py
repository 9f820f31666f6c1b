"""Textual Inversion's vectors, against the same prompts with known words."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import stand_ins
from helpers.oracles import randomize
from safetensors import safe_open
from torch import nn

from ldm.common.errors import UserError
from ldm.common.files import save_tensors
from ldm.concepts.embedding_manager import EmbeddingManager
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.inference.encoding import build_prompt_encoder
from ldm.modules.encoders.bert import BERTEmbedder
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.util import instantiate_from_config

CONFIGS = ("configs/stable-diffusion/v1-finetune.yaml", "configs/latent-diffusion/txt2img-1p4B-finetune.yaml")


@pytest.fixture(scope="module")
def embedder() -> PromptEncoder:
    built = randomize(BERTEmbedder(8, 1, max_seq_len=20), scale=0.3)
    built.freeze()
    return built


def test_vectors_start_at_their_initializer_words(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], ["cat"])
    prompts = ["a photo of *, here", "a * by a <mug>", "a dog"]
    with torch.no_grad():
        encoded = manager(embedder, prompts)
        assert torch.allclose(encoded[[0, 2]], embedder(["a photo of cat, here", "a dog"]), atol=1e-5)
        manager.vectors[1].copy_(embedder.token_table[embedder.word_pieces("dog")])
        assert torch.allclose(manager(embedder, prompts[1:2]), embedder(["a cat by a dog"]), atol=1e-5)
    table = embedder.token_table
    without_word = EmbeddingManager(embedder, num_vectors_per_token=99).vectors[0].detach()
    assert float(without_word.std()) == pytest.approx(float(table.std()), rel=0.2)


def test_several_vectors_stand_for_one_word(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], num_vectors_per_token=2)
    with torch.no_grad():
        for vectors, words in zip(manager.vectors, ("red cat", "blue cup"), strict=True):
            vectors.copy_(embedder.token_table[embedder.word_pieces(words)])
        encoded = manager(embedder, ["a <MUG> and a * here"])
        assert torch.allclose(encoded, embedder(["a blue cup and a red cat here"]), atol=1e-5)
        assert manager.distance() > 0
    with pytest.raises(UserError, match="has 20 tokens, but the text encoder takes 18"):
        manager(embedder, ["* " * 10])


def test_only_the_vectors_are_trained(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*"], ["cat"])
    assert manager.distance() == 0 and len(list(manager.parameters())) == 1
    manager(embedder, ["a * here"]).square().sum().backward()
    assert manager.vectors[0].grad.abs().max() > 0
    with torch.no_grad():
        manager.vectors[0] += 2
    assert float(manager.distance().detach()) == pytest.approx(8 * 4, rel=1e-4)


def test_a_file_restores_placeholders_and_vectors(embedder: PromptEncoder, tmp_path: Path) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], ["cat", "cup"], num_vectors_per_token=2)
    path = manager.save(tmp_path / "embeddings.safetensors")
    assert path.stat().st_size < 1500
    other = EmbeddingManager(embedder, ["<other>"])
    other.load(path)
    assert other.placeholders == ["*", "<mug>"] and other.distance() == 0
    with torch.no_grad():
        assert torch.equal(other(embedder, ["a * in a <mug>"]), manager(embedder, ["a * in a <mug>"]))
    with safe_open(str(path), framework="pt") as opened:
        assert sorted(opened.keys()) == ["0.vectors", "1.vectors"]


def test_files_of_other_kinds_are_refused(embedder: PromptEncoder, tmp_path: Path) -> None:
    manager = EmbeddingManager(embedder)
    other = save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {})
    with pytest.raises(UserError, match="not a concept"):
        manager.load(other)
    dream = FinetunedConcept("dreambooth", "<dream>", "cat", torch.zeros(1, 8))
    with pytest.raises(UserError, match="not learned by Textual Inversion"):
        manager.load(save_concepts(tmp_path / "dream.safetensors", [dream]))
    wide = EmbeddingManager(BERTEmbedder(16, 1, max_seq_len=20)).save(tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="not of width 8"):
        manager.load(wide)
    for words in ([], ["*", "*"], ["<A>", "<a>"]):
        with pytest.raises(UserError, match="placeholder_strings"):
            EmbeddingManager(embedder, words)


def fit(section: dict[str, Any], root: Path, steps: int, resumed: Path | None = None) -> tuple[nn.Module, pl.Trainer]:
    torch.manual_seed(0)
    model = instantiate_from_config(section)
    model.learning_rate = 0.01
    batch = stand_ins.batch_for(section) | {"caption": ["a photo of a *", "the * on a table"]}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 4, batch_size=None), ckpt_path=resumed, weights_only=True)
    trainer.save_checkpoint(root / "last.ckpt")
    return model, trainer


def train_stand_in(name: str, tmp_path: Path) -> tuple[nn.Module, dict[str, Any], nn.Module, pl.Trainer]:
    """Return a base model, the config that trains its vectors, and the result of two steps."""
    base = instantiate_from_config(stand_ins.stand_in(name, tmp_path, personalization_config=None))
    for part, scale in ((base.model, 0.1), (base.first_stage_model, 0.05), (base.cond_stage_model, 0.3)):
        randomize(part, scale=scale)
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    section = stand_ins.stand_in(name, tmp_path, ckpt_path=str(tmp_path / "base.ckpt"), embedding_reg_weight=0.1)
    return base, section, *fit(section, tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_stand_in_trains_its_vectors_only(name: str, tmp_path: Path) -> None:
    base, section, model, trainer = train_stand_in(name, tmp_path)
    manager, state = model.embedding_manager, model.state_dict()
    start = base.cond_stage_model.token_table[base.cond_stage_model.word_pieces("sculpture")].mean(0, keepdim=True)
    assert torch.allclose(manager.start_0, start) and not torch.equal(manager.vectors[0], start)
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert trainer.callback_metrics["train/embedding_distance"] > 0
    restored = instantiate_from_config(section).eval()
    restored.embedding_manager.load(tmp_path / "run" / "embeddings.safetensors")
    with torch.no_grad():
        assert torch.equal(restored.get_learned_conditioning(["a *"]), model.eval().get_learned_conditioning(["a *"]))
        assert not torch.equal(restored.get_learned_conditioning(["a *"]), base.get_learned_conditioning(["a *"]))
        (concept,) = load_concepts(tmp_path / "run" / "embeddings.safetensors")  # as the generation scripts load it
        generation = build_prompt_encoder(base, [concept]).encode(["a *"]).encoding
        assert torch.allclose(generation, restored.get_learned_conditioning(["a *"]), atol=1e-6)
    assert (concept.super_category, concept.steps, concept.parameter_count) == ("sculpture", 2, concept.vectors.numel())


@pytest.mark.slow
def test_a_resumed_run_continues_with_its_vectors(tmp_path: Path) -> None:
    _, section, model, _ = train_stand_in(CONFIGS[1], tmp_path)
    checkpoint = tmp_path / "run" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert list(state) == ["embedding_manager.vectors.0"]
    resumed, trainer = fit(section, tmp_path / "more", 2, checkpoint)  # those two steps are done already
    assert trainer.global_step == 2
    assert torch.equal(resumed.embedding_manager.vectors[0], model.embedding_manager.vectors[0])


@pytest.mark.slow
def test_models_without_trainable_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no base model to train on"):
        fit(stand_ins.stand_in(CONFIGS[1], tmp_path), tmp_path, 1)
    personal = stand_ins.model_section(CONFIGS[0])["params"]["personalization_config"]
    for name in ("configs/perfusion-sd-v1.yaml", "configs/latent-diffusion/celebahq-ldm-vq-4.yaml"):
        with pytest.raises(UserError, match="personalization_config: .*leave it out"):
            instantiate_from_config(stand_ins.stand_in(name, tmp_path, personalization_config=personal))
