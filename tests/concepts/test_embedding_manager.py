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
from transformers import CLIPTextConfig

from ldm.common.errors import UserError
from ldm.common.files import save_tensors
from ldm.common.paths import PROJECT_ROOT
from ldm.concepts.embedding_manager import EmbeddingManager
from ldm.concepts.finetuned_concept import FinetunedConcept
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.inference.encoding import build_prompt_encoder
from ldm.modules.encoders.bert import BERTEmbedder
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
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
        encoded = embedder.encode(prompts, embedding_manager=manager)
        assert torch.allclose(encoded[[0, 2]], embedder(["a photo of cat, here", "a dog"]), atol=1e-5)
        manager.string_to_param_dict["<mug>"].copy_(embedder.token_table[embedder.word_pieces("dog")])
        assert torch.allclose(embedder(prompts[1], manager)[0], embedder(["a cat by a dog"])[0], atol=1e-5)


def test_placeholders_are_tokens_of_the_vocabulary_or_past_it(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["<one>", "*", "<two>"])
    size = len(embedder.token_table)
    tokens = {word: int(token) for word, token in manager.string_to_token_dict.items()}
    assert tokens == {"<one>": size, "*": embedder.word_pieces("*")[0], "<two>": size + 1}
    assert manager.placeholders == ["<one>", "*", "<two>"] and manager.new_words == ["<one>", "<two>"]
    assert EmbeddingManager(embedder).placeholders == ["*"]


def test_random_starts_are_uniform_and_drawn_from_the_global_generator(embedder: PromptEncoder) -> None:
    torch.manual_seed(3)
    manager = EmbeddingManager(embedder, ["*", "<mug>"], num_vectors_per_token=2)
    torch.manual_seed(3)
    for vectors in manager.embedding_parameters():
        assert torch.equal(vectors, torch.rand(2, 8))


def test_clips_start_is_the_embedding_at_the_first_position() -> None:
    clip = FrozenCLIPEmbedder(str(PROJECT_ROOT / "models" / "mini" / "text_encoder"), max_length=16)
    manager = EmbeddingManager(clip, ["*"], ["cat"])
    tokens = torch.tensor([clip.word_pieces("cat")])
    assert torch.equal(manager.string_to_param_dict["*"], clip.transformer.text_model.embeddings(tokens)[0])


def test_untrained_vectors_follow_the_words_of_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "tower"  # a config alone: the public encoder of this name would have pretrained weights
    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                            bos_token_id=49406, eos_token_id=49407, vocab_size=49408)
    config.save_pretrained(folder)
    clip = FrozenCLIPEmbedder(str(folder))
    manager = EmbeddingManager(clip, ["*", "<mug>"], ["cat", "cup"])
    trained = torch.ones(1, 8)
    manager.string_to_param_dict["<mug>"].data.copy_(trained)
    clip.load_state_dict(randomize(FrozenCLIPEmbedder(str(folder))).state_dict())
    start = EmbeddingManager(clip, ["*"], ["cat"]).string_to_param_dict["*"]
    assert torch.equal(manager.string_to_param_dict["*"], start) and torch.equal(manager.initial_embeddings["*"], start)
    assert torch.equal(manager.string_to_param_dict["<mug>"], trained)


def test_several_vectors_stand_for_one_word(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], num_vectors_per_token=2)
    with torch.no_grad():
        for vectors, words in zip(manager.embedding_parameters(), ("red cat", "blue cup"), strict=True):
            vectors.copy_(embedder.token_table[embedder.word_pieces(words)])
        encoded = embedder("a <MUG> and a * here", manager)
        assert torch.allclose(encoded, embedder("a blue cup and a red cat here"), atol=1e-5)
        cut = embedder("* " * 10, manager)  # 20 tokens, so the end token is cut off too
        tokens = embedder.tokenize(["red cat " * 9])
        tokens[0, -1] = embedder.word_pieces("red")[0]
        assert torch.allclose(cut, embedder.encode_tokens(tokens), atol=1e-5)
    norms = manager.get_embedding_norms_squared()
    assert torch.allclose(norms, torch.cat(list(manager.embedding_parameters())).norm(dim=1) ** 2, atol=1e-5)


def test_progressive_words_use_one_vector_more_every_2000_calls(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*"], num_vectors_per_token=3, progressive_words=True)
    tokens, embedded = embedder.tokenize(["a * here"]), torch.zeros(1, 20, 8)
    for calls, count in ((0, 1), (1998, 1), (1999, 2), (3999, 3), (99999, 3)):
        manager.progressive_counter = calls
        changed = manager(tokens, embedded)[0].abs().sum(-1) > 0
        assert changed.nonzero().flatten().tolist() == list(range(2, 2 + count))
        assert manager.progressive_counter == calls + 1
    assert not embedded.any()


def test_only_the_vectors_are_trained(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], ["cat"])
    assert manager.embedding_to_coarse_loss() == 0
    assert [name for name, value in manager.named_parameters() if value.requires_grad] == [
        "string_to_param_dict.*", "string_to_param_dict.<mug>"]
    embedder("a * here", manager).square().sum().backward()
    assert manager.string_to_param_dict["*"].grad.abs().max() > 0
    with torch.no_grad():
        manager.string_to_param_dict["*"] += 2
    assert float(manager.embedding_to_coarse_loss().mean().detach()) == pytest.approx(8 * 4, rel=1e-4)
    assert EmbeddingManager(embedder).embedding_to_coarse_loss().mean() == 0


