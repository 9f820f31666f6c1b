"""Use a learned word: a model with Textual Inversion's embedding manager, and a file with one embedding."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_embedding(path: Path, word: str, vector: Tensor) -> None:
    """Write a file as Textual Inversion saves it: a token and a parameter for each placeholder."""
    torch.save({"string_to_token": {word: torch.tensor(265)},
                "string_to_param": torch.nn.ParameterDict({word: torch.nn.Parameter(vector)})}, path)


@torch.no_grad()
def encode_with(model: Any, embedding: Path, prompts: list[str]) -> Tensor:
    """Return the encoding (B, N, d) of prompts with the embedding in place of its placeholder."""
    model.embedding_manager.load(str(embedding))
    return model.get_learned_conditioning(prompts)
