"""Replace the embeddings of placeholder tokens by learned vectors.

Source: Gal et al., "An Image is Worth One Word" (ICLR 2023, arXiv 2208.01618), Sec. 3, and its public code, whose
results these functions return.
"""
from __future__ import annotations

import torch
from torch import Tensor


def replace_token(tokens: Tensor, embedded: Tensor, token: int, vector: Tensor) -> Tensor:
    """Return embeddings in which each occurrence of a token has the same vector.

    Args:
        tokens: (B, N).
        embedded: (B, N, width), the embeddings of the tokens; not modified.
        token: the token to replace.
        vector: (1, width), its new embedding.

    Returns:
        (B, N, width)
    """
    return torch.where((tokens == token)[..., None], vector, embedded)


def insert_vectors(tokens: Tensor, embedded: Tensor, token: int, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Put k vectors in the place of each occurrence of a token. What follows moves right; the rows keep their length.

    Args:
        tokens: (B, N).
        embedded: (B, N, width), the embeddings of the tokens; not modified.
        token: the token to replace.
        vectors: (k, width), its new embeddings.

    Returns:
        The tokens (B, N), in which the token occurs k times in a row, and the embeddings (B, N, width). What does not
        fit is cut off at the right, the end token included.
    """
    source, offset = zip(*(_spread(row == token, len(vectors)) for row in tokens), strict=True)
    source, offset = torch.stack(source), torch.stack(offset)
    new_tokens = tokens.gather(1, source)
    moved = embedded.gather(1, source[..., None].expand_as(embedded))
    return new_tokens, torch.where((new_tokens == token)[..., None], vectors[offset], moved)


def _spread(is_token: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return where each position of a row comes from if some tokens become `count` tokens.

    Args:
        is_token: (N,), the tokens that are repeated.

    Returns:
        The position in the old row, (N,), and the number of copies of the same token to the left, (N,).
    """
    repeats = torch.where(is_token, count, 1)
    first = repeats.cumsum(0) - repeats  # where each old position begins in the new row
    positions = torch.arange(len(is_token), device=is_token.device)
    source = positions.repeat_interleave(repeats)[:len(is_token)]
    return source, positions - first[source]
