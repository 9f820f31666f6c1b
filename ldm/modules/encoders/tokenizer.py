"""Write CLIP's word-piece vocabulary, which `open_clip` ships in one file, as a folder that `transformers` reads."""
from __future__ import annotations

import json
from pathlib import Path

from ldm.common.files import write_atomically

START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_tokenizer(folder: str | Path) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json of CLIP's 49,408 word pieces into `folder`.

    The table and its order are CLIP's (Radford et al., 2021).

    Returns:
        `folder`.
    """
    from open_clip.tokenizer import SimpleTokenizer

    folder, source = Path(folder), SimpleTokenizer()
    vocabulary = {piece.replace("<start_of_text>", START).replace("<end_of_text>", END): index
                  for piece, index in source.encoder.items()}
    merges = [" ".join(pair) for pair in source.bpe_ranks]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END,
                "pad_token": END, "unk_token": END}
    texts = {"vocab.json": json.dumps(vocabulary, ensure_ascii=False), "tokenizer_config.json": json.dumps(settings),
             "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n"}
    for name, text in texts.items():
        write_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf8"))
    return folder
