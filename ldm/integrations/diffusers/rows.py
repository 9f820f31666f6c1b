"""The edit of a prompt on the last axis of its embeddings: the form in which it travels through a pipeline.

Pipelines of diffusers repeat, concatenate, halve and move the rows of `prompt_embeds` (B, N, d), but never look at
their last axis. So a prompt under the edit is a wider row, and everything that happens to rows happens to its edit:

    [e | e_perp | key input | value gates | key gates | acting | tag]

    part          width   meaning
    e             d       the text encoding, for layers without an edit, such as those of a ControlNet
    e_perp        d       `PromptContext.projected`: values are W_V e_perp + sum_j g_j o*_Vj
    key input     d       keys are W_K of it: e_perp + sum_j g_j i_super_j, or the encoding of the prompt with the
                          super-category in the concept's place (global locking). A W_K with a LoRA acts on it too
    value gates   J       g_j
    key gates     J       g_j of concepts with trained keys, else 0
    acting        J       1 if concept j edits this prompt
    tag           1       number of the set of concepts that J counts

Symbols as in `ldm.modules.rank_one`.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """B prompts under the edit of J concepts, part by part; see the docstring of the module.

    Attributes:
        encoding, projected, key_input: (B, N, d).
        gates, key_gates, acting: (B, N, J).
    """

    encoding: Tensor
    projected: Tensor
    key_input: Tensor
    gates: Tensor
    key_gates: Tensor
    acting: Tensor

    @classmethod
    def plain(cls, encoding: Tensor, count: int) -> Rows:
        """Return prompts without an edit beside ones that `count` concepts edit."""
        nothing = encoding.new_zeros(*encoding.shape[:-1], count)
        return cls(encoding, encoding, encoding, nothing, nothing, nothing)

    @classmethod
    def unpack(cls, packed: Tensor, width: int) -> Rows:
        """Split packed rows (B, N, `packed_width`) of a text encoding of this width d. Nothing is copied."""
        count = (packed.shape[-1] - 3 * width - 1) // 3
        return cls(*packed[..., :-1].split([width, width, width, count, count, count], -1))

    def pack(self, tag: int) -> Tensor:
        """Return (B, N, `packed_width`), in the dtype of the encoding."""
        parts = [part.to(self.encoding) for part in self]
        return torch.cat([*parts, parts[0].new_full((*parts[0].shape[:-1], 1), tag)], -1)


def packed_width(width: int, count: int) -> int:
    """Return the width of rows of a text encoding of width d under the edit of J concepts."""
    return 3 * width + 3 * count + 1
