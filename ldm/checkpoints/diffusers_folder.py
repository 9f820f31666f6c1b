"""Read a folder that `diffusers` wrote, with each network in a subfolder, whole or in shards, as one checkpoint."""
from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ldm.checkpoints.absent_parts import CLIP_G, CLIP_L, FIRST_STAGE, TEXT_ENCODER, UNET
from ldm.checkpoints.diffusers_names import (
    Tensors,
    bert_tensors,
    clip_tensors,
    projected_clip_tensors,
    unet_tensors,
    vae_tensors,
)
from ldm.checkpoints.other_kinds import UNSUPPORTED
from ldm.checkpoints.weight_files import STEMS, weight_files
from ldm.common.errors import UserError


class Network(NamedTuple):
    """A network of a pipeline.

    Attributes:
        prefix: prefix of its keys in a latent diffusion model.
        rename: converts its tensors to the names used there.
    """

    prefix: str
    rename: Callable[[Tensors], dict[str, Tensor]]


NETWORKS = {  # by subfolder
    "unet": Network(UNET, unet_tensors),
    "vae": Network(FIRST_STAGE, vae_tensors),
    "vqvae": Network(FIRST_STAGE, vae_tensors),
    "text_encoder": Network(TEXT_ENCODER, clip_tensors),
    "text_encoder_2": Network(CLIP_G, projected_clip_tensors),
    "bert": Network(TEXT_ENCODER, bert_tensors),
}
SECOND_ENCODER, SIZE_EMBEDDING = "text_encoder_2", f"{UNET}label_emb."  # what only Stable Diffusion XL has
Read = Callable[[Path], dict[str, Tensor]]


def read_folder(folder: Path, read: Read) -> dict[str, Tensor]:
    """Return all tensors of a pipeline's U-Net, first stage and text encoders, under latent diffusion's names.

    If the folder itself contains the weights of one network, only those are returned, under the network's own names.

    Args:
        folder: with `unet/`, `vae/` and `text_encoder/` (or `vqvae/` and `bert/`; Stable Diffusion XL has
            `text_encoder_2/` as well), or one of these.
        read: returns the tensors of one file.

    Raises:
        UserError: if the folder contains no weights of this kind, or some of its files are missing.
    """
    if (folder / "transformer").is_dir():
        raise UserError(f"{folder}: is a diffusion transformer (Stable Diffusion 3, Flux or similar); {UNSUPPORTED}")
    subfolders = {name: folder / name for name in NETWORKS if (folder / name).is_dir()}
    if any(map(weight_files, subfolders.values())):
        tensors: dict[str, Tensor] = {}
        for name, subfolder in subfolders.items():
            network = NETWORKS[name]
            for key, tensor in network.rename(_read_weights(subfolder, read)).items():
                tensors[network.prefix + key] = tensor
        return _as_first_of_two(tensors) if _is_xl(subfolders, tensors) else tensors
    if weight_files(folder):
        return under_own_names(_read_weights(folder, read))
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".ckpt", ".safetensors"))
    remedy = f"name a file in it, such as {folder / files[0]}" if files else "name a checkpoint"
    raise UserError(f"{folder}: no diffusers folder (there is no unet/, vae/ or text_encoder/ in it); {remedy}")


def _is_xl(subfolders: Collection[str], tensors: Tensors) -> bool:
    """Return whether a folder is one of Stable Diffusion XL, with whichever of its networks."""
    return SECOND_ENCODER in subfolders or any(key.startswith(SIZE_EMBEDDING) for key in tensors)


def _as_first_of_two(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors with the text encoder of the folder `text_encoder/` as the first one of two."""
    return {CLIP_L + key.removeprefix(TEXT_ENCODER) if key.startswith(TEXT_ENCODER) else key: tensor
            for key, tensor in tensors.items()}


def under_own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a single file. Those of a diffusers U-Net or first stage get the names used here."""
    if any(key.startswith("down_blocks.") for key in tensors):
        return unet_tensors(tensors)
    if any(key.startswith("encoder.down_blocks.") for key in tensors):
        return vae_tensors(tensors)
    return tensors


def _read_weights(folder: Path, read: Read) -> dict[str, Tensor]:
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no weights ({STEMS[0]}.safetensors or the like); copy or download it again")
    return {key: tensor for file in files for key, tensor in read(file).items()}
