"""Text encoders that condition the U-Net, under CompVis latent-diffusion's names."""
from __future__ import annotations

import logging
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.errors import UserError
from ldm.modules.encoders.vocabulary import load_pretrained

log = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[3]
TOKENIZER = PROJECT / "models" / "clip_tokenizer"
# Text towers whose weights come with a Stable Diffusion checkpoint: known by name, nothing to download.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768, "hidden_act": "quick_gelu"},
}


class AbstractEncoder(nn.Module):
    """Something that turns a batch of conditions into what the U-Net attends to."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


class FrozenCLIPEmbedder(AbstractEncoder):
    """The text tower of a CLIP: prompts to encodings (B, max_length, d).

    Args:
        version: a folder with config.json (and weights, if no checkpoint brings them), or a hub name.
        device: kept for the public configs; the module moves with the model it is part of.
        max_length: tokens per prompt, start and end included.
        freeze: whether the tower's parameters are taken out of training.
        layer, layer_idx: "last", or "hidden" with the number of a layer whose output is taken instead, without the
            final norm; 0 is what enters the first layer, -1 what leaves the last one.

    Raises:
        UserError: there is no such tower, it is incomplete, or it has no such layer or not that many positions.
    """

    def __init__(self, version: str = "openai/clip-vit-large-patch14", device: str = "cuda", max_length: int = 77,
                 freeze: bool = True, layer: str = "last", layer_idx: int | None = None) -> None:
        super().__init__()
        if layer not in ("last", "hidden") or (layer == "hidden") != (layer_idx is not None):
            raise UserError(f"FrozenCLIPEmbedder: layer {layer!r} with layer_idx {layer_idx}; "
                            "give 'last' alone or 'hidden' with a number")
        self.max_length, self.layer_idx = max_length, layer_idx
        self.tokenizer, self.transformer = _clip_tower(version)
        self._check_fit(version)
        self.register_state_dict_post_hook(_spell_as_compvis)
        self.register_load_state_dict_pre_hook(_spell_as_installed)
        if freeze:
            self.freeze()

    def _check_fit(self, version: str) -> None:
        config = self.transformer.config
        if self.max_length > config.max_position_embeddings:
            raise UserError(f"text encoder {version!r} takes {config.max_position_embeddings} tokens; "
                            f"lower max_length ({self.max_length})")
        if len(self.tokenizer) > config.vocab_size:
            raise UserError(f"text encoder {version!r}: its tokenizer knows {len(self.tokenizer)} word pieces, its "
                            f"model {config.vocab_size}; give a folder with files that belong together")
        layers = config.num_hidden_layers
        if self.layer_idx is not None and self.layer_idx not in range(-layers - 1, layers + 1):
            raise UserError(f"text encoder {version!r} has {layers} layers, and no layer_idx {self.layer_idx}; "
                            f"choose one from 0 to {layers}")

    def freeze(self) -> None:
        self.transformer.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenCLIPEmbedder:
        """A frozen tower stays in evaluation mode."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    @property
    def device(self) -> torch.device:
        return self.token_table.device

    @property
    def token_table(self) -> Tensor:
        """(vocabulary, width): the embedding of every word piece."""
        return self.transformer.get_input_embeddings().weight

    def word_pieces(self, text: str) -> list[int]:
        """The numbers of the word pieces of `text`, without start and end."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def unknown_words(self, text: str) -> list[str]:
        """The words of `text`, without punctuation, of which every piece has a row that training has not touched."""
        words = dict.fromkeys(bare for word in text.split() if (bare := word.strip(string.punctuation)))
        untouched = self._untouched_rows()
        return [word for word in words if bool(untouched[self.word_pieces(word)].all())]

    def known_words(self) -> list[str]:
        """Every whole word of letters that training has touched, sorted; none where it has touched most of them."""
        untouched = self._untouched_rows()
        whole = {piece.removesuffix("</w>"): number for piece, number in self.tokenizer.get_vocab().items()
                 if piece.endswith("</w>") and piece.removesuffix("</w>").isalpha()}
        return sorted(word for word, number in whole.items() if not untouched[number]) if untouched.any() else []

    def _untouched_rows(self) -> Tensor:
        """(vocabulary,) booleans: rows that equal most others, as in tables that were trained on few words."""
        table = self.token_table.detach()
        usual = table[::max(1, len(table) // 255)].median(0).values  # column by column that of a row, if most are equal
        untouched = (table == usual).all(1)
        return untouched & (2 * untouched.sum() > len(table))

    def tokenize(self, prompts: Sequence[str], placeholders: Sequence[str] = ()) -> Tensor:
        """(B, max_length) numbers of word pieces; the j-th placeholder is one token, number `vocabulary size + j`.

        Raises:
            UserError: a prompt has more tokens than fit.
        """
        return torch.stack([self._row(prompt, placeholders) for prompt in prompts])

    def _row(self, prompt: str, placeholders: Sequence[str]) -> Tensor:
        pieces: list[int] = []
        for part in split_at_placeholders(prompt, placeholders):
            pieces += self.word_pieces(part) if isinstance(part, str) else [len(self.token_table) + part]
        room = self.max_length - 2
        if len(pieces) > room:
            shown = prompt if len(prompt) <= 80 else f"{prompt[:79]}…"
            raise UserError(f"the prompt {shown!r} has {len(pieces)} tokens, but the text encoder takes {room}; "
                            "shorten it")
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return torch.tensor([start, *pieces, *[end] * (self.max_length - 1 - len(pieces))])

    def encode_tokens(self, tokens: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Encodings (B, N, d) of tokens (B, N), where numbers past the vocabulary stand for the rows of `vectors`.

        The tower runs on a table of just the words in use, so a gradient with respect to `vectors` (J, width) costs
        no more than they do, and nothing inside the tower is replaced.
        """
        table = self.token_table
        tokens = tokens.to(table.device)
        words, places = tokens.unique(return_inverse=True)
        known = words < len(table)
        rows = table[words[known]]
        if vectors is not None:
            rows = torch.cat([rows, vectors.to(rows.dtype)[words[~known] - len(table)]])
        name = next(n for n, parameter in self.transformer.named_parameters() if parameter is table)
        output = functional_call(self.transformer, {name: rows}, kwargs={
            "input_ids": places, "output_hidden_states": self.layer_idx is not None})
        return output.last_hidden_state if self.layer_idx is None else output.hidden_states[self.layer_idx]

    def forward(self, text: Sequence[str] | str) -> Tensor:
        return self.encode_tokens(self.tokenize([text] if isinstance(text, str) else text))


