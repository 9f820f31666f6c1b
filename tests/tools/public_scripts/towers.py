"""Tiny random text towers in local folders, which stand for those of the hub."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[3]
OPEN_CLIP_ARCH = "tiny-open-clip"
WIDTH = 32


def clip_tower(folder: Path, width: int = WIDTH) -> Path:
    """Return the folder of a CLIP text model with two layers and CLIP's tokenizer; write it if it is not there."""
    target = folder / f"clip-tower-{width}"
    if target.is_dir():
        return target
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
                            projection_dim=width, hidden_act="quick_gelu", vocab_size=49408, bos_token_id=49406,
                            eos_token_id=49407, pad_token_id=49407)
    CLIPTextModel(config).save_pretrained(target)
    for file in (PROJECT / "models" / "clip_tokenizer").iterdir():
        shutil.copy(file, target)
    return target


def register_open_clip() -> None:
    """Tell open_clip of a tiny architecture, `OPEN_CLIP_ARCH`, and let it build models as its version 2 did."""
    import tempfile

    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{OPEN_CLIP_ARCH}.json"
        file.write_text(json.dumps({
            "embed_dim": WIDTH,
            "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 4, "patch_size": 4},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 3}}))
        open_clip.add_model_config(file)
    create = open_clip.create_model_and_transforms

    def create_with_length_first(*args: Any, **options: Any) -> tuple[Any, ...]:
        """Build a model whose text layers read (length, batch, channels), as the originals call them."""
        model, *transforms = create(*args, **options)
        for block in model.transformer.resblocks:
            block.attn.batch_first = False
        return model, *transforms

    open_clip.create_model_and_transforms = create_with_length_first
