"""AttributeBindingCLIPEmbedder against a plain tower that encodes the plain and the full captions."""
from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import write_text_tower

from ldm.common.errors import UserError
from ldm.data.mini.attribute_captions import full_caption, plain_caption
from ldm.modules.context import PromptContext
from ldm.modules.encoders.attribute_binding import AttributeBindingCLIPEmbedder, locate_nouns
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config

CAPTIONS = ["a photo of a (orange striped|palm tree) next to a (red|cat)", "a cat", "",
            "a small (blue|owl)"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def encoder(tower: str) -> AttributeBindingCLIPEmbedder:
    torch.manual_seed(0)
    return AttributeBindingCLIPEmbedder(tower, max_length=16, freeze=False)


@pytest.fixture(scope="module")
def plain_encoder(tower: str, encoder: AttributeBindingCLIPEmbedder) -> FrozenCLIPEmbedder:
    loaded = FrozenCLIPEmbedder(tower, max_length=16)
    loaded.load_state_dict(encoder.state_dict())
    return loaded


def encode_plain(encoder: FrozenCLIPEmbedder) -> torch.Tensor:
    return encoder([plain_caption(caption) for caption in CAPTIONS])


def test_only_nouns_carry_attributes(encoder: AttributeBindingCLIPEmbedder, plain_encoder: FrozenCLIPEmbedder) -> None:
    result = encoder(CAPTIONS)
    plain = encode_plain(plain_encoder)
    full = plain_encoder([full_caption(caption) for caption in CAPTIONS])
    # "<start> a photo of a palm tree next to a cat": the nouns are tokens 5, 6 and 10; in the full caption 7, 8 and 13
    moved = {(0, 5): (0, 7), (0, 6): (0, 8), (0, 10): (0, 13), (3, 3): (3, 4)}
    for row in range(len(CAPTIONS)):
        for token in range(16):
            expected = full[moved[row, token]] if (row, token) in moved else plain[row, token]
            torch.testing.assert_close(result[row, token], expected, msg=f"{row}, {token}")
            if (row, token) in moved:
                assert not torch.allclose(result[row, token], plain[row, token])


def test_token_positions_of_nouns(encoder: AttributeBindingCLIPEmbedder) -> None:
    first, second, *_ = locate_nouns(encoder, CAPTIONS)
    assert first.caption == 0
    assert (first.plain_start, first.full_start, first.count) == (5, 7, 2)
    assert (second.plain_start, second.full_start, second.count) == (10, 13, 1)


def test_captions_without_attributes_are_encoded_as_usual(encoder: AttributeBindingCLIPEmbedder,
                                                          plain_encoder: FrozenCLIPEmbedder) -> None:
    torch.testing.assert_close(encoder(["a red cat", ""]), plain_encoder(["a red cat", ""]))
    torch.testing.assert_close(encoder("a red cat"), plain_encoder("a red cat"))


def test_gradients_reach_the_attributes(encoder: AttributeBindingCLIPEmbedder) -> None:
    encoder.zero_grad()
    noun = encoder(["a (red|cat)"])[0, 2]
    noun.square().sum().backward()
    red, photo = (encoder.word_pieces(word)[0] for word in ("red", "photo"))
    gradient = encoder.token_table.grad
    assert gradient[red].abs().sum() > 0 and gradient[photo].abs().sum() == 0
    encoder.zero_grad()


def test_full_captions_that_are_too_long_are_refused(encoder: AttributeBindingCLIPEmbedder) -> None:
    caption = f"a ({'red ' * 12}striped|cat)"
    with pytest.raises(UserError, match="tokens, but the text encoder takes 14"):
        encoder([caption])


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_keys_of_plain_captions(encoder: AttributeBindingCLIPEmbedder, plain_encoder: FrozenCLIPEmbedder,
                                fraction: float) -> None:
    to_k, to_v = torch.nn.Linear(16, 8, bias=False), torch.nn.Linear(16, 8, bias=False)
    bound, plain = encoder(CAPTIONS), encode_plain(plain_encoder)
    torch.manual_seed(0)
    encoder.plain_keys = fraction
    result = encoder(CAPTIONS)
    encoder.plain_keys = 0.0
    if not fraction:
        assert isinstance(result, torch.Tensor)
        return
    assert isinstance(result, PromptContext)
    keys, values = result.keys_values("layer", to_k, to_v)
    torch.testing.assert_close(values, to_v(bound))
    locked = (keys - to_k(plain)).abs().amax((1, 2)) < 1e-4
    torch.testing.assert_close(keys[~locked], to_k(bound)[~locked])
    if fraction == 1:
        assert locked.all()


def test_a_fraction_of_the_captions_has_plain_keys(encoder: AttributeBindingCLIPEmbedder) -> None:
    torch.manual_seed(0)
    encoder.plain_keys = 0.3
    result = encoder(["a (red|cat)"] * 400)
    encoder.plain_keys = 0.0
    locked = (result.key_projected != result.projected).flatten(1).any(1)
    assert 0.2 < locked.float().mean() < 0.4


def test_impossible_fractions_are_refused(tower: str) -> None:
    with pytest.raises(UserError, match="plain_keys 1.5 is a fraction"):
        AttributeBindingCLIPEmbedder(tower, max_length=16, plain_keys=1.5)


@pytest.mark.parametrize("target", ["ldm.modules.encoders.attribute_binding.AttributeBindingCLIPEmbedder",
                                    "ldm.modules.encoders.asides.AsideCLIPEmbedder"])
def test_configs_of_earlier_versions_load(tower: str, target: str) -> None:
    params = {"version": tower, "max_length": 16, "told_keys": 0.3}
    encoder = instantiate_from_config({"target": target, "params": params})
    assert isinstance(encoder, AttributeBindingCLIPEmbedder) and encoder.plain_keys == 0.3
