"""GeneralConditioner: two towers as one text encoder, sizes, and the public class's interface."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import sdxl
import torch
from diffusers.models.embeddings import Timesteps
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.common.errors import UserError
from ldm.modules.context import PromptContext
from ldm.modules.encoders.modules import ConcatTimestepEmbedderND, FrozenOpenCLIPEmbedder2, GeneralConditioner
from ldm.modules.encoders.prompts import word_vector
from ldm.util import instantiate_from_config

PROMPTS = ["a teddy bear", "two owls on a beach"]
SIZES = torch.tensor([[1024.0, 768, 0, 12, 1024, 1024], [600, 400, 5, 0, 512, 512]])


def config(**changes: Any) -> dict[str, Any]:
    """Return the config of a small conditioner; `changes` replace entries of `emb_models` by their index."""
    section = OmegaConf.to_container(sdxl.small_config().model.params.cond_stage_config)
    for index, entry in changes.items():
        section["params"]["emb_models"][int(index[1:])] |= entry
    return section


@pytest.fixture(scope="module")
def encoder() -> GeneralConditioner:
    return sdxl.randomize(instantiate_from_config(config()), scale=0.3).requires_grad_(False).eval()


@pytest.fixture
def own(encoder: GeneralConditioner) -> GeneralConditioner:
    """Return a copy to change."""
    return copy.deepcopy(encoder)


def test_words_are_those_of_both_towers(encoder: GeneralConditioner) -> None:
    first, second = encoder.towers
    assert encoder.word_parts == {"clip_l": sdxl.WIDTH_L, "clip_g": sdxl.WIDTH_G}
    assert encoder.embedding_width == sdxl.WIDTH_L + sdxl.WIDTH_G and encoder.vocabulary_size == 49408
    pieces = encoder.word_pieces("teddy bear")
    assert torch.equal(encoder.embed_pieces(pieces),
                       torch.cat([first.token_table[pieces], second.token_table[pieces]], 1))
    assert torch.allclose(word_vector(encoder, "teddy bear"), encoder.embed_pieces(pieces).mean(0, keepdim=True))


def test_a_placeholder_with_the_vector_of_a_word_is_that_word(encoder: GeneralConditioner) -> None:
    """In both towers and in the pooled encoding, although placeholders have higher indices than the end token."""
    tokens = encoder.tokenize(["a <it> in the snow", "a cat"], ["<it>"])
    plain = encoder.tokenize(["a bear in the snow", "a cat"])
    for one, other in zip(encoder.encode_with_pooled(tokens, word_vector(encoder, "bear")),
                          encoder.encode_with_pooled(plain), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(encoder.encode_tokens(plain), encoder.encode_with_pooled(plain)[0])


@pytest.mark.parametrize("prompt", ["", "a bear", "a bear! ! 0", " ".join(["cat"] * 22)])
def test_each_tower_has_its_own_padding(encoder: GeneralConditioner, prompt: str) -> None:
    tokens = encoder.tokenize([prompt])
    assert torch.equal(tokens, encoder.towers[0].tokenize([prompt]))
    assert torch.equal(encoder._tokens_of(encoder.towers[1], tokens), encoder.towers[1].tokenize([prompt]))


def test_word_tables_are_not_copied(encoder: GeneralConditioner) -> None:
    """The real ones have 404 MB."""
    smallest = min(tower.token_table.numel() for tower in encoder.towers)

    class LargestResult(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            tables = {tower.token_table.data_ptr() for tower in encoder.towers}
            if isinstance(result, torch.Tensor) and result.data_ptr() not in tables:
                self.numel = max(self.numel, result.numel())
            return result

    with LargestResult() as largest:
        tokens = encoder.tokenize(["a <it>"], ["<it>"])
        encoder.encode_with_pooled(tokens, torch.randn(1, encoder.embedding_width))
        word_vector(encoder, "teddy bear")
    assert 0 < largest.numel < smallest


def test_sizes_are_embedded_as_diffusers_embeds_them(encoder: GeneralConditioner) -> None:
    embed = Timesteps(sdxl.FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = embed(SIZES.flatten()).reshape(2, -1)
    assert torch.allclose(encoder.size_features(SIZES), expected, atol=1e-6)
    assert torch.equal(ConcatTimestepEmbedderND(8)(SIZES[:, 0]), ConcatTimestepEmbedderND(8)(SIZES[:, :1]))


def test_a_batch_is_encoded_by_all_embedders(encoder: GeneralConditioner) -> None:
    batch = {"txt": PROMPTS, "original_size_as_tuple": SIZES[:, :2], "crop_coords_top_left": SIZES[:, 2:4],
             "target_size_as_tuple": SIZES[:, 4:]}
    encoding, pooled = encoder.encode_with_pooled(encoder.tokenize(PROMPTS))
    result = encoder(batch)
    assert result.keys() == {"crossattn", "vector"} and torch.equal(result["crossattn"], encoding)
    context = encoder.add_sizes(PromptContext.plain(encoding, pooled=pooled), SIZES)
    assert torch.equal(result["vector"], context.vector)
    condition, unconditional = encoder.get_unconditional_conditioning(batch, force_uc_zero_embeddings=["txt"])
    assert torch.equal(condition["vector"], result["vector"]) and not unconditional["crossattn"].any()
    assert not unconditional["vector"][:, :sdxl.POOLED].any()
    assert torch.equal(unconditional["vector"][:, sdxl.POOLED:], encoder.size_features(SIZES))
    negative = {**batch, "txt": ["blurry", ""]}
    assert torch.equal(encoder.get_unconditional_conditioning(batch, negative)[1]["crossattn"], encoder(negative)[
        "crossattn"])


@pytest.mark.slow
def test_outputs_are_dropped_at_their_rate_but_not_for_guidance(own: GeneralConditioner) -> None:
    own.embedders[0].ucg_rate = own.embedders[2].ucg_rate = 1.0
    batch = {"txt": PROMPTS, **dict.fromkeys(("crop_coords_top_left", "target_size_as_tuple"), SIZES[:, :2]),
             "original_size_as_tuple": SIZES[:, :2]}
    dropped, kept = own(batch), own.get_unconditional_conditioning(batch)[0]
    assert not dropped["crossattn"][..., :sdxl.WIDTH_L].any() and dropped["crossattn"][..., sdxl.WIDTH_L:].all()
    assert not dropped["vector"][:, sdxl.POOLED:sdxl.POOLED + 2 * sdxl.FEATURES].any()
    assert kept["crossattn"].all() and own.embedders[0].ucg_rate == 1.0
    own.embedders[0].legacy_ucg_value = ""
    assert torch.equal(own(batch)["crossattn"][:1, :, :sdxl.WIDTH_L],
                       own({**batch, "txt": ["", ""]})["crossattn"][:1, :, :sdxl.WIDTH_L])


def test_the_empty_negative_prompt_is_zero_and_the_empty_prompt_is_not(encoder: GeneralConditioner) -> None:
    encoding, pooled = encoder.encode_unconditional()
    assert encoding.shape == (1, sdxl.LENGTH, sdxl.WIDTH_L + sdxl.WIDTH_G) and not encoding.any() and not pooled.any()
    assert all(part.any() for part in encoder.encode_with_pooled(encoder.tokenize([""])))


@pytest.mark.slow
def test_only_trainable_embedders_train() -> None:
    encoder = instantiate_from_config(config(_0={"is_trainable": True})).train()
    trained = {name.split(".")[1] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {"0"} and [embedder.training for embedder in encoder.towers] == [True, False]


def test_a_call_of_the_second_tower_returns_what_its_params_ask_for(encoder: GeneralConditioner) -> None:
    tower = encoder.towers[1]
    encoding, pooled = tower(PROMPTS)
    assert encoding.shape == (2, sdxl.LENGTH, sdxl.WIDTH_G) and pooled.shape == (2, sdxl.POOLED)
    legacy = FrozenOpenCLIPEmbedder2(str(sdxl.TOWERS / "clip_g.json"), max_length=sdxl.LENGTH, layer="penultimate")
    legacy.load_state_dict(tower.state_dict())
    assert torch.allclose(legacy("a teddy bear"), tower.model.ln_final(encoding[:1]), atol=1e-5)
    assert not legacy.has_pooled and legacy.encode_with_pooled(legacy.tokenize(PROMPTS))[1] is None


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "message"), [
    ({"_0": {"input_key": None, "input_keys": ["a"]}}, "emb_models.0. needs an input_key or input_keys"),
    ({"_1": {"ucg": 0.1}}, "emb_models.1. has an unknown key ucg; it may have .*ucg_rate"),
    ({"_1": {"params": {"arch": str(sdxl.TOWERS / "clip_g.json"), "max_length": 8}}}, "take 8 and 24 tokens"),
    ({"_1": {"params": {"arch": "missing.json"}}}, "arch missing.json: cannot be read"),
    ({"_1": {"params": {"arch": "ViT-bigG-14", "always_return_pooled": True}}}, "needs legacy: false"),
    ({"_2": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {
        "version": str(sdxl.TOWERS / "clip_l"), "max_length": 24}}}, None),
])
def test_configs_that_do_not_fit_are_told_in_one_line(changes: dict[str, Any], message: str | None) -> None:
    section = config(**changes)
    if message is None:  # a tower after sizes
        section["params"]["emb_models"].insert(0, section["params"]["emb_models"].pop())
        message = "text encoders must come before the other embedders"
    with pytest.raises(UserError, match=message) as error:
        instantiate_from_config(section)
    assert "\n" not in str(error.value)


def test_a_conditioner_needs_text() -> None:
    section = config()
    section["params"]["emb_models"] = section["params"]["emb_models"][2:]
    with pytest.raises(UserError, match="none of emb_models reads text"):
        instantiate_from_config(section)
