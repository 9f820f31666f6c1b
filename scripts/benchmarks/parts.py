"""Costs that grow with the number of concepts, captions and photos: files, merging, the covariance, masks."""
from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

from ldm.concepts.concept_file import load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.fingerprint import base_fingerprint
from ldm.concepts.merging import merge_concepts
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.concepts.storage import load_concepts, save_concepts
from ldm.data.images import read_image
from ldm.modules.attention import name_text_layers
from ldm.modules.covariance import default_captions, estimate_covariance
from ldm.modules.encoders.modules import TOKENIZER
from ldm.modules.encoders.vocabulary import no_progress_bar
from ldm.modules.mask_cache import cached_subjects
from ldm.modules.rank_one import invert_covariance
from ldm.modules.segmentation import Preprocessing, ZeroShotSegmenter
from scripts.benchmarks.common import (
    ROOT,
    BenchmarkRow,
    BenchmarkSettings,
    Goal,
    median_row,
    time_call,
    time_calls,
    unavailable_row,
)
from scripts.benchmarks.device import synchronize
from scripts.benchmarks.random_models import (
    meta_text_layers,
    random_concept,
    random_inference_model,
    random_photos,
    read_config,
)

CONCEPTS = (2, 100, 1000)
# Public models: config, width of a word embedding, goal of the file size in KB.
FILES = {"Stable Diffusion 1.5": ("configs/perfusion-sd-v1.yaml", 768, Goal(40)),
         "Stable Diffusion 2.x": ("configs/perfusion-sd-v2.yaml", 1024, Goal(40)),
         "Stable Diffusion XL": ("configs/perfusion-sd-xl.yaml", 2048, Goal(210))}
CAPTIONS, QUICK_CAPTIONS = 100_000, 2_000
PHOTOS, QUICK_PHOTOS = 1_000, 20
# The public CLIPSeg's preprocessing.
SEGMENTER_SIDE, MEAN, STD = 352, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BILINEAR = 2  # Pillow's number of the resampling filter


def measure(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    yield from measure_file_sizes(settings.folder)
    model = random_inference_model(read_config(settings.shape.inference_config)).to(settings.device)
    yield from measure_merging(settings, model)
    yield measure_covariance(settings, model.cond_stage_model)
    del model
    gc.collect()
    yield from measure_masks(settings)


def measure_file_sizes(folder: Path) -> Iterator[BenchmarkRow]:
    """Measure the size of a concept file in 16 bits, for the public models."""
    for name, (config, word_width, goal) in FILES.items():
        concept = random_concept(meta_text_layers(config), word_width, "0" * 64, 0)
        path = save_perfusion_concepts(folder / "size.safetensors", [concept])
        yield BenchmarkRow(f"a concept's file, {name}, 16 bits", path.stat().st_size / 1e3, "KB", goal=goal)


def measure_merging(settings: BenchmarkSettings, model: Any) -> Iterator[BenchmarkRow]:
    """Measure merging files of one concept each, reading the result, and encoding a prompt with all concepts."""
    # Write a file for each concept.
    layers = name_text_layers(model.model.diffusion_model)
    base, word_width = base_fingerprint(layers), model.cond_stage_model.embedding_width
    folder = settings.folder / "concepts"
    files = [save_perfusion_concepts(folder / f"{index}.safetensors", [random_concept(layers, word_width, base, index)])
             for index in range(max(CONCEPTS))]

    for count in CONCEPTS:
        merged = folder / f"merged_{count}.safetensors"

        def merge(sources: list[Path] = files[:count], merged: Path = merged) -> None:
            concepts = [concept for source in sources for concept in load_concepts(source)]
            save_concepts(merged, merge_concepts(concepts), precision=None)

        yield median_row(f"merging {count:,} concept files", time_calls(merge, settings.rounds), "s")
        reading = time_calls(lambda path=merged: load_perfusion_concepts(path), settings.rounds)
        yield median_row(f"reading {count:,} concepts from one file", reading, "s")

        encoder = ConceptPromptEncoder(model.cond_stage_model, layers, load_perfusion_concepts(merged))

        def encode(encoder: ConceptPromptEncoder = encoder) -> None:
            encoder.encode([f"a photo of a {encoder.placeholders[-1]}", ""])
            synchronize(settings.device)

        name = f"encoding a prompt with {count:,} concepts loaded"
        try:
            yield median_row(name, time_calls(encode, settings.rounds), "s")
        except (RuntimeError, MemoryError) as error:  # out of memory; torch has no exception of its own for CPUs
            yield unavailable_row(name, "s", error)


def measure_covariance(settings: BenchmarkSettings, encoder: Any) -> BenchmarkRow:
    """Measure C over many captions: the project's captions, repeated with an ending if they are too few."""
    count = QUICK_CAPTIONS if settings.quick else CAPTIONS
    known = default_captions(min(count, QUICK_CAPTIONS) if settings.quick else None)
    captions = [*known, *(f"{caption} Again." for caption in known)][:count]

    def estimate() -> None:
        invert_covariance(estimate_covariance(encoder, captions, progress=False).covariance)

    return BenchmarkRow(f"C over {count:,} captions, and its inverse", time_call(estimate), "s", note="once")


def measure_masks(settings: BenchmarkSettings) -> Iterator[BenchmarkRow]:
    """Measure the masks of many photos: computing them, and reading them from the cache."""
    count = QUICK_PHOTOS if settings.quick else PHOTOS
    side = settings.side
    paths = sorted(random_photos(settings.folder / "many_photos", side, count).iterdir())
    images = [read_image(path) for path in paths]
    segmenter = build_segmenter(settings)

    def compute_masks() -> None:
        cached_subjects(paths, images, segmenter, "teddy bear", settings.folder / "masks", side)

    for name in ("computed", "read from the cache"):
        with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar
            seconds = time_call(compute_masks)
        yield BenchmarkRow(f"masks of {count:,} photos of {side} px, {name}", seconds, "s", note="once")


def build_segmenter(settings: BenchmarkSettings) -> ZeroShotSegmenter:
    """Return the segmenter of the model's shape, or one like the public CLIPSeg with random weights."""
    if settings.shape.segmenter is not None:
        return ZeroShotSegmenter.from_path(ROOT / settings.shape.segmenter, settings.device)
    config = CLIPSegConfig(reduce_dim=64, use_complex_transposed_convolution=True)
    preprocessing = Preprocessing((SEGMENTER_SIDE, SEGMENTER_SIDE), BILINEAR, MEAN, STD)
    model = CLIPSegForImageSegmentation(config).to(settings.device)
    return ZeroShotSegmenter(model, CLIPTokenizer.from_pretrained(TOKENIZER), preprocessing)


def write_segmenter(settings: BenchmarkSettings, folder: Path) -> Path:
    """Write the segmenter to a folder that a run can load, unless it is in this project, and return its folder."""
    if settings.shape.segmenter is not None:
        return ROOT / settings.shape.segmenter
    segmenter = build_segmenter(settings)
    with no_progress_bar():
        segmenter.model.save_pretrained(folder)
    segmenter.tokenizer.save_pretrained(folder)
    preprocessing = segmenter.preprocessing
    config = {"size": {"height": preprocessing.size[0], "width": preprocessing.size[1]},
              "resample": preprocessing.resample, "image_mean": preprocessing.mean, "image_std": preprocessing.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder
