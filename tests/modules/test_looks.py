"""What adjectives do to a noun: against the same encoder read plainly, sentence by sentence."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import text_tower
from torch import Tensor

from ldm.errors import UserError
from ldm.modules import looks
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.prompts import word_vector
from ldm.modules.looks import MOST_LOOKS, known_looks, told_looks


class Knows:
    """A text encoder that was taught these words."""

    token_table = torch.zeros(1, 1)

    def __init__(self, *words: str) -> None:
        self.words = words

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if word not in self.words]

    def tokenize(self, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> Tensor:
        raise AssertionError("nothing is to be encoded")

    encode_tokens = tokenize


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    return FrozenCLIPEmbedder(text_tower(tmp_path_factory.mktemp("tower")), max_length=16)


def test_looks_are_of_words_that_are_known() -> None:
    found = known_looks(Knows("red", "blue", "striped", "wooden"))
    assert sorted(found) == sorted(["red", "blue", "striped", "wooden", "red striped", "blue striped", "red wooden",
                                    "blue wooden", "red and blue striped", "blue and red striped"])


def test_a_large_vocabulary_is_sampled(encoder: FrozenCLIPEmbedder) -> None:
    found = known_looks(encoder)
    assert len(set(found)) == len(found) == MOST_LOOKS
    assert found == known_looks(encoder)
    words = {word for look in found for word in look.split()}
    assert words == {*looks.COLOURS, *looks.PATTERNS, *looks.MATERIALS, "and"}


def test_the_covariance_of_what_adjectives_do(encoder: FrozenCLIPEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "known_looks", lambda _: ["red", "orange striped"])
    found = told_looks(encoder, word_vector(encoder, "cat")).covariance
    with torch.no_grad():
        plain, red, orange = (encoder([f"a photo of {words}"])[0, place].double() for words, place in (
            ("a cat", 5), ("a red cat", 6), ("an orange striped cat", 7)))
    moved = torch.stack([red - plain, orange - plain])
    torch.testing.assert_close(found, moved.T @ moved / 2, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(found) == 2


def test_an_encoder_without_adjectives_is_refused() -> None:
    with pytest.raises(UserError, match="set value_axes to plain"):
        told_looks(Knows("cat", "dog"), torch.zeros(1, 1))


def test_looks_can_be_told_in_words(encoder: FrozenCLIPEmbedder) -> None:
    noun = word_vector(encoder, "cat")
    every = told_looks(encoder, noun)
    some = told_looks(encoder, noun, every.words[3:5])
    torch.testing.assert_close(some.moves, every.moves[3:5], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="looks: grue, bleen means nothing to this model"):
        told_looks(Knows("red"), noun, ["grue red", "bleen"])
