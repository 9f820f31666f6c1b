"""Measurements of the base model's parts by themselves: first stage, CLIP and segmenter; time and size."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from evaluation.mini.recognize import nearest_class
from evaluation.mini.settings import CAPTIONS
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT
from ldm.common.progress import show_progress
from ldm.data.images import from_tensor
from ldm.data.mini.world import KIND_NAMES
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.mini.segmenter import intersection_over_union
from ldm.modules.segmentation import ZeroShotSegmenter

BATCH_SIZE = 32
THREADS = 2
TRAINING_ONLY = "parts"  # folder of the weights that only training needs
MASK_THRESHOLD = 0.5


def batches(dataset: Dataset, count: int, size: int, description: str) -> Iterator[dict[str, Any]]:
    """Yield the first `count` items of a dataset in batches, with a progress bar."""
    for start in show_progress(range(0, count, size), description=description):
        yield default_collate([dataset[index] for index in range(start, min(start + size, count))])


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, (N,) in dB; both are (N, 3, H, W) in [-1, 1]."""
    error = (images - reconstructions.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * (4 / error).log10()


@torch.no_grad()
def reconstruction_psnr(first_stage: Any, scenes: Dataset, count: int) -> list[float]:
    """Return the PSNR of each of `count` scenes after encoding and decoding, without noise on the latents."""
    device = next(first_stage.parameters()).device
    values: list[float] = []
    for batch in batches(scenes, count, BATCH_SIZE, "first stage"):
        reconstructions, _ = first_stage(batch["image"].to(device), sample_posterior=False)
        values += psnr(batch["image"], reconstructions.cpu()).tolist()
    return values


def caption_hits(clip: ClipEncoder, scenes: Dataset, count: int) -> list[float]:
    """Return 100 for each scene whose own caption is the nearest of 64, else 0.

    If several of the scenes have the same caption, any of them is correct.

    Args:
        count: number of scenes, rounded down to whole batches of 64.
    """
    hits: list[float] = []
    for batch in batches(scenes, count - count % CAPTIONS, CAPTIONS, "CLIP"):
        captions = batch["caption"]
        nearest = nearest_class(clip.embed_images(batch["image"]), clip.embed_texts(captions)).tolist()
        hits += [100.0 * (captions[index] == own) for index, own in zip(nearest, captions, strict=True)]
    return hits


def segmentation_ious(segmenter: ZeroShotSegmenter, scenes: Dataset, count: int) -> list[float]:
    """Return the IoU of each scene's first subject with what the segmenter finds by the name of its kind."""
    # Group the scenes by kind: the segmenter takes one text at a time.
    by_kind = defaultdict(list)
    for batch in batches(scenes, count, BATCH_SIZE, "scenes"):
        for kind, image, mask in zip(batch["kind"].tolist(), batch["image"], batch["mask"], strict=True):
            by_kind[KIND_NAMES[kind]].append((image, mask[0] > MASK_THRESHOLD))
    ious: list[float] = []
    for name, pairs in show_progress(by_kind.items(), description="segmenter"):
        images, masks = zip(*pairs, strict=True)
        predicted = segmenter.segment([from_tensor(image) for image in images], name, masks[0].shape) > MASK_THRESHOLD
        ious += intersection_over_union(predicted, torch.stack(masks)).tolist()
    return ious


def time_command(command: Sequence[str | Path], max_threads: int | None = THREADS, cwd: Path | None = None) -> float:
    """Run a command and return how long it takes from start to end, in seconds.

    Args:
        command: the program and its arguments.
        max_threads: limit of OpenMP's and MKL's threads; None: no limit.
        cwd: working directory.

    Raises:
        UserError: the command fails.
    """
    limits: dict[str, str] = {}
    if max_threads is not None:
        count = str(min(max_threads, os.cpu_count() or 1))
        limits = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    start = time.perf_counter()
    result = subprocess.run([*map(str, command)], env={**os.environ, **limits}, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        last_line = (result.stderr.strip() or "it wrote no error").splitlines()[-1]
        raise UserError(f"{Path(command[1]).name} failed while it was timed: {last_line}")
    return time.perf_counter() - start


def generation_command(config: str, checkpoint: str | None, guidance_scale: float, outdir: str | Path
                       ) -> list[str | Path]:
    """Return the command that generates four images in 50 DDIM steps with guidance, on the CPU."""
    weights = ["--ckpt", checkpoint] if checkpoint else []
    return [sys.executable, PROJECT_ROOT / "scripts" / "txt2img.py", "--config", config, *weights,
            "--prompt", "a photo of a cat on the beach", "--n_samples", "4", "--sampler", "ddim", "--ddim_steps", "50",
            "--scale", str(guidance_scale), "--device", "cpu", "--outdir", outdir]


def weights_megabytes(folder: Path) -> float:
    """Return the size of all weights under a folder, without those that only training needs."""
    files = [path for path in folder.rglob("*.safetensors") if TRAINING_ONLY not in path.relative_to(folder).parts]
    return sum(path.stat().st_size for path in files) / 1e6
