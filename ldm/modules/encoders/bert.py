"""The text encoder of latent diffusion's 1.4B text-to-image model (Rombach et al., CVPR 2022, Sec. 4.3.1).

A transformer that was trained along with the U-Net, on the word pieces of BERT (Devlin et al. 2018).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import BertTokenizer

from ldm.common.errors import UserError
from ldm.modules.encoders.clip import PROJECT
from ldm.modules.encoders.prompts import AbstractEncoder, PromptEncoder
from ldm.modules.x_transformer import Encoder, TransformerWrapper

BERT_TOKENIZER = PROJECT / "models" / "bert_tokenizer"


class TransformerEmbedder(AbstractEncoder):
    """Tokens (B, N) of any vocabulary to encodings (B, N, n_embed).

    Args:
        n_embed: width.
        n_layer: pairs of attention and feed-forward layers.
        vocab_size: how many tokens there are.
        max_seq_len: most tokens at a time.
        device: kept for the public configs; the module moves with the model it is part of.
    """

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77,
                 device: str = "cuda") -> None:
        super().__init__()
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, Encoder(n_embed, n_layer))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)


class BERTTokenizer(AbstractEncoder):
    """Texts to numbers (B, max_length) of BERT's uncased word pieces, [CLS] first, [SEP] last, then [PAD].

    Args:
        device: kept for the public configs; tokens are on the CPU.
        vq_interface: `encode` gives the tokens where a VQ model has its indices: (None, None, [None, None, tokens]).
        max_length: tokens per text; what is longer is cut off.
    """

    def __init__(self, device: str = "cuda", vq_interface: bool = True, max_length: int = 77) -> None:
        super().__init__()
        self.tokenizer = BertTokenizer.from_pretrained(BERT_TOKENIZER)
        self.vq_interface, self.max_length = vq_interface, max_length

    def forward(self, text: Sequence[str] | str) -> Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, padding="max_length",
                              return_tensors="pt")["input_ids"]

    def encode(self, text: Sequence[str] | str) -> Any:
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens


class BERTEmbedder(PromptEncoder):
    """Prompts to encodings (B, max_seq_len, n_embed); every token attends to every other, padding included.

    Args:
        n_embed, n_layer, vocab_size, max_seq_len: see `TransformerEmbedder`.
        device: kept for the public configs; the module moves with the model it is part of.
        use_tokenizer: False for a model of other tokens, which are then given as they are, (B, N).
        embedding_dropout: share of the embeddings' numbers left out in training.
    """

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int = 30522, max_seq_len: int = 77,
                 device: str = "cuda", use_tokenizer: bool = True, embedding_dropout: float = 0.0) -> None:
        super().__init__()
        self.use_tknz_fn, self.max_length = use_tokenizer, max_seq_len
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len)
            if len(self.tokenizer) > vocab_size:
                raise UserError(f"BERTEmbedder: vocab_size {vocab_size}, but its tokenizer knows "
                                f"{len(self.tokenizer)} word pieces; leave vocab_size out, or set use_tokenizer: false")
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, Encoder(n_embed, n_layer), embedding_dropout)

    @property
    def tokenizer(self) -> BertTokenizer:
        return self.tknz_fn.tokenizer

    @property
    def token_table(self) -> Tensor:
        return self.transformer.token_emb.weight

    def _frame(self) -> tuple[int, int, int]:
        return self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        return self.transformer.encode_embedded(embedded)

    def _whole_words(self) -> dict[str, int]:
        return {piece: number for piece, number in self.tokenizer.get_vocab().items() if not piece.startswith("##")}

    def forward(self, text: Sequence[str] | str | Tensor) -> Tensor:
        return super().forward(text) if self.use_tknz_fn else self.encode_tokens(text)
