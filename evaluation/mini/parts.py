"""How good the parts of the base model are by themselves: first stage, CLIP, segmenter; its speed and its size."""
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
from tqdm import tqdm

from evaluation.mini.recognise import closest
from ldm.common.errors import UserError
from ldm.data.images import from_tensor
from ldm.data.mini.world import KIND_NAMES
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.mini.segmenter import intersection_over_union
from ldm.modules.segmentation import ZeroShotSegmenter

CAPTIONS = 64  # among which a picture's own has to be found
THREADS = 2
NOT_SHIPPED = "parts"  # folder of what only training needs


def batches(dataset: Dataset, count: int, size: int, description: str) -> Iterator[dict[str, Any]]:
    """The first `count` items of a dataset in batches, with a progress bar."""
    for start in tqdm(range(0, count, size), desc=description, leave=False, disable=None):
        yield default_collate([dataset[index] for index in range(start, min(start + size, count))])


def psnr(pictures: Tensor, copies: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratios in dB of pictures (N, 3, H, W) in [-1, 1], each by itself."""
    error = (pictures - copies.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * (4 / error).log10()


@torch.no_grad()
def reconstruction(first_stage: Any, scenes: Dataset, count: int) -> list[float]:
    """PSNR of each of `count` scenes after the first stage has encoded and decoded it, without noise in between."""
    device = next(first_stage.parameters()).device
    found = []
    for batch in batches(scenes, count, 32, "first stage"):
        copies, _ = first_stage(batch["image"].to(device), sample_posterior=False)
        found += psnr(batch["image"], copies.cpu()).tolist()
    return found


def caption_hits(clip: ClipEncoder, scenes: Dataset, count: int) -> list[float]:
    """100 for each scene whose own caption is the closest of 64, else 0; `count` is rounded down to whole batches.

    Where two of the scenes have the same caption, either is right.
    """
    hits: list[float] = []
    for batch in batches(scenes, count - count % CAPTIONS, CAPTIONS, "CLIP"):
        captions = batch["caption"]
        chosen = closest(clip.embed_images(batch["image"]), clip.embed_texts(captions)).tolist()
        hits += [100.0 * (captions[choice] == own) for choice, own in zip(chosen, captions, strict=True)]
    return hits


def overlaps(segmenter: ZeroShotSegmenter, scenes: Dataset, count: int) -> list[float]:
    """Intersection over union of each scene's first thing with what is found by its kind's name, both cut at 0.5."""
    by_kind = defaultdict(list)
    for batch in batches(scenes, count, 32, "scenes"):
        for kind, picture, mask in zip(batch["kind"].tolist(), batch["image"], batch["mask"], strict=True):
            by_kind[KIND_NAMES[kind]].append((picture, mask[0] > 0.5))
    found: list[float] = []
    for name, pairs in tqdm(by_kind.items(), desc="segmenter", leave=False, disable=None):
        pictures, masks = zip(*pairs, strict=True)
        likely = segmenter.segment([from_tensor(picture) for picture in pictures], name, masks[0].shape) > 0.5
        found += intersection_over_union(likely, torch.stack(masks)).tolist()
    return found


def seconds_of(command: Sequence[str | Path], most_threads: int | None = THREADS, cwd: Path | None = None) -> float:
    """How long a command takes from start to end, on at most two threads unless told otherwise (None: no limit).

    Raises:
        UserError: it fails.
    """
    count = None if most_threads is None else str(min(most_threads, os.cpu_count() or 1))
    limits = {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if count is not None}
    began = time.perf_counter()
    done = subprocess.run([*map(str, command)], env={**os.environ, **limits}, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"{Path(command[1]).name} failed while it was timed: {said}")
    return time.perf_counter() - began


def drawing_command(config: str, checkpoint: str | None, scale: float, outdir: str | Path) -> list[str | Path]:
    """Four pictures in 50 DDIM steps with guidance, on the CPU."""
    script = Path(__file__).resolve().parents[2] / "scripts" / "txt2img.py"
    weights = ["--ckpt", checkpoint] if checkpoint else []
    return [sys.executable, script, "--config", config, *weights, "--prompt", "a photo of a cat on the beach",
            "--n_samples", "4", "--ddim_steps", "50", "--scale", str(scale), "--device", "cpu", "--outdir", outdir]


def megabytes(folder: Path) -> float:
    """What all weights under a folder take up together, those apart that only training needs."""
    files = [path for path in folder.rglob("*.safetensors") if NOT_SHIPPED not in path.relative_to(folder).parts]
    return sum(path.stat().st_size for path in files) / 1e6
