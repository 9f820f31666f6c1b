"""OpenCLIP's text tower, the text encoder of Stable Diffusion 2 (Ilharco et al., OpenCLIP; Rombach et al. 2022)."""
from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Sequence

import open_clip
import torch
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.common.errors import UserError
from ldm.modules.encoders.clip import TOKENIZER, ClipWords

LAYERS = ("last", "penultimate")
PADDING = 0  # not the end token, as with OpenAI's tower


class FrozenOpenCLIPEmbedder(ClipWords):
    """The text tower of an OpenCLIP, its final norm included: prompts to encodings (B, max_length, d).

    The tower is built without weights: a Stable Diffusion 2 checkpoint brings them, as `model.…`.

    Args:
        arch: name of an architecture that `open_clip` knows.
        version: which weights of it the public models began with; kept for the public configs.
        device: kept for the public configs; the module moves with the model it is part of.
        max_length: tokens per prompt, start and end included.
        freeze: whether the tower's parameters are taken out of training.
        layer: "last", or "penultimate" to leave the last layer out.

    Raises:
        UserError: there is no such architecture or layer, or the tower has not that many positions.
    """

    def __init__(self, arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: str = "cuda",
                 max_length: int = 77, freeze: bool = True, layer: str = "last") -> None:
        super().__init__()
        if layer not in LAYERS:
            raise UserError(f"FrozenOpenCLIPEmbedder: layer {layer!r} is unknown; choose one of {', '.join(LAYERS)}")
        self.model = text_tower(arch)
        if max_length > self.model.context_length:
            raise UserError(f"text encoder {arch} takes {self.model.context_length} tokens; "
                            f"lower max_length ({max_length})")
        self.max_length, self.layer_idx = max_length, LAYERS.index(layer)
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self._clean = get_clean_fn("lower")
        if freeze:
            self.freeze()

    @property
    def unread_keys(self) -> tuple[str, ...]:
        """How keys begin that encodings do not depend on; files of diffusers' kind lack them."""
        blocks = range(len(self.model.transformer.resblocks))
        left_out = (f"model.transformer.resblocks.{number}." for number in blocks[len(blocks) - self.layer_idx:])
        return "model.text_projection", "model.logit_scale", *left_out

    @property
    def token_table(self) -> Tensor:
        return self.model.token_embedding.weight

    def word_pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
        return super().word_pieces_of([self._clean(text) for text in texts])

    def _frame(self) -> tuple[int, int, int]:
        return self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, PADDING

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        length = embedded.shape[1]
        x = embedded + self.model.positional_embedding[:length]
        causal = self.model.attn_mask[:length, :length]
        blocks = self.model.transformer.resblocks
        for block in blocks[:len(blocks) - self.layer_idx]:
            x = block(x, attn_mask=causal)
        return self.model.ln_final(x)


def text_tower(arch: str) -> TextTransformer:
    """The text half of one of `open_clip`'s architectures, with the keys that it has in a whole OpenCLIP.

    Raises:
        UserError: there is no such architecture, or its text half is of another kind.
    """
    config = open_clip.get_model_config(arch)
    if config is None:
        near = difflib.get_close_matches(arch, open_clip.list_models(), 3)
        raise UserError(f"arch {arch!r}: open_clip has no such architecture; "
                        f"give one that it has{', such as ' if near else ''}{', '.join(near)}")
    params = dict(config["text_cfg"])
    if config.get("custom_text") or not set(params) <= set(inspect.signature(TextTransformer).parameters):
        raise UserError(f"arch {arch!r}: its text tower is not CLIP's; Stable Diffusion 2 has that of ViT-H-14")
    activation = QuickGELU if config.get("quick_gelu") else nn.GELU
    tower = TextTransformer(output_dim=config["embed_dim"], act_layer=activation, **params)
    tower.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # of the whole; checkpoints carry it along
    return tower


def text_features(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """(B, embed_dim) as `encode_text` gives, computed no further than the longest of B texts, (B, N): a word looks at
    none after it."""
    ends, length = tokens.argmax(1), tokens.shape[1]  # the end token has the highest number
    encoded = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    encoded = clip.ln_final(clip.transformer(encoded, attn_mask=clip.attn_mask[:length, :length]))
    return encoded[torch.arange(len(tokens), device=tokens.device), ends] @ clip.text_projection
