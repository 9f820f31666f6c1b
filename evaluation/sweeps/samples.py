"""Images of concepts for many prompts and seeds, from one pipeline on which concepts and settings change.

    pipeline = PerfusionPipeline.from_config("configs/perfusion.yaml")
    requests = requests_for([prompt.about("<my-teddy>") for prompt in read_prompts(MINI)], seeds=range(8))
    concepts = read_concepts(["teddy.safetensors"])
    for bias in (0.5, 0.6, 0.7):
        images = generate_images(pipeline, requests, concepts, GenerationSettings(bias=bias))

An image depends on its own prompt and seed; up to rounding it is the same whatever is generated along with it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.settings import override_settings
from ldm.data.images import to_tensor
from ldm.inference.output_folder import OutputFolder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.run import concept_metadata
from ldm.inference.settings import GenerationSettings

BATCH_SIZE = 32  # images generated at a time


def generate_images(pipeline: PerfusionPipeline, requests: Sequence[GenerationRequest],
                    concepts: Sequence[AnyConcept] = (), settings: GenerationSettings | None = None,
                    batch_size: int = BATCH_SIZE, description: str = "generating") -> list[Image.Image]:
    """Return the image of each request, in order; a progress bar with this description shows how far it is.

    Raises:
        UserError: as `PerfusionPipeline.generate`.
    """
    images = pipeline.generate(requests, settings, concepts, batch_size=batch_size)
    return list(tqdm(images, desc=description, total=len(requests), leave=False, disable=None))


def as_batch(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size: (M, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(image) for image in images])


def save_images(images: Sequence[Image.Image], requests: Sequence[GenerationRequest], folder: str | Path, columns: int,
                concepts: Sequence[AnyConcept] = (), settings: GenerationSettings | None = None,
                categories: Sequence[str] | None = None) -> OutputFolder:
    """Write images as the scripts that generate do, each with its settings inside, and sheets of them.

    Args:
        folder: gets `samples/00000.png`, ... and `grid-0000.png`, ...; earlier ones stay.
        columns: images in a row of a sheet, such as the number of seeds.
        settings: complete ones, as `PerfusionPipeline.complete` returns them.
        categories: of the prompt of each image.
    """
    settings = settings or GenerationSettings()
    used = override_settings(concepts, settings.biases, settings.temperatures, settings.all_layers)
    output = OutputFolder(folder, columns)
    metadata = {**asdict(settings), "concepts": concept_metadata(used)}
    own = [{}] * len(requests) if categories is None else [{"category": category} for category in categories]
    for image, request, extra in zip(images, requests, own, strict=True):
        output.add(image, request.prompt, {**request._asdict(), **extra, **metadata})
    output.finish_sheet()
    return output
