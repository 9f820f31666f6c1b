"""Train a concept encoder for a base model of the user's, from the images to the folder that is loaded."""
from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoints.read import read_state_dict
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path, user_path
from ldm.data.look_prompts import look_words
from ldm.inference.encoding import base_model_of
from ldm.inference.model_config import read_model_config, segmenter_of
from ldm.inference.pipeline import PerfusionPipeline
from ldm.models.concept_encoder_training import ConceptEncoderTrainer
from ldm.modules.concept_encoder import CONFIG, EncoderSettings, save_encoder
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.training.config import read_config
from ldm.training.encoder_images import ImageSet, check_image_set, make_images
from ldm.training.encoder_options import EncoderOptions
from ldm.training.options import TrainingOptions
from ldm.training.run import train
from ldm.training.run_record import newest_config
from ldm.util import instantiate_from_config, pick_device

log = logging.getLogger(__name__)

BASE, IMAGES, LOGS = "base.yaml", "images", "logs"  # in the encoder's folder


def train_encoder(options: EncoderOptions) -> Path:
    """Make the images that are missing, train the encoder, and write it; return its folder.

    Raises:
        UserError: a file or value cannot be used, or memory or disk space runs out.
    """
    out = user_path(options.out)
    if (out / CONFIG).exists():
        raise UserError(f"--out {options.out}: holds an encoder already; choose another folder, or delete its {CONFIG}")
    config = _base_config(options)
    run = _training_options(options, out)
    read_config(run)  # raises now, not after hours, if it cannot be used

    # Images first. The models that make them are not in memory while the head is trained.
    segmenter = ZeroShotSegmenter.from_path(options.segmenter or segmenter_of(config), pick_device(options.device),
                                            "give one with --segmenter")
    pipeline = PerfusionPipeline.from_config(config, options.checkpoint, options.device, options.precision)
    images = ImageSet(base_model_of(pipeline.model).fingerprint, options.seed, num_inference_steps=options.steps,
                      guidance_scale=options.guidance_scale)
    check_image_set(out / IMAGES, images)
    make_images(pipeline, segmenter, out / IMAGES, options.images, images, options.batch_size)
    del pipeline, segmenter
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    OmegaConf.save(config, out / BASE)
    finished = train(run)
    export_encoder(finished.logdir, out, options.strength)
    return out


def _base_config(options: EncoderOptions) -> DictConfig:
    """Return the base model's config with the path of its weights."""
    config = read_model_config(options.config)
    if options.checkpoint is not None:
        config.model.params.ckpt_path = str(resolve_path(options.checkpoint).absolute())
    return config


def _training_options(options: EncoderOptions, out: Path) -> TrainingOptions:
    folder = out.absolute() / IMAGES
    values: Mapping[str, object] = {
        "model.params.base": str(out.absolute() / BASE), "data.params.train.params.folder": str(folder),
        "data.params.validation.params.folder": str(folder)}
    if options.tower is not None:
        values = {**values, "model.params.tower": options.tower}
    device = pick_device(options.device)
    return TrainingOptions(
        configs=(options.training,), overrides=tuple(f"{key}={json.dumps(value)}" for key, value in values.items()),
        name="encoder", logdir=str(out / LOGS), seed=options.seed, max_steps=options.max_steps,
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=f"{device.index}," if device.index is not None else "1")


def export_encoder(run: Path, folder: Path, strength: float = 1.0) -> None:
    """Write the encoder that a run trained into a folder that `load_concept_encoder` reads.

    Args:
        run: log folder of a run of `ConceptEncoderTrainer`.
        folder: created if it is missing.
        strength: default strength of its concepts.

    Raises:
        UserError: the run has no checkpoint, or its base model is not there any more.
    """
    config = newest_config(run, "project")
    model: ConceptEncoderTrainer = instantiate_from_config(
        {key: config.model[key] for key in ("target", "params")})
    model.load_state_dict(read_state_dict(run / "checkpoints" / "last.ckpt"))
    settings = EncoderSettings(model.tower, model.base_model.fingerprint, model.templates, look_words(), strength)
    save_encoder(folder, model.head, settings, {"run": run.name})
    log.info("encoder written to %s", folder)