def split_at_placeholders(prompt: str, placeholders: Sequence[str]) -> list[str | int]:
    """The prompt cut at whole placeholders (any case, the longest first): texts, and the numbers of placeholders."""
    if not placeholders:
        return [prompt]
    numbers = sorted(range(len(placeholders)), key=lambda number: -len(placeholders[number]))
    alternatives = "|".join(f"({whole_word(placeholders[number])})" for number in numbers)
    parts: list[str | int] = []
    done = 0
    for found in re.finditer(alternatives, prompt, flags=re.IGNORECASE):
        parts += [prompt[done:found.start()], numbers[found.lastindex - 1]]
        done = found.end()
    return [part for part in [*parts, prompt[done:]] if isinstance(part, int) or part.strip()]


def whole_word(word: str) -> str:
    """A pattern for `word` that does not match inside a longer word; `<x>` ends by itself, so `<x>s` contains it."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def _clip_tower(version: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    folder = Path(version) if Path(version).is_dir() else PROJECT / version
    try:
        if version in KNOWN_TOWERS and not Path(version).is_dir():
            tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
            return tokenizer, CLIPTextModel(CLIPTextConfig(**KNOWN_TOWERS[version], **_special(tokenizer)))
        if (folder / "config.json").is_file():
            own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
            tokenizer = CLIPTokenizer.from_pretrained(folder if own else TOKENIZER)
            if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
                return tokenizer, load_pretrained(CLIPTextModel, folder)
            return tokenizer, CLIPTextModel(CLIPTextConfig.from_pretrained(folder))
        model = load_pretrained(CLIPTextModel, version)  # first: where there is no network, it asks the fewest times
        return CLIPTokenizer.from_pretrained(version), model
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"text encoder {version!r} cannot be loaded ({reason}); give a local folder") from None


def _special(tokenizer: CLIPTokenizer) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}


# CompVis's checkpoints spell the tower's keys `transformer.text_model.…`; transformers 5 dropped `text_model.`.
_COMPVIS, _SHORT = "transformer.text_model.", "transformer."


def _spell_as_compvis(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + _SHORT)]:
        if not key.startswith(prefix + _COMPVIS):
            state[prefix + _COMPVIS + key.removeprefix(prefix + _SHORT)] = state.pop(key)


def _spell_as_installed(module: FrozenCLIPEmbedder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    installed = any(name.startswith("text_model.") for name, _ in module.transformer.named_parameters())
    for key in [key for key in state if key.startswith(prefix + _SHORT)]:
        rest = key.removeprefix(prefix + _COMPVIS).removeprefix(prefix + _SHORT)
        value = state.pop(key)
        if rest.split(".")[-1] != "position_ids":
            state[prefix + (_COMPVIS if installed else _SHORT) + rest] = value
