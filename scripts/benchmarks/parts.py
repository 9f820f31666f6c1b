"""What grows with the number of concepts, captions and photos: files, merging, covariance, masks."""
from __future__ import annotations

import contextlib
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from ldm.concepts.concept import base_fingerprint, load_perfusion_concepts, save_perfusion_concepts
from ldm.concepts.prompt_encoder import ConceptPromptEncoder
from ldm.modules.attention import name_text_layers
from ldm.modules.covariance import default_captions, estimate_covariance
from ldm.modules.encoders.modules import TOKENIZER
from ldm.modules.rank_one import invert_covariance
from ldm.modules.segmentation import Preprocessing, ZeroShotSegmenter, cached_masks
from merge_embeddings import main as merge
from scripts.benchmarks.common import ROOT, Goal, Row, Settings, median_row, repeated, seconds, unavailable
from scripts.benchmarks.device import wait
from scripts.benchmarks.random_models import (
    random_concept,
    random_covariance,
    random_model,
    random_photos,
    read_config,
    unet_layers,
)

CONCEPTS = (2, 100, 1000)
FILES = {"Stable Diffusion 1.5": ("configs/perfusion-sd-v1.yaml", 768, Goal(35)),
         "Stable Diffusion 2.x": ("configs/perfusion-sd-v2.yaml", 1024, Goal(40))}  # with the width of a word
CAPTIONS, QUICK_CAPTIONS = 100_000, 2_000
PHOTOS, QUICK_PHOTOS = 1_000, 20
# The public CLIPSeg's preprocessing.
SEGMENTER_SIDE, MEAN, DEVIATION = 352, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(settings: Settings) -> Iterator[Row]:
    yield from file_sizes(settings.folder)
    config = read_config(settings.shape.draw)
    extra = {"covariance": None, "segmenter": None} if "covariance" in config.model.params else {}
    model = random_model(config.model, ckpt_path=None, **extra).to(settings.device)
    yield from merging(settings, model)
    yield covariance(settings, model.cond_stage_model)
    del model
    gc.collect()
    yield from masks(settings)


def file_sizes(folder: Path) -> Iterator[Row]:
    """A concept's file in 16 bits, for the public models."""
    for name, (config, words, goal) in FILES.items():
        path = save_perfusion_concepts(folder / "size.safetensors", [random_concept(unet_layers(config), words, "0" * 64, 0)])
        yield Row(f"a concept's file, {name}, 16 bits", path.stat().st_size / 1e3, "KB", goal=goal)


def merging(settings: Settings, model: Any) -> Iterator[Row]:
    """Files of one concept each into one, that one read, and a first prompt encoded with all of them loaded."""
    layers = name_text_layers(model.model.diffusion_model)
    base, words = base_fingerprint(layers), model.cond_stage_model.token_table.shape[1]
    folder = settings.folder / "concepts"
    files = [str(save_perfusion_concepts(folder / f"{number}.safetensors", [random_concept(layers, words, base, number)]))
             for number in range(max(CONCEPTS))]
    inverse = invert_covariance(random_covariance(next(iter(layers.values())).to_v.weight.shape[1]))
    for count in CONCEPTS:
        merged = folder / f"merged_{count}.safetensors"
        arguments = ["--manager_ckpts", *files[:count], "--output_path", str(merged)]
        with contextlib.redirect_stdout(io.StringIO()):
            taken = repeated(lambda given=arguments: merge(given), settings.rounds)
        yield median_row(f"merging {count:,} concept files", taken, "s")
        yield median_row(f"reading {count:,} concepts from one file",
                         repeated(lambda path=merged: load_perfusion_concepts(path), settings.rounds), "s")
        encoder = ConceptPromptEncoder(model.cond_stage_model, layers, load_perfusion_concepts(merged), inverse)

        def encode(encoder: ConceptPromptEncoder = encoder) -> None:
            encoder.encode([f"a photo of a {encoder.placeholders[-1]}", ""])
            wait(settings.device)

        what = f"encoding a prompt with {count:,} concepts loaded"
        try:
            yield median_row(what, repeated(encode, settings.rounds), "s")
        except (RuntimeError, MemoryError) as error:  # no memory: on a CPU torch has no name of its own for it
            yield unavailable(what, "s", error)


def covariance(settings: Settings, encoder: Any) -> Row:
    """C over many captions, once; those that come with the project, again with an ending where they are too few."""
    count = QUICK_CAPTIONS if settings.quick else CAPTIONS
    known = default_captions(min(count, QUICK_CAPTIONS) if settings.quick else None)
    captions = [*known, *(f"{caption} Again." for caption in known)][:count]

    def estimate() -> None:
        invert_covariance(estimate_covariance(encoder, captions, progress=False).covariance)

    return Row(f"C over {count:,} captions, and its inverse", seconds(estimate), "s", note="once")


def masks(settings: Settings) -> Iterator[Row]:
    """Masks of many photos: made, and read again."""
    count = QUICK_PHOTOS if settings.quick else PHOTOS
    side = settings.side
    paths = sorted(random_photos(settings.folder / "many_photos", side, count).iterdir())
    found = segmenter(settings)
    for what in ("made", "read again"):
        with contextlib.redirect_stderr(io.StringIO()):  # where the progress bar goes
            taken = seconds(lambda: cached_masks(paths, found, "teddy bear", settings.folder / "masks", side))
        yield Row(f"masks of {count:,} photos of {side} px, {what}", taken, "s", note="once")


def segmenter(settings: Settings) -> ZeroShotSegmenter:
    """The shape's own, or one like the public CLIPSeg with random weights."""
    if settings.shape.segmenter is not None:
        return ZeroShotSegmenter.from_path(ROOT / settings.shape.segmenter, settings.device)
    config = CLIPSegConfig(reduce_dim=64, use_complex_transposed_convolution=True)
    preprocessing = Preprocessing((SEGMENTER_SIDE, SEGMENTER_SIDE), 2, MEAN, DEVIATION)
    model = CLIPSegForImageSegmentation(config).to(settings.device)
    return ZeroShotSegmenter(model, CLIPTokenizer.from_pretrained(TOKENIZER), preprocessing)


def save_segmenter(settings: Settings, folder: Path) -> Path:
    """A folder of that segmenter, for a run that loads one."""
    if settings.shape.segmenter is not None:
        return ROOT / settings.shape.segmenter
    found = segmenter(settings)
    disable_progress_bar()
    found.model.save_pretrained(folder)
    found.tokenizer.save_pretrained(folder)
    how = found.preprocessing
    size = {"height": how.size[0], "width": how.size[1]}
    described = {"size": size, "resample": how.resample, "image_mean": how.mean, "image_std": how.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder
