"""Zero-shot classification by embeddings.

As in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), Sec. 3.1.4. A
class is the mean embedding of several texts about it, and an image belongs to the class of the highest cosine.
"""
from __future__ import annotations

from torch import Tensor


def nearest_class(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Return the class of the highest cosine for each embedding.

    Args:
        embeddings: (N, d), of length 1.
        classes: (C, d), of length 1.

    Returns:
        (N,) indices.
    """
    return (embeddings @ classes.T).argmax(1)
