"""Folders as `diffusers` writes them, each network in one of its own, whole or in shards, read as one checkpoint."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints.diffusers_names import Tensors, bert_tensors, clip_tensors, unet_tensors, vae_tensors
from ldm.common.errors import UserError

# A part's folder, where it stands in a latent diffusion model, and how its tensors come under the names used there.
PARTS: dict[str, tuple[str, Callable[[Tensors], dict[str, Tensor]]]] = {
    "unet": ("model.diffusion_model.", unet_tensors),
    "vae": ("first_stage_model.", vae_tensors),
    "vqvae": ("first_stage_model.", vae_tensors),
    "text_encoder": ("cond_stage_model.", clip_tensors),
    "bert": ("cond_stage_model.", bert_tensors),
}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of weights; exports to other frameworks lie beside them
VARIANTS = ("", ".fp16", ".non_ema")  # the first that is there
KINDS = (".safetensors", ".bin")
PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
Read = Callable[[Path], dict[str, Tensor]]


def read_folder(folder: Path, read: Read) -> dict[str, Tensor]:
    """All tensors of a diffusers pipeline's U-Net, first stage and text encoder, under a whole model's names.

    A folder that holds the weights of one network itself gives those alone, under the network's own names.

    Args:
        folder: with `unet/`, `vae/` and `text_encoder/` (or `vqvae/` and `bert/`), or one of these.
        read: gives the tensors of one file.

    Raises:
        UserError: the folder holds no weights of this kind, or some files of theirs are missing.
    """
    parts = {name: folder / name for name in PARTS if (folder / name).is_dir()}
    if any(map(_weight_files, parts.values())):
        return {PARTS[name][0] + key: tensor for name, place in parts.items()
                for key, tensor in PARTS[name][1](_weights(place, read)).items()}
    if _weight_files(folder):
        return under_own_names(_weights(folder, read))
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".safetensors"))
    remedy = f"name a file in it, such as {folder / files[0]}" if files else "name a checkpoint"
    raise UserError(f"{folder}: no diffusers folder (there is no unet/, vae/ or text_encoder/ in it); {remedy}")


def under_own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by itself; those of a diffusers U-Net or first stage under the names used here."""
    if any(key.startswith("down_blocks.") for key in tensors):
        return unet_tensors(tensors)
    if any(key.startswith("encoder.down_blocks.") for key in tensors):
        return vae_tensors(tensors)
    return tensors


def parameterization_of(folder: Path) -> str | None:
    """What the U-Net of a pipeline's folder predicts ("eps", "v" or "x0"), as far as its scheduler's config says."""
    try:
        prediction = _json(folder / "scheduler" / "scheduler_config.json").get("prediction_type")
    except UserError:
        return None
    return PARAMETERIZATIONS.get(prediction) if isinstance(prediction, str) else None


def _weights(folder: Path, read: Read) -> dict[str, Tensor]:
    files = _weight_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no weights ({STEMS[0]}.safetensors or the like); copy or download it again")
    return {key: tensor for file in files for key, tensor in read(file).items()}


def _weight_files(folder: Path) -> list[Path]:
    """The files of the best set of weights in a part's folder: averaged before not, full precision before half."""
    for variant in VARIANTS:
        for kind in KINDS:
            for stem in STEMS:
                if (whole := folder / f"{stem}{variant}{kind}").is_file():
                    return [whole]
                for index in (f"{stem}{kind}.index{variant}.json", f"{stem}{variant}{kind}.index.json"):
                    if (folder / index).is_file():
                        return _shards(folder / index)
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        UserError: it is no index, names files outside of its folder, or one that is not there.
    """
    places = _json(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(KINDS) for name in names):
        raise UserError(f"{index}: no index of weights in this folder; copy or download it again")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index}: {absent[0]} is missing ({len(absent)} of {len(names)} files are); "
                        "copy or download the folder again")
    return [index.parent / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not readable as JSON; copy or download it again")
    return content
