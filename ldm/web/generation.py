"""Generate images for the page: one request at a time, which can be cancelled between two steps."""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.common.atomic_write import write_atomically
from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.settings import override_settings, values_for_each
from ldm.inference.output_folder import OutputFolder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import requests_for, seeds_for
from ldm.inference.run import concept_metadata
from ldm.inference.settings import GenerationSettings
from ldm.inference.source_image import SourceImage
from ldm.web.concept_files import ConceptFiles
from ldm.web.image_request import Cancelled, FinishedImage, ImageRequest
from ldm.web.site import Site

FOLDER, SOURCES = "images", "sources"
MOST_IMAGES = 64
LONGEST_PROMPT = 2000  # characters; text encoders read far fewer
LARGEST_AREA = 16  # times that of the model's own images
DIGITS = 16


class ImageGeneration:
    """Generates with the site's pipeline.

    Args:
        site: what all tabs share.
        concepts: the files to choose from.
    """

    def __init__(self, site: Site, concepts: ConceptFiles) -> None:
        self.site, self.concepts = site, concepts
        self.folder = site.queue.root / FOLDER
        self._cancelled = threading.Event()
        self._on_step: Callable[[int], None] | None = None

    def cancel(self) -> None:
        """Cancel what is generated now, after the current step."""
        self._cancelled.set()

    def keep(self, image: Image.Image) -> Path:
        """Store an image to start from, or a mask, under a name that follows from its pixels; return its file."""
        digest = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()[:DIGITS]
        path = self.folder / SOURCES / f"{digest}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(image.save, format="PNG"))
        return path

    def with_seed(self, request: ImageRequest) -> ImageRequest:
        """Return a request with a seed: its own, or a random one."""
        return replace(request, seed=seeds_for(1, 1, request.seed)[0][0])

    def generate(self, request: ImageRequest, on_step: Callable[[int], None] | None = None) -> Iterator[FinishedImage]:
        """Check a request, then yield its images one by one. They are kept in the folder of the runs.

        Args:
            request: what to generate.
            on_step: called after each sampling step with its index.

        Raises:
            UserError: something in it cannot be used.
            Cancelled: `cancel` was called.
        """
        _check(request)
        chosen = self.concepts.read(request.concepts)
        request = self.with_seed(request)
        with self.site.pipeline() as pipeline:
            self._cancelled.clear()
            self._on_step = on_step
            _check_size(pipeline, request.settings)
            pipeline.unload_concepts()
            pipeline.load_concepts(*chosen)
            if not request.biases:
                yield from self._images(pipeline, request, "")
            for bias in request.biases:
                settings = replace(request.settings, bias=bias)
                yield from self._images(pipeline, replace(request, settings=settings, count=1), f"bias {bias:g}")

    def _images(self, pipeline: PerfusionPipeline, request: ImageRequest, label: str) -> Iterator[FinishedImage]:
        seeds = seeds_for(1, request.count, request.seed)[0]
        requests = requests_for([request.prompt], seeds, request.negative_prompt)
        settings = pipeline.complete(replace(request.settings,
                                             bias=values_for_each(request.settings.bias, pipeline.concepts)))
        settings = pipeline.resolve_auto_bias(settings, [request.prompt])
        source = self._source(pipeline, request, settings)
        used = override_settings(pipeline.concepts, settings.biases, settings.temperatures, settings.all_layers)
        metadata = self._metadata(pipeline, settings, used, source, request.mask)
        folder = OutputFolder(self.folder, columns=4, with_sheets=False)
        images = pipeline.generate(requests, settings, source=source, callback=self._after_step)
        before = None if source is None else source.image
        for one, image in zip(requests, images, strict=True):
            path = folder.add(image, request.prompt, {**one._asdict(), **metadata})
            yield FinishedImage(path, label or f"seed {one.seed}", one.seed, before)

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

    def _metadata(self, pipeline: PerfusionPipeline, settings: GenerationSettings, concepts: Sequence[AnyConcept],
                  source: SourceImage | None, mask: Path | None) -> dict[str, Any]:
        """Return the settings that an image's file keeps, under the names that scripts/txt2img.py uses."""
        model = self.site.settings.model
        values = asdict(settings.without_concept_settings())
        kept = {name: value for name, value in values.items() if value is not None}
        height, width = pipeline.size_of(settings)
        started = {} if source is None else {"init_img": source.name, "strength": source.strength}
        masked = {} if mask is None else {"mask": str(mask)}
        parts = {name: path for name, path in (("vae", model.vae), ("text_encoder", model.text_encoder)) if path}
        return {**kept, "height": height, "width": width, "config": model.config, "checkpoint": model.checkpoint,
                **parts, **started, **masked, "concepts": concept_metadata(concepts)}


def _check(request: ImageRequest) -> None:
    """Raise UserError for what needs no model to be refused."""
    if not request.prompt.strip():
        raise UserError('no prompt; write what to show, such as "a photo of a <my-teddy> on the beach"')
    longest = max(len(request.prompt), len(request.negative_prompt))
    if longest > LONGEST_PROMPT:
        raise UserError(f"the prompt has {longest} characters; write at most {LONGEST_PROMPT}")
    if not 1 <= request.count <= MOST_IMAGES:
        raise UserError(f"{request.count} images: from 1 to {MOST_IMAGES} are possible")


def _check_size(pipeline: PerfusionPipeline, settings: GenerationSettings) -> None:
    """Raise UserError for images so large that the machine's memory would end, and the page with it."""
    own_height, own_width = pipeline.image_size
    height, width = settings.height or own_height, settings.width or own_width
    if height * width > LARGEST_AREA * own_height * own_width:
        raise UserError(f"{width}x{height} pixels are too many for this model, which makes {own_width}x{own_height}; "
                        "choose a smaller size")
