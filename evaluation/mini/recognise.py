"""What a CLIP sees in pictures: embeddings of pictures and texts, and the class a picture is closest to.

Classes are recognised as in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021), Sec. 3.1.4: a class is the mean of the embeddings of several texts about it, and a picture belongs to the class
of the highest cosine.
"""
from __future__ import annotations

from torch import Tensor


def closest(embeddings: Tensor, classes: Tensor) -> Tensor:
    """(N,) the class of the highest cosine for each of (N, d) embeddings, among (C, d) classes; all of length 1."""
    return (embeddings @ classes.T).argmax(1)
