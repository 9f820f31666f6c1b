"""Sample from models without a condition, as latent diffusion's script `sample_diffusion.py` does."""
from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from pytorch_lightning import seed_everything
from torch import Tensor
from tqdm import trange

from ldm.checkpoints.load import load_model
from ldm.checkpoints.pickled import read_pickled
from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.data.images import from_tensor
from ldm.inference.model_config import MODEL_CONFIG, read_model_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import pick_device

log = logging.getLogger(__name__)

CHECKPOINTS = ("model.ckpt", "model.safetensors")  # in a model's folder


@dataclass(frozen=True)
class UnconditionalSampling:
    """The options of `scripts/sample_diffusion.py`, by the names of its flags.

    Attributes:
        resume: a checkpoint beside a config.yaml, or a folder with both.
        logdir: folder that a folder of the model's name is created in; None: the model's own folder.
        vanilla_sample: whether to take all of the model's timesteps (DDPM) in place of `custom_steps` of DDIM.
        overrides: changes of the config, such as "model.params.timesteps=50".
    """

    resume: str
    logdir: str | None = None
    n_samples: int = 50000
    batch_size: int = 10
    eta: float = 1.0
    custom_steps: int = 50
    vanilla_sample: bool = False
    seed: int | None = None
    device: str | None = None
    overrides: tuple[str, ...] = ()


def sample_unconditionally(options: UnconditionalSampling) -> Path:
    """Write the images as PNG files and all of them as one .npz; return the folder of the run.

    Raises:
        UserError: a file is missing or does not fit, or the model needs a condition.
    """
    checkpoint = _find_checkpoint(options.resume)
    config = OmegaConf.merge(read_model_config(checkpoint.parent / MODEL_CONFIG),
                             OmegaConf.from_dotlist(list(options.overrides)))
    model = load_model(config, checkpoint, pick_device(options.device))
    if model.cond_stage_model is not None:
        raise UserError(f"{options.resume}: this model needs a condition; choose one that generates without")
    if options.seed is not None:
        seed_everything(options.seed, verbose=False)
    folder = _run_folder(options, checkpoint)
    batches = [_write_batch(folder, number * options.batch_size, _sample_batch(model, options))
               for number in trange(options.n_samples // options.batch_size, desc="Sampling batches", disable=None)]
    if not batches:
        raise UserError(f"--n_samples {options.n_samples}: less than one batch; lower --batch_size")
    pixels = np.concatenate(batches)
    name = "x".join(map(str, pixels.shape))
    write_atomically(folder / "numpy" / f"{name}-samples.npz", lambda temporary: np.savez(temporary, pixels))
    write_atomically(folder / "sampling_config.yaml",
                     lambda temporary: temporary.write_text(OmegaConf.to_yaml(asdict(options)), encoding="utf8"))
    log.info("%d images are in %s", len(pixels), folder)
    return folder


def _find_checkpoint(resume: str) -> Path:
    """Return the checkpoint that is named directly, or by its folder."""
    path = resolve_path(resume)
    if path.is_file():
        return path
    for name in CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    raise UserError(f"--resume {resume}: no such checkpoint; give a file, or a folder with {' or '.join(CHECKPOINTS)}")


def _run_folder(options: UnconditionalSampling, checkpoint: Path) -> Path:
    """Return the folder of this run: samples/STEP/DATE in the model's folder, or in one of its name in `logdir`."""
    home = checkpoint.parent
    if options.logdir is not None:
        home = Path(options.logdir) / home.name
    return home / "samples" / f"{_global_step(checkpoint):08}" / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")


def _global_step(checkpoint: Path) -> int:
    """Return the training step of a checkpoint, or 0 if it does not say it."""
    content: Any = {} if checkpoint.suffix == ".safetensors" else read_pickled(checkpoint)
    step = content.get("global_step", 0)
    return step if isinstance(step, int) else 0


@torch.no_grad()
def _sample_batch(model: Any, options: UnconditionalSampling) -> Tensor:
    """Return images (B, 3, H, W) in about [-1, 1]."""
    unet = model.model.diffusion_model
    shape = (unet.in_channels, unet.image_size, unet.image_size)
    with model.ema_scope():
        if options.vanilla_sample:
            latents, _ = model.progressive_denoising(None, (options.batch_size, *shape), verbose=False)
        else:
            latents, _ = DDIMSampler(model).sample(options.custom_steps, batch_size=options.batch_size, shape=shape,
                                                   eta=options.eta, verbose=False)
    return model.decode_first_stage(latents)


def _write_batch(folder: Path, first: int, images: Tensor) -> np.ndarray:
    """Write a batch as img/sample_000000.png, ... from number `first` on; return its pixels (B, H, W, 3)."""
    pictures = [from_tensor(image) for image in images]
    for number, picture in enumerate(pictures, first):
        write_atomically(folder / "img" / f"sample_{number:06}.png", lambda temporary, p=picture: p.save(temporary))
    return np.stack([np.asarray(picture) for picture in pictures])
