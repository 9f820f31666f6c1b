"""A text tower that understands asides, against the plain one on what is told and on what is heard."""
from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import text_tower

from ldm.common.errors import UserError
from ldm.data.mini.attribute_captions import as_heard, as_told
from ldm.modules.context import PromptContext
from ldm.modules.encoders.attribute_binding import AttributeBindingCLIPEmbedder, nouns
from ldm.modules.encoders.clip import FrozenCLIPEmbedder

CAPTIONS = ["a photo of a (orange striped|palm tree) next to a (red|cat)", "a cat", "",
            "a small (blue|owl)"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def encoder(tower: str) -> AttributeBindingCLIPEmbedder:
    torch.manual_seed(0)
    return AttributeBindingCLIPEmbedder(tower, max_length=16, freeze=False)


@pytest.fixture(scope="module")
def plain(tower: str, encoder: AttributeBindingCLIPEmbedder) -> FrozenCLIPEmbedder:
    made = FrozenCLIPEmbedder(tower, max_length=16)
    made.load_state_dict(encoder.state_dict())
    return made


def test_nouns_hear_and_nothing_else_does(encoder: AttributeBindingCLIPEmbedder, plain: FrozenCLIPEmbedder) -> None:
    found = encoder(CAPTIONS)
    told, heard = plain([as_told(c) for c in CAPTIONS]), plain([as_heard(c) for c in CAPTIONS])
    # "<start> a photo of a palm tree next to a cat": the nouns are tokens 5, 6 and 10, as heard 7, 8 and 13
    moved = {(0, 5): (0, 7), (0, 6): (0, 8), (0, 10): (0, 13), (3, 3): (3, 4)}
    for row in range(len(CAPTIONS)):
        for token in range(16):
            of = heard[moved[row, token]] if (row, token) in moved else told[row, token]
            torch.testing.assert_close(found[row, token], of, msg=f"{row}, {token}")
            if (row, token) in moved:
                assert not torch.allclose(found[row, token], told[row, token])


def test_places_of_nouns(encoder: AttributeBindingCLIPEmbedder) -> None:
    (row, first), (_, second), *_ = nouns(encoder, CAPTIONS)
    assert row == 0
    assert (first.told, first.heard, first.count) == (5, 7, 2)
    assert (second.told, second.heard, second.count) == (10, 13, 1)


def test_captions_without_asides_are_read_as_ever(encoder: AttributeBindingCLIPEmbedder, plain: FrozenCLIPEmbedder) -> None:
    torch.testing.assert_close(encoder(["a red cat", ""]), plain(["a red cat", ""]))
    torch.testing.assert_close(encoder("a red cat"), plain("a red cat"))


def test_what_is_heard_is_learned_from(encoder: AttributeBindingCLIPEmbedder) -> None:
    encoder.zero_grad()
    noun = encoder(["a (red|cat)"])[0, 2]
    noun.square().sum().backward()
    red, photo = (encoder.word_pieces(word)[0] for word in ("red", "photo"))
    gradient = encoder.token_table.grad
    assert gradient[red].abs().sum() > 0 and gradient[photo].abs().sum() == 0
    encoder.zero_grad()


def test_too_long_with_its_asides(encoder: AttributeBindingCLIPEmbedder) -> None:
    caption = f"a ({'red ' * 12}striped|cat)"
    with pytest.raises(UserError, match="tokens, but the text encoder takes 14"):
        encoder([caption])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_keys_of_what_is_told(encoder: AttributeBindingCLIPEmbedder, plain: FrozenCLIPEmbedder, share: float) -> None:
    to_k, to_v = torch.nn.Linear(16, 8, bias=False), torch.nn.Linear(16, 8, bias=False)
    heard, told = encoder(CAPTIONS), plain([as_told(c) for c in CAPTIONS])
    torch.manual_seed(0)
    encoder.told_keys = share
    found = encoder(CAPTIONS)
    encoder.told_keys = 0.0
    if not share:
        assert isinstance(found, torch.Tensor)
        return
    assert isinstance(found, PromptContext)
    keys, values = found.keys_values("layer", to_k, to_v)
    torch.testing.assert_close(values, to_v(heard))
    locked = (keys - to_k(told)).abs().amax((1, 2)) < 1e-4
    torch.testing.assert_close(keys[~locked], to_k(heard)[~locked])
    if share == 1:
        assert locked.all()


def test_some_captions_keep_the_keys_of_what_is_told(encoder: AttributeBindingCLIPEmbedder) -> None:
    torch.manual_seed(0)
    encoder.told_keys = 0.3
    found = encoder(["a (red|cat)"] * 400)
    encoder.told_keys = 0.0
    locked = (found.key_projected != found.projected).flatten(1).any(1)
    assert 0.2 < locked.float().mean() < 0.4


def test_no_share(tower: str) -> None:
    with pytest.raises(UserError, match="told_keys 1.5 is a share"):
        AttributeBindingCLIPEmbedder(tower, max_length=16, told_keys=1.5)
