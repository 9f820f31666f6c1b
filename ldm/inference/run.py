"""Run a generation script: check its options, load the model, generate, and write to a folder.

The checks come first, so that mistakes are reported before any weights are loaded.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.common.errors import UserError
from ldm.common.progress import show_progress
from ldm.common.prompt_file import fill_slots
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.prompt_checks import check_prompts
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import read_concepts, save_concepts
from ldm.data.images import load_folder
from ldm.data.masks import mask_to_image
from ldm.inference.model_config import (
    check_steps,
    complete_settings,
    image_size,
    inference_defaults,
    latent_size,
    model_setting,
    read_model_config,
    segmenter_of,
)
from ldm.inference.notices import tell_about_few_steps
from ldm.inference.output_folder import OutputFolder
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.requests import GenerationRequest, requests_for
from ldm.inference.settings import (
    AUTO,
    GenerationOptions,
    GenerationSettings,
    ModelSettings,
    PhotoSettings,
    SourceSettings,
)
from ldm.inference.source_image import SourceImage
from ldm.modules.segmentation import ZeroShotSegmenter, threshold_mask
from ldm.personalization.concept_names import file_names_for
from ldm.util import pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run whose options, config and concepts are checked. Only the weights are not loaded yet.

    Attributes:
        options: the options of the script.
        config: the base model's config.
        concepts: the concepts of all files, with the given bias and temperature, except for open biases.
        settings: how to generate, with all defaults filled in.
        device: the device to generate on.
        open_biases: the biases, with "auto" for each that is to be found; None: no bias is open.
    """

    options: GenerationOptions
    config: DictConfig
    concepts: Sequence[AnyConcept]
    settings: GenerationSettings
    device: torch.device
    open_biases: tuple[float | str | None, ...] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images."""
        latents = latent_size(self.config, self.settings.height, self.settings.width)
        height, width = image_size(self.config, latents)
        return width, height

    @property
    def requests(self) -> list[GenerationRequest]:
        """One for each image, prompt by prompt."""
        options = self.options
        seeds = range(options.seed, options.seed + options.num_images)
        return requests_for(options.prompts, seeds, options.negative_prompts or "")

    @property
    def texts(self) -> list[str]:
        """All prompts and negative prompts."""
        return [*self.options.prompts, *self.options.negative_prompts]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that all images of the run share."""
        settings = asdict(self.settings.without_concept_settings())
        model = self.options.model
        width, height = self.size
        return {**{name: value for name, value in settings.items() if value is not None}, "height": height,
                "width": width, "config": model.config, "checkpoint": model.checkpoint,
                **{part: path for part, path in (("vae", model.vae), ("text_encoder", model.text_encoder)) if path},
                **({"loras": [asdict(lora) for lora in model.loras]} if model.loras else {}),
                "concepts": concept_metadata(self.concepts)}

    def load_pipeline(self) -> PerfusionPipeline:
        """Load the base model and give it the concepts.

        Raises:
            UserError: the weights are missing or do not fit.
        """
        return self.with_concepts(load_base_model(self.options.model, self.config, self.device))

    def with_concepts(self, pipeline: PerfusionPipeline) -> PerfusionPipeline:
        """Give a pipeline the concepts of the run."""
        pipeline.batch_size = self.options.batch_size
        pipeline.concepts = list(self.concepts)
        return pipeline


def load_base_model(model: ModelSettings, config: DictConfig, device: torch.device) -> PerfusionPipeline:
    """Load a base model without concepts."""
    return PerfusionPipeline.from_config(config, model.checkpoint, device, model.precision, model.vae,
                                         model.text_encoder, model.loras)


def concept_metadata(concepts: Sequence[AnyConcept]) -> list[dict[str, Any]]:
    """Return the metadata of the concepts that images were generated with."""
    stored = ("placeholder", "super_category", "source", "bias", "temperature", "projection", "used_layers")
    return [{name: getattr(concept, name) for name in stored if hasattr(concept, name)} for concept in concepts]


def prepare_run(options: GenerationOptions) -> PreparedRun:
    """Read the config and the concepts, and check everything that needs no weights.

    Raises:
        UserError: an option does not fit the model's config, the concepts, this machine or another option.
    """
    config = read_model_config(options.model.config)
    defaults = inference_defaults(config, options.model.checkpoint)
    settings = complete_settings(options.settings, config, defaults)
    if options.negative_prompts and settings.guidance_scale == 1:
        raise UserError("--negative_prompt acts through guidance, and --scale 1 is none; raise --scale")
    device = pick_device(options.model.device)
    # Biases that are still to be found leave the concepts their own for now.
    biases = settings.biases
    known = None if biases is None else [None if bias == AUTO else bias for bias in biases]
    concepts = override_settings(read_concepts(options.concepts), known, settings.temperatures, settings.all_layers)
    placeholders = [concept.placeholder for concept in concepts]
    options = replace(options, prompts=tuple(fill_slots(options.prompts, placeholders)),
                      negative_prompts=tuple(fill_slots(options.negative_prompts, placeholders)))
    run = PreparedRun(options, config, concepts, settings.without_concept_settings(), device)
    check_prompts(run.texts, placeholders, settings.prompt_weights)
    _ = run.requests  # checks the negative prompts
    checkpoint = options.model.checkpoint or model_setting(config, "params.ckpt_path")
    loras = [lora.path for lora in options.model.loras]
    tell_about_few_steps([*loras, checkpoint] if checkpoint else loras, settings)
    return _with_open_biases(run, settings) if biases and AUTO in biases else run


