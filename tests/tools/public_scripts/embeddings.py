"""Files that personalization writes, with random values: Textual Inversion's `.pt`, Custom Diffusion's delta."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from public_scripts.checkpoints import build
from public_scripts.run import NUMBERS, Input, Workplace
from public_scripts.towers import WIDTH

TOKENS = {("clip", "*"): 265, ("clip", "@"): 287, ("bert", "*"): 1008, ("bert", "@"): 1030}


def embedding(encoder: str, word: str, vectors: int, seed: int = 0, width: int = WIDTH) -> Input:
    """Return a function that writes what Textual Inversion's EmbeddingManager saves for one placeholder."""
    def write(place: Workplace, target: Path) -> None:
        values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
        torch.save({"string_to_token": {word: torch.tensor(TOKENS[encoder, word])},
                    "string_to_param": nn.ParameterDict({word: nn.Parameter(values)})}, target)
    return write


def delta() -> Input:
    """Return a function that writes Custom Diffusion's delta: keys and values of text layers, and one word."""
    def write(place: Workplace, target: Path) -> None:
        state = torch.load(build("sd1-768", place), weights_only=True)["state_dict"]
        generator = torch.Generator().manual_seed(3)
        changed = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in state.items()
                   if "attn2.to_k" in key or "attn2.to_v" in key}
        torch.save({"state_dict": {**changed, "embed": torch.randn(1, 768, generator=generator)}}, target)
    return write


def record_merged() -> None:
    """Write the numbers of a merged `.pt` when the script has ended."""
    import atexit
    import json

    def record() -> None:
        if Path("merged.pt").is_file():
            merged = torch.load("merged.pt", weights_only=False)
            words = {f"token {word}": float(token) for word, token in merged["string_to_token"].items()}
            vectors = {f"vectors {word}": value.detach().flatten().tolist()
                       for word, value in merged["string_to_param"].items()}
            Path(NUMBERS).write_text(json.dumps({**words, **vectors}))

    atexit.register(record)
