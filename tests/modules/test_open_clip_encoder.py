"""FrozenOpenCLIPEmbedder with a tiny tower, against open_clip's model and transformers' with converted weights."""
from __future__ import annotations

from types import SimpleNamespace

import open_clip
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from helpers.oracles import randomize
from helpers.stand_ins import LENGTH, WIDTH, WORDS, open_clip_arch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints.deferred_init import DeferredInit
from ldm.common.errors import UserError
from ldm.modules.covariance import encoder_fingerprint, estimate_covariance
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompts import word_vector

PROMPTS = ["a photo of a teddy bear", "", "It’s a CAFÉ &amp; 3 “owls”  --\t🧸"]
LAYERS = 3


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Register a small architecture with open_clip and return its name."""
    return open_clip_arch(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def theirs(arch: str) -> nn.Module:
    return randomize(open_clip.create_model(arch), scale=0.3).eval()


def ours(arch: str, theirs: nn.Module, layer: str) -> FrozenOpenCLIPEmbedder:
    """Build the encoder with all weights of an OpenCLIP except those of its image tower."""
    encoder = FrozenOpenCLIPEmbedder(arch, max_length=LENGTH, layer=layer)
    state = theirs.state_dict()
    encoder.load_state_dict({f"model.{key}": value for key, value in state.items() if not key.startswith("visual.")})
    return encoder


def test_the_last_layer_equals_open_clip(arch: str, theirs: nn.Module) -> None:
    encoder, tokens = ours(arch, theirs, "last"), open_clip.tokenize(PROMPTS, LENGTH)
    assert torch.equal(encoder.tokenize(PROMPTS), tokens)
    with torch.no_grad():
        got, expected = encoder(PROMPTS), theirs.encode_text(tokens)  # open_clip returns the projected end token
        assert got.shape == (3, LENGTH, WIDTH)
        pooled = got[torch.arange(3), tokens.argmax(1)] @ encoder.model.text_projection
    assert expected.std() > 0.1 and torch.allclose(pooled, expected, atol=1e-4)


def test_building_takes_the_random_numbers_of_a_whole_open_clip(arch: str) -> None:
    torch.manual_seed(5)
    complete = open_clip.create_model(arch).state_dict()
    after_complete = torch.rand(3)
    torch.manual_seed(5)
    state = FrozenOpenCLIPEmbedder(arch, max_length=LENGTH).model.state_dict()
    assert torch.equal(torch.rand(3), after_complete)
    assert all(torch.equal(value, complete[name]) for name, value in state.items())
    torch.manual_seed(5)
    with DeferredInit():
        FrozenOpenCLIPEmbedder(arch, max_length=LENGTH)
    assert not torch.equal(torch.rand(3), after_complete)


def test_the_penultimate_layer_equals_transformers_with_one_layer_less(arch: str, theirs: nn.Module) -> None:
    encoder = ours(arch, theirs, "penultimate")
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS - 1,
                            num_attention_heads=2, vocab_size=WORDS, max_position_embeddings=LENGTH, hidden_act="gelu")
    shape = SimpleNamespace(config=config)
    state = convert_open_clip_checkpoint(shape, {f"cond_stage_model.{k}": v for k, v in encoder.state_dict().items()})
    model = CLIPTextModel(config).eval()
    known = {key.removeprefix("text_model."): value for key, value in state.items()}
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    missing = model.load_state_dict({prefix + key: value for key, value in known.items()}, strict=False).missing_keys
    assert [key for key in missing if not key.endswith("position_ids")] == []
    with torch.no_grad():
        expected = model(open_clip.tokenize(PROMPTS, LENGTH)).last_hidden_state
        assert torch.allclose(encoder(PROMPTS), expected, atol=1e-4)
        assert torch.allclose(encoder.encode(PROMPTS[0]), expected[:1], atol=1e-4)
    assert not torch.allclose(ours(arch, theirs, "last")(PROMPTS), expected, atol=1e-2)


def test_placeholders_extend_the_word_table(arch: str, theirs: nn.Module) -> None:
    encoder = ours(arch, theirs, "penultimate")
    tokens = encoder.tokenize(["a photo of <my-teddy>, here"], ["<my-teddy>"])
    plain = encoder.tokenize(["a photo of cat, here"])
    (cat,) = encoder.word_pieces("cat")
    assert torch.equal(tokens.where(tokens != WORDS, torch.tensor(cat)), plain) and (tokens == WORDS).sum() == 1
    vector = word_vector(encoder, "cat").clone().requires_grad_()
    encoded = encoder.encode_tokens(tokens, vector)
    assert torch.allclose(encoded, encoder(["a photo of cat, here"]), atol=1e-5)
    encoded.square().sum().backward()
    nudge = torch.zeros_like(vector).index_fill_(1, torch.tensor([3]), 1e-2)
    up, down = (float(encoder.encode_tokens(tokens, vector.detach() + s * nudge).double().square().sum())
                for s in (1, -1))
    assert float(vector.grad[0, 3]) == pytest.approx((up - down) / 2e-2, rel=2e-2, abs=1e-2)


def test_frozen_encoders_stay_in_evaluation_mode(arch: str) -> None:
    frozen, free = (FrozenOpenCLIPEmbedder(arch, max_length=LENGTH, freeze=flag) for flag in (True, False))
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.train().model.training
    assert all(p.requires_grad for p in free.parameters()) and free.train().model.training


def test_the_covariance_does_not_depend_on_padding(arch: str, theirs: nn.Module) -> None:
    encoder = ours(arch, theirs, "penultimate")
    captions = ["a cat", "a photo of a dog on a red bike", "two owls"]
    found = estimate_covariance(encoder, captions, progress=False)
    rows = torch.cat([encoder([caption])[0, 1:1 + len(encoder.word_pieces(caption))] for caption in captions]).double()
    assert found.tokens == len(rows) and torch.allclose(found.covariance, rows.mT @ rows / len(rows), atol=1e-4)
    assert encoder_fingerprint(encoder) != encoder_fingerprint(ours(arch, theirs, "last"))


@pytest.mark.parametrize(("options", "named"), [
    ({"layer": "pooled"}, "'pooled' is unknown; choose one of last, penultimate"), ({"max_length": 77}, "takes 20 tok"),
    ({"arch": "ViT-H-41"}, "no such architecture; give one that it has, such as ViT-H-1"),
    ({"arch": "xlm-roberta-base-ViT-B-32"}, "text tower is not CLIP's"),
])
def test_impossible_options_are_refused(arch: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FrozenOpenCLIPEmbedder(**{"arch": arch, **options})


def test_prompts_that_are_too_long_are_cut_off(arch: str) -> None:
    encoder = FrozenOpenCLIPEmbedder(arch, max_length=LENGTH)
    long = " ".join(["owl"] * LENGTH)
    with pytest.raises(UserError, match=f"has {LENGTH} tokens, but the text encoder takes {LENGTH - 2}"):
        encoder.tokenize([long])
    expected = open_clip.tokenize([long], context_length=LENGTH)  # as the public encoder calls it
    assert torch.equal(encoder.tokenize([long], truncate=True), expected)
    assert torch.equal(encoder(long), encoder.encode_tokens(expected))


def test_untrained_words_are_unknown(arch: str, theirs: nn.Module) -> None:
    encoder = ours(arch, theirs, "last")
    assert encoder.unknown_words("qzxvk 🧸") == [] == encoder.known_words()
    few: Tensor = encoder.token_table
    few.data[:] = few[0].clone()
    few.data[encoder.word_pieces("teddy bear")] += 1
    assert encoder.known_words() == ["bear", "teddy"] and encoder.unknown_words("a Teddy") == ["a"]
