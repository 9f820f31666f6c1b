"""Prompts with concepts, against Transformers' model with the concept in its embedding table and Eq. 3 in float64."""
from __future__ import annotations

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.oracles import randomize
from torch import Tensor, nn
from transformers import CLIPTextConfig

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.fingerprint import base_fingerprint
from ldm.concepts.prompt_checks import check_placeholders, warn_unused_concepts
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.settings import override_settings
from ldm.concepts.word_positions import word_positions
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.rank_one import invert_covariance

WIDTH, LENGTH, START, END, INNER, LAYER = 16, 12, 49406, 49407, 8, "middle_block.1.attn2"
PROMPT = "a photo of a <my-teddy> outside"
POSITION = 5  # of the placeholder among the tokens of PROMPT, including the start token


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenCLIPEmbedder:
    folder = tmp_path_factory.mktemp("text_encoder")
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                   vocab_size=END + 1, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=END,
                   pad_token_id=END).save_pretrained(folder)
    return randomize(FrozenCLIPEmbedder(str(folder), max_length=LENGTH), scale=0.3)


@pytest.fixture(scope="module")
def layers() -> dict[str, SimpleNamespace]:
    torch.manual_seed(1)
    return {LAYER: SimpleNamespace(to_k=nn.Linear(WIDTH, INNER, bias=False), to_v=nn.Linear(WIDTH, INNER, bias=False))}


@pytest.fixture(scope="module")
def inverse() -> Tensor:
    samples = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    return invert_covariance(samples.mT @ samples / 50)


def encoded_by_transformers(encoder: FrozenCLIPEmbedder, prompt: str, words: dict[str, Tensor]) -> Tensor:
    """Encode with a copy of the text model that has the words appended to its table; return (1, N, d).

    Words must be separated by spaces in the prompt.
    """
    tower = copy.deepcopy(encoder.transformer)
    table = torch.cat([encoder.token_table, *words.values()])
    tower.set_input_embeddings(nn.Embedding.from_pretrained(table))
    ids = {word: END + 1 + index for index, word in enumerate(words)}
    pieces: list[int] = []
    for word in prompt.split():
        pieces += [ids[word]] if word in ids else encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
    row = [START, *pieces] + [END] * (LENGTH - 1 - len(pieces))
    return tower(input_ids=torch.tensor([row])).last_hidden_state


@pytest.fixture(scope="module")
def concept(encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace]) -> Concept:
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(1, WIDTH, generator=generator)
    target = encoded_by_transformers(encoder, PROMPT, {"<my-teddy>": embedding})[0, POSITION]
    return Concept("<my-teddy>", "teddy bear", embedding, target, torch.randn(WIDTH, generator=generator),
                   {LAYER: torch.randn(INNER, generator=generator)}, bias=0.6, temperature=0.1,
                   base=base_fingerprint(layers))


def make_other(concept: Concept, placeholder: str = "<mug>") -> Concept:
    return Concept(placeholder, "mug", -concept.embedding, concept.target_input.flip(0), concept.super_input.flip(0),
                   {LAYER: concept.target_outputs_v[LAYER].flip(0)}, base=concept.base)


def closed_form(encoding: Tensor, concept: Concept, weight: Tensor, output: Tensor, inverse: Tensor,
                bias: float, temperature: float) -> Tensor:
    """Evaluate Eq. 3 in float64, one token at a time: (1, N, d) -> (1, N, p)."""
    target, metric = concept.target_input.double(), inverse.double()
    rows = []
    for e in encoding[0].double():
        s = (target @ metric @ e) / (target @ metric @ target)
        gate = 1 / (1 + torch.exp(-(s - bias) / temperature))
        rows.append(weight.double() @ (e - target * s) + gate * output.double())
    return torch.stack(rows)[None]


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert torch.allclose(got.double(), expected.double(), atol=2e-4), (got - expected).abs().max()


def test_without_concepts_prompts_are_encoded_as_usual(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace]
) -> None:
    context = ConceptPromptEncoder(encoder, layers, []).encode(["a cat", ""])
    expected = torch.cat([encoded_by_transformers(encoder, prompt, {}) for prompt in ("a cat", "")])
    assert_close(context.encoding, expected)
    assert context.cache and context.concept_count == 0
    assert_close(context.keys_values(LAYER, layers[LAYER].to_k, layers[LAYER].to_v)[1], layers[LAYER].to_v(expected))


@pytest.mark.parametrize(("settings", "bias", "temperature"), [
    ({}, 0.6, 0.1), ({"biases": [0.3], "temperatures": [0.2]}, 0.3, 0.2)], ids=["its own", "given"])
