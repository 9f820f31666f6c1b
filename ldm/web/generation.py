"""Generate images for the page: one request at a time, which can be cancelled between two steps."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.settings import override_settings, values_for_each
from ldm.inference.output_folder import OutputFolder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest, requests_for, seeds_for
from ldm.inference.run import concept_metadata
from ldm.inference.settings import GenerationSettings
from ldm.inference.source_image import SourceImage
from ldm.web.concept_files import ConceptFiles
from ldm.web.site import Site

FOLDER = "images"
MOST_IMAGES = 64


class Cancelled(Exception):
    """The user cancelled the generation."""


@dataclass(frozen=True)
class ImageRequest:
    """What a user asks for.

    Attributes:
        prompt, negative_prompt: texts.
        concepts: concept files.
        settings: how to generate; the biases are one for all concepts, or one each.
        seed: seed of the first image; None: random.
        count: number of images.
        biases: several biases make a strip: the same seed under each of them; empty: no strip.
        image: an image to start from, or None.
        mask: white where it is regenerated; None: everywhere.
        strength: how much of it changes; None: the default.
    """

    prompt: str
    negative_prompt: str = ""
    concepts: tuple[str, ...] = ()
    settings: GenerationSettings = GenerationSettings()
    seed: int | None = None
    count: int = 4
    biases: tuple[float, ...] = ()
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None


@dataclass(frozen=True)
class FinishedImage:
    """A generated image.

    Attributes:
        path: its PNG file, with its settings inside.
        title: for the gallery.
        seed: its seed.
    """

    path: Path
    title: str
    seed: int


class ImageGeneration:
    """Generates with the site's pipeline.

    Args:
        site: what all tabs share.
        concepts: the files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts
        self._cancelled = threading.Event()
        self._on_step: Callable[[int], None] | None = None

    def cancel(self) -> None:
        """Cancel what is generated now, after the current step."""
        self._cancelled.set()

    def generate(self, request: ImageRequest, on_step: Callable[[int], None] | None = None) -> Iterator[FinishedImage]:
        """Check a request, then yield its images one by one. They are kept in the folder of the runs.

        Args:
            request: what to generate.
            on_step: called after each sampling step with its index.

        Raises:
            UserError: something in it cannot be used.
            Cancelled: `cancel` was called.
        """
        if not request.prompt.strip():
            raise UserError('no prompt; write what to show, such as "a photo of a <my-teddy> on the beach"')
        if not 1 <= request.count <= MOST_IMAGES:
            raise UserError(f"{request.count} images: from 1 to {MOST_IMAGES} are possible")
        chosen = self.concepts.read(request.concepts)
        with self.site.pipeline() as pipeline:
            self._cancelled.clear()
            self._on_step = on_step
            pipeline.unload_concepts()
            pipeline.load_concepts(*chosen)
            if request.biases:
                for bias in request.biases:
                    settings = replace(request.settings, bias=bias)
                    yield from self._images(pipeline, replace(request, settings=settings, count=1), f"bias {bias:g}")
            else:
                yield from self._images(pipeline, request, "")

    def _images(self, pipeline: PerfusionPipeline, request: ImageRequest, label: str) -> Iterator[FinishedImage]:
        seeds = seeds_for(1, request.count, request.seed)[0]
        requests = requests_for([request.prompt], seeds, request.negative_prompt)
        settings = pipeline.complete(replace(request.settings,
                                             bias=values_for_each(request.settings.bias, pipeline.concepts)))
        settings = pipeline.resolve_auto_bias(settings, [request.prompt])
        source = self._source(pipeline, request, settings)
        used = override_settings(pipeline.concepts, settings.biases, settings.temperatures, settings.all_layers)
        metadata = self._metadata(settings, used, source)
        folder = OutputFolder(self.site.queue.root / FOLDER, columns=4, with_sheets=False)
        images = pipeline.generate(requests, settings, source=source, callback=self._after_step)
        for one, image in zip(requests, images, strict=True):
            path = folder.add(image, request.prompt, {**one._asdict(), **metadata})
            yield FinishedImage(path, label or f"seed {one.seed}", one.seed)

    def _after_step(self, step: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        if self._on_step is not None:
            self._on_step(step)

    def _source(self, pipeline: PerfusionPipeline, request: ImageRequest, settings: GenerationSettings
                ) -> SourceImage | None:
        if request.image is None:
            return None
        height, width = pipeline.size_of(settings)
        return SourceImage.load_with_mask(request.image, (width, height), request.strength, request.mask)

    def _metadata(self, settings: GenerationSettings, concepts: Sequence[AnyConcept], source: SourceImage | None
                  ) -> dict[str, Any]:
        """Return the settings that an image's file keeps, under the names that scripts/txt2img.py uses."""
        model = self.site.settings.model
        values = asdict(settings.without_concept_settings())
        kept = {name: value for name, value in values.items() if value is not None}
        started = {} if source is None else {"strength": source.strength}
        return {**kept, "config": model.config, "checkpoint": model.checkpoint, **started,
                "concepts": concept_metadata(concepts)}


def requests_of(metadata: dict[str, Any]) -> GenerationRequest | None:
    """Return the request that an image's metadata describe, or None if there are none."""
    if not isinstance(metadata.get("prompt"), str) or not isinstance(metadata.get("seed"), int):
        return None
    return GenerationRequest(metadata["prompt"], metadata["seed"], str(metadata.get("negative_prompt", "")))
