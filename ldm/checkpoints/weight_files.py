"""Find the weight files of a network's folder that diffusers or transformers wrote, whole or in shards. No torch."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.common.errors import UserError

# Names of weight files. Exports to other frameworks in the same folder have other names.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp32", ".bf16", ".fp16", ".non_ema")  # in order of preference: averaged weights first
SUFFIXES = (".safetensors", ".bin")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the best set of weights in a network's folder, or none."""
    for variant in VARIANTS:
        for suffix in SUFFIXES:
            for stem in STEMS:
                single = folder / f"{stem}{variant}{suffix}"
                if single.is_file():
                    return [single]
                for index in (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json"):
                    if (folder / index).is_file():
                        return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    """Return the files that an index lists.

    Raises:
        UserError: if it is not an index, or lists files outside its folder or missing ones.
    """
    shard_of_key = _read_json(index).get("weight_map")
    names = sorted(set(map(str, shard_of_key.values()))) if isinstance(shard_of_key, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(SUFFIXES) for name in names):
        raise UserError(f"{index}: no index of weights in this folder; copy or download it again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: {missing[0]} is missing ({len(missing)} of {len(names)} files are); "
                        "copy or download the folder again")
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not readable as JSON; copy or download it again")
    return content