def test_one_concept_is_equation_3(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor,
    settings: dict[str, list[float]], bias: float, temperature: float,
) -> None:
    context = ConceptPromptEncoder(encoder, layers, [concept], inverse).encode([PROMPT], **settings)
    encoding = encoded_by_transformers(encoder, PROMPT, {"<my-teddy>": concept.embedding})
    assert_close(context.encoding, encoding)
    keys, values = context.keys_values(LAYER, layers[LAYER].to_k, layers[LAYER].to_v)
    weights = layers[LAYER].to_k.weight, layers[LAYER].to_v.weight
    locked = weights[0] @ concept.super_input
    assert_close(keys, closed_form(encoding, concept, weights[0], locked, inverse, bias, temperature))
    learned = concept.target_outputs_v[LAYER]
    assert_close(values, closed_form(encoding, concept, weights[1], learned, inverse, bias, temperature))
    assert context.gates[0, POSITION, 0] == pytest.approx(torch.sigmoid(torch.tensor((1 - bias) / temperature)).item())


def test_global_locking_takes_keys_from_the_prompt_with_the_super_category(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor
) -> None:
    prompts = ConceptPromptEncoder(encoder, layers, [concept], inverse)
    local, locked = prompts.encode([PROMPT]), prompts.encode([PROMPT], global_locking=True)
    layer = layers[LAYER]
    keys, values = locked.keys_values(LAYER, layer.to_k, layer.to_v)
    # "teddy bear" is two word pieces, but one virtual token
    pieces = encoder.token_table[encoder.word_pieces("teddy bear")]
    assert len(pieces) == 2
    super_encoding = encoded_by_transformers(encoder, PROMPT, {"<my-teddy>": pieces.mean(0, keepdim=True)})
    assert_close(keys, layer.to_k(super_encoding))
    local_keys, local_values = local.keys_values(LAYER, layer.to_k, layer.to_v)
    assert torch.equal(values, local_values)
    assert (keys - local_keys).abs().max() > 0.01


def test_two_concepts_use_their_own_words_and_settings(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor
) -> None:
    both = [concept, make_other(concept)]
    prompts = ConceptPromptEncoder(encoder, layers, both, inverse)
    text = "a <mug> by a <my-teddy>"
    context = prompts.encode([text], biases=[0.5, 0.7], temperatures=[0.2])
    encoding = encoded_by_transformers(encoder, text, {c.placeholder: c.embedding for c in both})
    assert_close(context.encoding, encoding)
    for index, (one, bias) in enumerate(zip(both, (0.5, 0.7), strict=True)):
        target, metric = one.target_input.double(), inverse.double()
        scores = encoding[0].double() @ metric @ target / (target @ metric @ target)
        assert_close(context.gates[0, :, index], torch.sigmoid((scores - bias) / 0.2))
    # e_perp has no component along either direction
    targets = torch.stack([c.target_input for c in both])
    after, before = (e @ inverse @ targets.mT for e in (context.projected, encoding))
    assert after.abs().max() < 1e-3 * before.abs().max()
    with pytest.raises(UserError, match="3 values of bias for 2 concepts"):
        prompts.encode([text], biases=[0.5, 0.6, 0.7])


def test_a_subset_has_only_the_concepts_that_texts_contain(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor
) -> None:
    words = ["<my-teddy>", "<my-teddy>-2", "<mug>"]
    loaded = [replace(concept, placeholder=word, target_input=concept.target_input + shift)
              for shift, word in enumerate(words)]
    prompts = ConceptPromptEncoder(encoder, layers, loaded, inverse)
    assert prompts.subset_for(["a <mug>", "a <MY-teddy>", "<my-teddy>-2"]) is prompts
    # the shorter placeholder is a part of the longer one, but does not occur itself
    assert prompts.subset_for(["a <my-teddy>-2"]).placeholders == ["<my-teddy>-2"]
    assert prompts.subset_for(["a cat", ""]).concepts == []
    subset = prompts.subset_for(["a photo of a <mug>", ""])
    assert subset is prompts.subset_for(["<mug>"]), "the last subset is cached with its tensors on the device"
    assert prompts.subset_for(["a <my-teddy>"]).placeholders == ["<my-teddy>"]
    two = prompts.subset_for(["a <my-teddy>-2 by a <mug>"])
    assert two.subset_for(["a <my-teddy>-2"]).placeholders == ["<my-teddy>-2"], "indices count its own concepts"
    texts, layer = ["a photo of a <mug>", "a cat"], layers[LAYER]
    found, expected = subset.encode(texts), prompts.mask_concepts(prompts.encode(texts), ["a <mug>"] * 2)
    assert (found.concept_count, expected.concept_count) == (1, 3)
    for ours, theirs in zip(found.keys_values(LAYER, layer.to_k, layer.to_v),
                            expected.keys_values(LAYER, layer.to_k, layer.to_v), strict=True):
        assert_close(ours, theirs)


