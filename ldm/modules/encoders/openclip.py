"""OpenCLIP's text tower, the text encoder of Stable Diffusion 2 (Ilharco et al. 2021; Rombach et al., CVPR 2022)."""
from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import _build_vision_tower
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.checkpoints.deferred_init import DeferredInit
from ldm.common.errors import UserError, brief_reason
from ldm.common.paths import resolve_path
from ldm.modules.encoders.clip import TOKENIZER, ClipWords
from ldm.modules.encoders.prompts import EmbeddingManagerLike
from ldm.util import to_device

PADDING = 0  # OpenAI's tower pads with the end token instead


class FrozenOpenCLIPEmbedder(ClipWords):
    """Encode prompts by the text tower of an OpenCLIP and its final norm, to (B, max_length, d).

    The tower is built without weights. A Stable Diffusion 2 checkpoint holds them, with keys `model.…`.

    Args:
        arch: name of an architecture that `open_clip` knows, or a JSON file that describes one as `open_clip` does.
        version: the pretrained weights that the public models started from; ignored, kept for the public configs.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        max_length: number of tokens per prompt, start and end tokens included.
        freeze: whether to take the tower's parameters out of training.
        layer: "last", or "penultimate" to skip the last layer.

    Raises:
        UserError: if there is no such architecture or layer, or the tower has fewer positions.
    """

    LAYERS = ("last", "penultimate")
    awaits_weights = True
    _draws_vision_tower = True

    def __init__(self, arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: str = "cuda",
                 max_length: int = 77, freeze: bool = True, layer: str = "last") -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise UserError(f"{type(self).__name__}: layer {layer!r} is unknown; "
                            f"choose one of {', '.join(self.LAYERS)}")
        if self._draws_vision_tower:
            _draw_vision_tower(arch)
        self.model = text_tower(arch)
        if max_length > self.model.context_length:
            raise UserError(f"text encoder {arch} takes {self.model.context_length} tokens; "
                            f"lower max_length ({max_length})")
        self.max_length, self.layer, self.layer_idx = max_length, layer, self.LAYERS.index(layer)
        self.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
        self._clean = get_clean_fn("lower")
        if freeze:
            self.freeze()

    @property
    def unread_keys(self) -> tuple[str, ...]:
        """Prefixes of the keys that encodings do not depend on; folders of diffusers do not have these weights."""
        count = len(self.model.transformer.resblocks)
        skipped_blocks = [f"model.transformer.resblocks.{index}." for index in range(count - self.layer_idx, count)]
        return "model.text_projection", "model.logit_scale", *skipped_blocks

    @property
    def token_table(self) -> Tensor:
        return self.model.token_embedding.weight

    @property
    def word_parts(self) -> dict[str, int]:
        return {"clip_h": self.token_table.shape[1]}

    def word_pieces_of(self, texts: Sequence[str]) -> list[list[int]]:
        return super().word_pieces_of([self._clean(text) for text in texts])

    def _special_tokens(self) -> tuple[int, int, int]:
        return self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, PADDING

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Encode tokens (B, N) to (B, N, d): the public code's name of `encode_tokens`."""
        return self.encode_tokens(text)

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        x = embedded + self.model.positional_embedding[:embedded.shape[1]]
        return self.model.ln_final(self._apply_blocks(x, slice(None, self._block_count)))

    @property
    def _block_count(self) -> int:
        """The number of blocks that the encoding takes."""
        return len(self.model.transformer.resblocks) - self.layer_idx

    def _apply_blocks(self, x: Tensor, which: slice) -> Tensor:
        """Apply some of the tower's blocks to (B, N, d)."""
        length = x.shape[1]
        causal_mask = self.model.attn_mask[:length, :length]
        for block in self.model.transformer.resblocks[which]:
            x = block(x, attn_mask=causal_mask)
        return x