def _with_open_biases(run: PreparedRun, settings: GenerationSettings) -> PreparedRun:
    """Check the requirements of `bias="auto"` before any weights are loaded."""
    from ldm.inference.auto_bias import STEPS, clip_for  # the CLIPs' library takes seconds to load

    options = run.options
    each = settings.biases_of(sum(not concept.is_word for concept in run.concepts))
    if options.photos is not None and each.count(AUTO) > 1:
        raise UserError(f"--photos {options.photos}: can be of one concept only, and --bias auto is for "
                        f"{each.count(AUTO)}; leave the photos out, or give numbers for the other biases")
    check_steps(run.config, STEPS)
    checkpoint = options.model.checkpoint or model_setting(run.config, "params.ckpt_path")
    clip = clip_for(options.clip, inference_defaults(run.config, checkpoint), checkpoint)
    return replace(run, options=replace(options, clip=clip), open_biases=each)


def generate_to_folder(options: GenerationOptions) -> OutputFolder:
    """Generate the images of all prompts and write them to a folder, which is returned.

    Raises:
        UserError: an option cannot be used, the weights do not fit, or memory runs out.
    """
    pipeline = None
    if options.subject is not None:
        pipeline, options = predict_concept(options, options.subject)
    run = prepare_run(options)
    source = None if options.source is None else load_source(run, options.source)
    pipeline = run.load_pipeline() if pipeline is None else run.with_concepts(pipeline)
    run = choose_biases(run, pipeline)
    requests, folder = run.requests, OutputFolder(options.outdir, options.columns)
    images = pipeline.generate(requests, run.settings, source=source, progress=sys.stderr.isatty())
    describe_concepts(run.concepts)
    pipeline.warn_about(requests, run.settings, source)
    metadata = {**run.metadata, **({} if source is None else _source_metadata(source, folder))}
    try:
        counted = show_progress(images, len(requests), "generating", "images", in_terminals=False)
        for request, image in zip(requests, counted, strict=True):
            folder.add(image, request.prompt, {**request._asdict(), **metadata})
    finally:
        folder.finish_sheet()
    return folder


def predict_concept(options: GenerationOptions, subject: PhotoSettings) -> tuple[PerfusionPipeline, GenerationOptions]:
    """Load the base model, predict the concept of photos and write it to the output folder.

    Returns:
        The base model, and the options with the concept's file among the others.

    Raises:
        UserError: the photos cannot be used, or the base model has no encoder.
    """
    config = read_model_config(options.model.config)
    pipeline = load_base_model(options.model, config, pick_device(options.model.device))
    concept = pipeline.load_photos(subject.folder, subject.super_category, subject.placeholder, masks=subject.masks,
                                   strength=subject.strength, encoder=subject.encoder)
    folder = OutputFolder(options.outdir, options.columns)
    name = file_names_for([subject.placeholder])[0]
    path = folder.add_file(name, lambda temporary: save_concepts(temporary, [concept]), ".safetensors")
    log.info("predicted from the photos: %s", path)
    return pipeline, replace(options, concepts=(*options.concepts, str(path)), subject=None)


def load_source(run: PreparedRun, source: SourceSettings) -> SourceImage:
    """Load the image to start from, cropped to the size of the run, with its mask if only a part is regenerated.

    Raises:
        UserError: a file cannot be read, or the segmenter finds nothing for the mask words.
    """
    loaded = SourceImage.load(source.image, run.size, source.strength)
    if not source.inpaints:
        return loaded
    if source.mask is not None:
        mask = loaded.read_mask(source.mask)
    else:
        name = source.segmenter or segmenter_of(run.config)
        segmenter = ZeroShotSegmenter.from_path(name, run.device, "paint the mask yourself (--mask FILE)")
        width, height = run.size
        probabilities = segmenter.segment([loaded.image], source.mask_prompt, (height, width))[0]
        mask = threshold_mask(probabilities, source.mask_prompt, source.image)[None, None]
    return loaded.with_mask(mask, source.grow, source.border)


def choose_biases(run: PreparedRun, pipeline: PerfusionPipeline) -> PreparedRun:
    """Find the biases that the run leaves open, for each concept on its own, and give them to the pipeline.

    Raises:
        UserError: the photos or the CLIP cannot be used, or a concept does not fit the model.
    """
    if run.open_biases is None:
        return run
    photos = None if run.options.photos is None else [photo for _, photo in load_folder(run.options.photos)]
    settings = replace(run.settings, bias=run.open_biases)
    found = pipeline.resolve_auto_bias(settings, run.options.prompts, run.options.clip, photos)
    pipeline.concepts = override_settings(run.concepts, found.biases)
    return replace(run, concepts=pipeline.concepts, open_biases=None)


def describe_concepts(concepts: Sequence[AnyConcept]) -> None:
    """Log each concept with its placeholder and settings."""
    for concept in concepts:
        log.info("%s: the %s of %s, %s", concept.placeholder, concept.super_category, concept.source, concept.summary)


def _source_metadata(source: SourceImage, folder: OutputFolder) -> dict[str, Any]:
    """Return the metadata of the source image, and write its mask to the folder."""
    metadata: dict[str, Any] = {"init_img": source.name, "strength": source.strength}
    if source.mask is not None:
        mask = folder.add_extra("mask", mask_to_image(source.mask))
        log.info("the white part of %s is regenerated, with a border of %d pixels", mask, source.border)
        metadata |= {"mask": str(mask), "border": source.border}
    return metadata
