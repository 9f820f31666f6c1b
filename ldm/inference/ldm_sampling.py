"""Sample as the scripts of the LDM family do: one global generator for all images, and the family's samplers.

The same checkpoint and seed give the images of the family's own scripts, on a GPU up to rounding. `PerfusionPipeline`
gives each image a generator of its own instead, and edits prompts with concepts of every method.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import Tensor
from tqdm import trange

from ldm.checkpoints.load import load_model
from ldm.common.errors import UserError
from ldm.concepts.embedding_manager import EmbeddingManager
from ldm.data.images import from_tensor
from ldm.inference.model_config import read_model_config
from ldm.inference.output_folder import OutputFolder
from ldm.inference.settings import ModelSettings
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.wrapper import Condition
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.util import pick_device


@dataclass(frozen=True)
class PromptSampling:
    """The options of `scripts/stable_txt2img.py`, by the names of its flags.

    Attributes:
        batches: the prompts, each tuple in one batch.
        model: the base model.
        outdir: folder to write to.
        embedding_path: vectors of Textual Inversion; None: none.
        fixed_code: whether all batches start from the same noise.
    """

    batches: tuple[tuple[str, ...], ...]
    model: ModelSettings
    outdir: str
    embedding_path: str | None = None
    n_iter: int = 2
    ddim_steps: int = 50
    ddim_eta: float = 0.0
    scale: float = 7.5
    plms: bool = False
    shape: tuple[int, int, int] = (4, 64, 64)
    seed: int = 42
    fixed_code: bool = False
    columns: int = 3
    save_images: bool = True
    save_grid: bool = True


def load_family_model(settings: ModelSettings, embedding_path: str | None = None) -> Any:
    """Load a model, and vectors of Textual Inversion into its embedding manager.

    Raises:
        UserError: a file is missing or does not fit, or the model reads no prompts.
    """
    device = pick_device(settings.device)
    model = load_model(read_model_config(settings.config), settings.checkpoint, device)
    if embedding_path is not None:
        if model.embedding_manager is None:
            model.embedding_manager = EmbeddingManager(model.cond_stage_model)
        model.embedding_manager.load(embedding_path)
    return model


@torch.no_grad()
def sample_prompts(options: PromptSampling) -> OutputFolder:
    """Generate images for all prompts and write them to a folder, which is returned."""
    model = load_family_model(options.model, options.embedding_path)
    if not hasattr(model.cond_stage_model, "encode"):
        raise UserError(f"{options.model.config}: this model reads no prompts; choose one of a text-to-image model")
    device = model.betas.device
    seed_everything(options.seed, verbose=False)
    sampler = PLMSSampler(model) if options.plms else DDIMSampler(model)
    start = None
    if options.fixed_code:
        start = torch.randn([len(options.batches[0]), *options.shape], device=device)
    folder = OutputFolder(options.outdir, options.columns, options.save_grid)
    autocast = device.type == "cuda" and options.model.precision != "full"
    with torch.autocast(device.type, enabled=autocast), model.ema_scope():
        for _ in trange(options.n_iter, desc="Sampling", disable=None):
            for prompts in options.batches:
                _write(folder, prompts, _sample_batch(model, sampler, prompts, options, start), options)
    folder.finish_sheet()
    return folder


def _sample_batch(model: Any, sampler: DDIMSampler, prompts: Sequence[str], options: PromptSampling,
                  start: Tensor | None) -> Tensor:
    """Return the images (B, 3, H, W) of B prompts, in about [-1, 1]."""
    conditional, unconditional = _conditions(model, prompts, options)
    latents, _ = sampler.sample(
        S=options.ddim_steps, batch_size=len(prompts), shape=options.shape, verbose=False,
        conditioning=conditional, eta=options.ddim_eta,
        unconditional_guidance_scale=options.scale, unconditional_conditioning=unconditional,
        x_T=None if start is None else start[:len(prompts)])
    return model.decode_first_stage(latents)


def _conditions(model: Any, prompts: Sequence[str], options: PromptSampling) -> tuple[Condition, Condition]:
    """Return the conditions of B prompts and, for guidance, of as many empty ones (None if there is no guidance)."""
    encoder, is_guided = model.cond_stage_model, options.scale != 1
    if not isinstance(encoder, GeneralConditioner):
        unconditional = model.get_learned_conditioning([""] * len(prompts)) if is_guided else None
        return model.get_learned_conditioning(list(prompts)), unconditional
    # Such a model also reads the size of the images.
    size = model.pixels_of(options.shape[1:])
    conditional = encoder.condition(list(prompts), size, model.embedding_manager)
    return conditional, encoder.unconditional_condition(len(prompts), None, size) if is_guided else None


def _write(folder: OutputFolder, prompts: Sequence[str], images: Tensor, options: PromptSampling) -> None:
    for prompt, image in zip(prompts, map(from_tensor, images), strict=True):
        if options.save_images:
            folder.add(image, prompt, {"prompt": prompt, "seed": options.seed, "config": options.model.config})
        else:
            folder.show(image, prompt)
