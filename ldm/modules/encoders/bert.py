"""The text encoder of latent diffusion's 1.4B text-to-image model (Rombach et al., CVPR 2022, Sec. 4.3.1).

The encoder is a transformer that was trained together with the U-Net. It reads BERT's word pieces (Devlin et al. 2018).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import BertTokenizer

from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.modules.encoders.prompts import AbstractEncoder, EmbeddingManagerLike, PromptEncoder
from ldm.modules.x_transformer import Encoder, TransformerWrapper

BERT_TOKENIZER = PROJECT_ROOT / "models" / "bert_tokenizer"


class TransformerEmbedder(AbstractEncoder):
    """Encode tokens of any vocabulary: (B, N) to (B, N, n_embed).

    Args:
        n_embed: width of the encodings.
        n_layer: number of pairs of an attention and a feed-forward layer.
        vocab_size: size of the vocabulary.
        max_seq_len: largest N.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
    """

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77,
                 device: str = "cuda") -> None:
        super().__init__()
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, Encoder(n_embed, n_layer))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)


class BERTTokenizer(AbstractEncoder):
    """Turn texts into indices (B, max_length) of BERT's uncased word pieces: [CLS], the pieces, [SEP], then [PAD].

    Args:
        device: stored for users who read it; tokens are on the CPU.
        vq_interface: `encode` returns (None, None, [None, None, tokens]), as a VQ model returns its indices.
        max_length: number of tokens per text; longer texts are cut off.
    """

    def __init__(self, device: str = "cuda", vq_interface: bool = True, max_length: int = 77) -> None:
        super().__init__()
        self.tokenizer = BertTokenizer.from_pretrained(BERT_TOKENIZER)
        self.device, self.vq_interface, self.max_length = device, vq_interface, max_length

    def forward(self, text: Sequence[str] | str) -> Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, padding="max_length",
                              return_tensors="pt")["input_ids"]

    def encode(self, text: Sequence[str] | str) -> Any:
        tokens = self(text)
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text: Any) -> Any:
        """Return the text: the counterpart of `encode` in the public code."""
        return text


class BERTEmbedder(PromptEncoder):
    """Encode prompts to (B, max_seq_len, n_embed). Every token attends to every other token, padding included.

    Args:
        n_embed, n_layer, vocab_size, max_seq_len: see `TransformerEmbedder`.
        device: ignored, kept for the public configs; the module moves with the model that contains it.
        use_tokenizer: whether inputs are texts; False: they are tokens (B, N) of another vocabulary.
        embedding_dropout: dropout rate of the embeddings in training.

    Raises:
        UserError: if `vocab_size` is too small for the tokenizer.
    """

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int = 30522, max_seq_len: int = 77,
                 device: str = "cuda", use_tokenizer: bool = True, embedding_dropout: float = 0.0) -> None:
        super().__init__()
        self.use_tknz_fn, self.max_length = use_tokenizer, max_seq_len
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len)
            pieces = len(self.word_tokenizer)
            if pieces > vocab_size:
                raise UserError(f"BERTEmbedder: vocab_size {vocab_size}, but its tokenizer knows {pieces} word pieces; "
                                "leave vocab_size out, or set use_tokenizer: false")
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, Encoder(n_embed, n_layer), embedding_dropout)

    @property
    def word_tokenizer(self) -> BertTokenizer:
        return self.tknz_fn.tokenizer

    @property
    def token_table(self) -> Tensor:
        return self.transformer.token_emb.weight

    @property
    def word_parts(self) -> dict[str, int]:
        return {"bert": self.token_table.shape[1]}

    def _special_tokens(self) -> tuple[int, int, int]:
        tokenizer = self.word_tokenizer
        return tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id

    def encode_embedded(self, embedded: Tensor) -> Tensor:
        return self.transformer.encode_embedded(embedded)

    def _whole_words(self) -> dict[str, int]:
        return {piece: index for piece, index in self.word_tokenizer.get_vocab().items() if not piece.startswith("##")}

    def forward(self, text: Sequence[str] | str | Tensor,
                embedding_manager: EmbeddingManagerLike | None = None) -> Tensor:
        """Encode prompts, or tokens if there is no tokenizer; see `PromptEncoder.forward`."""
        encode = super().forward if self.use_tknz_fn else self.encode_managed
        return encode(text, embedding_manager)
