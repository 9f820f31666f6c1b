"""Images of concepts for many prompts and seeds, from one pipeline on which concepts and settings change.

    pipeline = PerfusionPipeline.from_pretrained("models/mini")
    requests = requests_for([prompt.fill("<my-teddy>") for prompt in read_prompts(MINI_PROMPTS)], seeds=range(8))
    concepts = read_concepts(["teddy.safetensors"])
    for bias in (0.5, 0.6, 0.7):
        images = generate_images(pipeline, requests, concepts, GenerationSettings(bias=bias))

An image depends on its own prompt and seed; up to rounding it is the same whatever is generated along with it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ldm.common.errors import UserError
from ldm.common.progress import show_progress
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import read_concepts
from ldm.inference.output_folder import OutputFolder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest
from ldm.inference.run import concept_metadata
from ldm.inference.settings import GenerationSettings

BATCH_SIZE = 32  # images generated at a time


def read_single_concept(files: Sequence[str | Path]) -> AnyConcept:
    """Return the only concept of some files.

    Raises:
        UserError: a file is no concept file, or there are several concepts.
    """
    concepts = read_concepts(files)
    if len(concepts) > 1:
        words = ", ".join(concept.placeholder for concept in concepts)
        raise UserError(f"{', '.join(map(str, files))}: holds {words}, but the photos are of one subject; name a file "
                        "that holds one concept")
    return concepts[0]


def generate_images(pipeline: PerfusionPipeline, requests: Sequence[GenerationRequest],
                    concepts: Sequence[AnyConcept] = (), settings: GenerationSettings | None = None,
                    batch_size: int = BATCH_SIZE, description: str = "generating") -> list[Image.Image]:
    """Return the image of each request, in order; a progress bar with this description shows how far it is.

    Raises:
        UserError: as `PerfusionPipeline.generate`.
    """
    images = pipeline.generate(requests, settings, concepts, batch_size=batch_size)
    return list(show_progress(images, len(requests), description, "images"))


def save_images(images: Sequence[Image.Image], requests: Sequence[GenerationRequest], folder: str | Path, columns: int,
                concepts: Sequence[AnyConcept] = (), settings: GenerationSettings | None = None,
                categories: Sequence[str] | None = None) -> OutputFolder:
    """Write images as the generation scripts do, each with its settings as metadata, and contact sheets.

    Args:
        images: one for each request.
        folder: gets `samples/00000.png`, ... and `grid-0000.png`, ...; earlier ones stay.
        columns: images in a row of a contact sheet, such as the number of seeds.
        settings: complete ones, as `PerfusionPipeline.complete` returns them.
        categories: the category of each image's prompt.
    """
    settings = settings or GenerationSettings()
    used = override_settings(concepts, settings.biases, settings.temperatures, settings.all_layers)
    metadata = {**asdict(settings), "concepts": concept_metadata(used)}
    output = OutputFolder(folder, columns)
    for index, (image, request) in enumerate(zip(images, requests, strict=True)):
        category = {} if categories is None else {"category": categories[index]}
        output.add(image, request.prompt, {**request._asdict(), **category, **metadata})
    output.finish_sheet()
    return output