class FrozenOpenCLIPEmbedder2(FrozenOpenCLIPEmbedder):
    """Encode prompts by the text tower of an OpenCLIP, and each prompt as a whole: the second tower of SDXL.

    The encoding has no final norm. The pooled encoding, (B, embed_dim), is that of the end token in the last layer,
    through the final norm and the projection, as OpenCLIP compares it with images.

    Args (in addition to those of `FrozenOpenCLIPEmbedder`):
        always_return_pooled: whether a call returns both (encoding, pooled).
        legacy: encode as `FrozenOpenCLIPEmbedder` does, through the final norm and without a pooled encoding.

    Raises:
        UserError: as `FrozenOpenCLIPEmbedder`; or both `always_return_pooled` and `legacy` are set.

    Source: Stability-AI/generative-models, the class of this name.
    """

    _draws_vision_tower = False  # that of ViT-bigG-14 has 1.8 billion weights

    def __init__(self, arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: str = "cuda",
                 max_length: int = 77, freeze: bool = True, layer: str = "last", always_return_pooled: bool = False,
                 legacy: bool = True) -> None:
        if always_return_pooled and legacy:
            raise UserError("FrozenOpenCLIPEmbedder2: always_return_pooled needs legacy: false")
        super().__init__(arch, version, device, max_length, freeze, layer)
        self.return_pooled, self.legacy = always_return_pooled, legacy

    @property
    def has_pooled(self) -> bool:
        return self.return_pooled

    @property
    def unread_keys(self) -> tuple[str, ...]:
        return ("model.logit_scale",) if self.return_pooled else super().unread_keys

    @property
    def word_parts(self) -> dict[str, int]:
        return {"clip_g": self.token_table.shape[1]}

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        if self.legacy:
            return super().encode_embedded(embedded)
        x = embedded + self.model.positional_embedding[:embedded.shape[1]]
        return self._apply_blocks(x, slice(None, self._block_count))

    def _encode_with_pooled(self, embedded: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        encoding = self._encode_embedded(embedded, tokens)
        if not self.return_pooled:
            return encoding, None
        last = self.model.ln_final(self._apply_blocks(encoding, slice(self._block_count, None)))
        # The end token has the highest index in the vocabulary, but placeholders have higher ones.
        is_end = (tokens == self.tokenizer.eos_token_id).int()
        ends = to_device(is_end.argmax(1), last.device)
        return encoding, last[torch.arange(len(last), device=last.device), ends] @ self.model.text_projection

    def forward(self, text: Sequence[str] | str,
                embedding_manager: EmbeddingManagerLike | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Encode prompts as `PromptEncoder.forward` does, and as a whole too if `always_return_pooled`."""
        if not self.return_pooled:
            return super().forward(text, embedding_manager)
        tokens = self.tokenize([text] if isinstance(text, str) else text, truncate=True)
        return self.encode_with_pooled(tokens)


def _draw_vision_tower(arch: str) -> None:
    """Take the random numbers of a vision tower, which the original builds first and throws away.

    Scripts of the LDM family set the seed before they build the model, so on the CPU these numbers decide the image.
    Where initialization is deferred, it is not needed, and nothing is drawn: the tower of ViT-H-14 takes four seconds.
    """
    config = _architecture(arch)
    if config is not None and not DeferredInit.active:
        _build_vision_tower(config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu")))


def text_tower(arch: str) -> TextTransformer:
    """Build the text tower of one of `open_clip`'s architectures, with the keys that it has in a complete OpenCLIP.

    Raises:
        UserError: if there is no such architecture, or its text tower is not CLIP's.
    """
    config = _architecture(arch)
    if config is None:
        similar = difflib.get_close_matches(arch, open_clip.list_models(), 3)
        raise UserError(f"arch {arch!r}: open_clip has no such architecture; "
                        f"give one that it has{', such as ' if similar else ''}{', '.join(similar)}")
    params = dict(config["text_cfg"])
    if config.get("custom_text") or not set(params) <= set(inspect.signature(TextTransformer).parameters):
        raise UserError(f"arch {arch!r}: its text tower is not CLIP's; use ViT-H-14, as Stable Diffusion 2 does")
    activation = QuickGELU if config.get("quick_gelu") else nn.GELU
    tower = TextTransformer(output_dim=config["embed_dim"], act_layer=activation, **params)
    tower.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # unused here, but in checkpoints
    return tower


def _architecture(arch: str) -> dict[str, Any] | None:
    """Return the description of an architecture, by its name or from a JSON file; None if the name is unknown."""
    if not arch.endswith(".json"):
        return open_clip.get_model_config(arch)
    try:
        return json.loads(resolve_path(arch).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"arch {arch}: cannot be read ({brief_reason(error)}); give a JSON file of open_clip") from None


def text_features(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Compute what `clip.encode_text` returns, for texts shorter than the tower's length.

    Attention is causal, so tokens after the end token do not matter: N may be the length of the longest text.

    Args:
        tokens: (B, N)

    Returns:
        (B, embed_dim)
    """
    end_positions, length = tokens.argmax(1), tokens.shape[1]  # the end token has the highest index
    encoded = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    encoded = clip.ln_final(clip.transformer(encoded, attn_mask=clip.attn_mask[:length, :length]))
    return encoded[torch.arange(len(tokens), device=tokens.device), end_positions] @ clip.text_projection