def test_overridden_settings_do_not_modify_the_given_concepts(concept: Concept) -> None:
    changed = override_settings([concept, make_other(concept)], biases=[0.4], temperatures=[0.2, 0.3])
    assert [(c.bias, c.temperature) for c in changed] == [(0.4, 0.2), (0.4, 0.3)]
    assert concept.bias == 0.6
    assert override_settings([concept]) == [concept]
    some = replace(concept, used_layers=[LAYER])
    assert [c.used_layers for c in override_settings([some, concept], all_layers=True)] == [[], []]
    assert some.used_layers == override_settings([some])[0].used_layers == [LAYER]
    with pytest.raises(UserError, match="0 values of temperature"):
        override_settings([concept], temperatures=[])


def test_invalid_concepts_and_prompts_are_refused(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor
) -> None:
    for concepts, message in (
        ([concept, make_other(concept, "<My-Teddy>")], "share a placeholder .*--placeholders"),
        ([replace(concept, base="0" * 64, target_input=torch.zeros(768))],
         "was trained on Stable Diffusion 1.x .context 768., and the loaded model is .* another model"),
    ):
        with pytest.raises(UserError, match=message):
            ConceptPromptEncoder(encoder, layers, concepts, inverse)
    with pytest.raises(ValueError, match="inverse covariance"):
        ConceptPromptEncoder(encoder, layers, [concept])
    with pytest.raises(UserError, match="11 tokens.*takes 10"):
        ConceptPromptEncoder(encoder, layers, [concept], inverse).encode(["a <my-teddy> " + "word " * 9])


def test_unknown_placeholders_are_refused_and_unused_concepts_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for check in (check_placeholders, warn_unused_concepts):
        check(["a <MY-teddy>, here", "a <mug>"], ["<my-teddy>", "<mug>"])
    check_placeholders(["1 < 2 and 3 > 2", "I <3 it"], [])
    assert not caplog.records
    for loaded, message in (([], "none is loaded"), (["<a>", "<b>"], "loaded are <a>, <b>")):
        with pytest.raises(UserError, match=f"names <mug>.*{message}"):
            check_placeholders(["a cat", "a <mug>"], loaded)
    warn_unused_concepts(["a mask", "a cup"], ["sks", "cup"])  # "mask" does not contain the word "sks"
    assert [record.getMessage() for record in caplog.records if "sks" in record.getMessage()]
    assert not [record for record in caplog.records if "cup" in record.getMessage()]
    caplog.clear()
    warn_unused_concepts(["a sks-2"], ["sks", "sks-2"])
    assert [message.split()[2] for message in caplog.messages] == ["sks"]


def test_a_concept_trained_with_another_covariance_is_warned_of_once(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    target = concept.target_input.detach().double()
    here = float(target @ inverse.double() @ target)
    near, far = (replace(concept, target_energy=here * factor) for factor in (1.015, 1.03))
    for one in (concept, near, far, far):
        ConceptPromptEncoder(encoder, layers, [one, make_other(concept)], inverse).encode([PROMPT])
    (line,) = caplog.messages
    assert line.startswith("warning: concept <my-teddy> was trained with another covariance")
    assert f"was {1.03 * here:.4g} and is {here:.4g}" in line and line.endswith("configs/...-project.yaml)")


def test_all_tokens_of_a_word_at_each_occurrence(
    encoder: FrozenCLIPEmbedder, layers: dict[str, SimpleNamespace], concept: Concept, inverse: Tensor
) -> None:
    prompts = ConceptPromptEncoder(encoder, layers, [concept, make_other(concept)], inverse)
    for prompt, word, positions in (
        (PROMPT, "<my-teddy>", [POSITION]), (PROMPT, "<My-Teddy>", [POSITION]), ("a <my-teddy>, a <mug>", "<mug>", [5]),
        (PROMPT, "photo of", [2, 3]), ("a cat and a Cat", "cat", [2, 5]), ("a cat", "a cat", [1, 2]),
    ):
        assert word_positions(prompts, prompt, word).nonzero().flatten().tolist() == positions, (prompt, word)
    several = SimpleNamespace(encoder=encoder, tokens=lambda texts: encoder.tokenize(texts, ["<x>"], [3]))
    assert word_positions(several, "a <x> here", "<x>").nonzero().flatten().tolist() == [2, 3, 4]
    for word in ("cat", "phot", "<mug>", " "):
        with pytest.raises(UserError, match="does not occur in the prompt"):
            word_positions(prompts, PROMPT, word)


def test_the_vector_of_several_word_pieces_is_their_mean(encoder: FrozenCLIPEmbedder) -> None:
    table = encoder.token_table
    (cat,) = encoder.word_pieces("cat")
    assert torch.equal(word_vector(encoder, "cat"), table[cat : cat + 1])
    assert_close(word_vector(encoder, "teddy bear"), table[encoder.word_pieces("teddy bear")].mean(0, keepdim=True))
    for nothing in ("", " ", "<|endoftext|>"):
        with pytest.raises(UserError, match="super-category"):
            word_vector(encoder, nothing)