@pytest.mark.parametrize("name", ["embeddings.safetensors", "embeddings.pt"])
def test_a_file_restores_placeholders_and_vectors(embedder: PromptEncoder, tmp_path: Path, name: str) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], ["cat", "cup"], num_vectors_per_token=2)
    path = manager.save(tmp_path / name)
    other = EmbeddingManager(embedder, ["<other>"])
    other.load(path)
    assert other.placeholders == ["*", "<mug>"] and other.max_vectors_per_token == 2
    prompt = "a * in a <mug>"
    with torch.no_grad():
        assert torch.equal(embedder(prompt, other), embedder(prompt, manager))
    continued = EmbeddingManager(embedder, embedding_manager_ckpt=str(path))
    assert torch.equal(continued.string_to_param_dict["<mug>"], manager.string_to_param_dict["<mug>"])


def test_concept_files_hold_nothing_but_the_vectors(embedder: PromptEncoder, tmp_path: Path) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"], ["cat"], num_vectors_per_token=2)
    path = manager.save(tmp_path / "embeddings.safetensors")
    assert path.stat().st_size < 1500
    with safe_open(str(path), framework="pt") as opened:
        assert sorted(opened.keys()) == ["0.vectors", "1.vectors"]
    assert [concept.super_category for concept in load_concepts(path)] == ["cat", "thing"]


def test_files_of_other_kinds_are_refused(embedder: PromptEncoder, tmp_path: Path) -> None:
    manager = EmbeddingManager(embedder)
    other = save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {})
    with pytest.raises(UserError, match="not a concept"):
        manager.load(other)
    dream = FinetunedConcept("dreambooth", "<dream>", "cat", torch.zeros(1, 8))
    with pytest.raises(UserError, match="not learned by Textual Inversion"):
        manager.load(save_concepts(tmp_path / "dream.safetensors", [dream]))
    wide = EmbeddingManager(BERTEmbedder(16, 1, max_seq_len=20))
    with pytest.raises(UserError, match="not of width 8"):
        manager.load(wide.save(tmp_path / "wide.safetensors"))
    manager.load(wide.save(tmp_path / "wide.pt"))  # the public code accepts it, to merge files
    with pytest.raises(UserError, match="have width 16, and the words of this model 8"):
        embedder("a * here", manager)
    for words in ([], ["*", "*"], ["<A>", "<a>"]):
        with pytest.raises(UserError, match="placeholder_strings"):
            EmbeddingManager(embedder, words)
    for word in ("a.b", "values"):
        with pytest.raises(UserError, match="cannot name a parameter"):
            EmbeddingManager(embedder, [word])


def test_checkpoints_of_earlier_versions_load(embedder: PromptEncoder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<mug>"])
    manager.load_state_dict({"vectors.0": torch.zeros(1, 8), "vectors.1": torch.ones(1, 8)})
    assert torch.equal(manager.string_to_param_dict["<mug>"], torch.ones(1, 8))


def test_checkpoints_with_more_vectors_load(embedder: PromptEncoder) -> None:
    trained = EmbeddingManager(embedder, ["*"], ["cat"], num_vectors_per_token=3)
    manager = EmbeddingManager(embedder, ["*"], ["cat"])
    manager.load_state_dict(trained.state_dict())
    assert manager.max_vectors_per_token == 3 and manager.string_to_param_dict["*"].requires_grad
    assert torch.equal(manager.string_to_param_dict["*"], trained.string_to_param_dict["*"])
    assert not manager.initial_embeddings["*"].requires_grad and manager.embedding_to_coarse_loss().shape == (3, 3)


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
    start = EmbeddingManager(base.cond_stage_model, ["*"], ["sculpture"]).string_to_param_dict["*"]
    assert torch.allclose(manager.initial_embeddings["*"], start)
    assert not torch.equal(manager.string_to_param_dict["*"], start)
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert trainer.callback_metrics["train/loss_emb_reg"] > 0
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
    assert list(state) == ["embedding_manager.string_to_param_dict.*", "embedding_manager.initial_embeddings.*"]
    resumed, trainer = fit(section, tmp_path / "more", 2, checkpoint)  # those two steps are done already
    assert trainer.global_step == 2
    resumed, trained = resumed.embedding_manager.string_to_param_dict, model.embedding_manager.string_to_param_dict
    assert torch.equal(resumed["*"], trained["*"])


@pytest.mark.slow
def test_models_without_trainable_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no base model to train on"):
        fit(stand_ins.stand_in(CONFIGS[1], tmp_path), tmp_path, 1)
    personal = stand_ins.model_section(CONFIGS[0])["params"]["personalization_config"]
    for name in ("configs/perfusion-sd-v1.yaml", "configs/latent-diffusion/celebahq-ldm-vq-4.yaml"):
        with pytest.raises(UserError, match="personalization_config: .*leave it out"):
            instantiate_from_config(stand_ins.stand_in(name, tmp_path, personalization_config=personal))
