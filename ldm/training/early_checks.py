"""Check the files that a command line names before torch is imported: configs, the run to resume, the base model."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoints.early_checks import check_concept, check_model_files, identify_header
from ldm.checkpoints.header import read_header
from ldm.common.errors import UserError
from ldm.common.file_formats import check_config_file
from ldm.common.hub import check_model_name
from ldm.common.paths import resolve_path, user_path
from ldm.training.options import TrainingOptions

STATE_KEYS = ("state_dict", "optimizer_states", "global_step", "pytorch-lightning_version")
CONCEPT_PHOTOS = ("ldm.data.personalized.PersonalizedBase", "ldm.data.concept_photos.ConceptPhotos")
OTHER_CHECKPOINT = "name another one of the run's checkpoints/, or train anew"


def check_files(options: TrainingOptions) -> None:
    """Check what needs no torch. What passes is checked again, more closely, while the run is built.

    Raises:
        UserError: a file is missing, or is not what its flag needs. The message says what it is.
    """
    for path in options.configs:
        found = resolve_path(path)
        if not found.exists():
            raise UserError(f"--base {path}: no such file")
        check_config_file(found)
    if options.resume:
        check_resume_file(options.resume)
    if options.embedding_manager_ckpt:
        check_concept(options.embedding_manager_ckpt)
    for path in options.init_embedding or ():
        check_concept(path)
    config = _merged_model(options)
    if not options.resume:
        check_model_files("--actual_resume", options.checkpoint, config, options.vae, options.text_encoder)


def check_resume_file(given: str) -> None:
    """Raise UserError if what --resume names is missing or, by its header, no checkpoint of a training run."""
    path = user_path(given)
    if not path.exists():
        raise UserError(f"--resume {path}: no such log folder or checkpoint")
    if path.is_dir():
        return
    try:
        header = read_header(path)
    except UserError as error:
        raise UserError(f"--resume {error}") from None
    if header is None:
        return  # damaged; reading it says so
    if not isinstance(header.content, Mapping):
        family = identify_header(header)
        what = family.name if family is not None else "a file of weights"
        raise UserError(f"--resume {path}: is {what}, no state of a training run; to start from weights use "
                        "--actual_resume, to continue a run name its log folder")
    check_run_state(path, header.content)
    if path.suffix == ".safetensors":  # torch would read it as such
        raise UserError(f"--resume {path}: is a run's checkpoint under a wrong name; rename it to {path.stem}.ckpt")


def check_run_state(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise UserError if the content of a checkpoint is not that of a training run, or its step is no number."""
    if any(name not in content for name in STATE_KEYS):
        raise UserError(f"--resume {path}: holds no state of a training run; to start from weights use --actual_resume")
    step = content["global_step"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"--resume {path}: its global_step is no number of steps; {OTHER_CHECKPOINT}")


def _merged_model(options: TrainingOptions) -> dict[str, Any]:
    """Return the model's section of all configs and overrides, as far as it matters here and can be read."""
    params: dict[str, Any] = {}
    for path in options.configs:
        try:
            model = yaml.safe_load(resolve_path(path).read_text(encoding="utf-8"))["model"]
            params |= model.get("params") or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError):
            continue  # another kind of mistake, which reading the configs names
    for override in options.overrides:
        key, _, value = override.partition("=")
        if key in ("model.params.ckpt_path", "model.params.vae_path", "model.params.text_encoder_path"):
            params[key.rpartition(".")[2]] = value
        elif key.startswith("model.params."):
            return {}  # may change what fits the model
    return {"model": {"params": params}}


def check_inputs(config: DictConfig) -> None:
    """Check the folders, files and helper models that the complete config of a run names. The photos are not opened.

    Raises:
        UserError: one is missing, or is a model of the hub that cannot be fetched.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    for split in ("train", "validation"):
        section = plain["data"].get("params", {}).get(split) or {}
        if str(section.get("target")) in CONCEPT_PHOTOS:
            _check_folders("--data_root", section.get("params", {}).get("data_root"))
            _check_folders("--masks", section.get("params", {}).get("mask_root"))
    model = plain["model"].get("params") or {}
    train = (plain["data"].get("params", {}).get("train") or {}).get("params") or {}
    segmenter, covariance, encoder = model.get("segmenter"), model.get("covariance"), model.get("encoder")
    if isinstance(encoder, str) and not resolve_path(encoder).is_dir():
        raise UserError(f"encoder {encoder}: no such folder; give one such as models/mini/encoder, or set null")
    if isinstance(segmenter, str) and not train.get("mask_root"):
        check_model_name("segmenter", segmenter, "give a folder with a CLIPSeg model, masks of your own (--masks), or "
                         "--masks none")
    if isinstance(covariance, str) and not resolve_path(covariance).exists():
        raise UserError(f"covariance {covariance}: no such file; compute it with scripts/compute_covariance.py, or set "
                        "null")


def _check_folders(flag: str, folders: Any) -> None:
    for folder in folders if isinstance(folders, list) else [folders]:
        if isinstance(folder, str) and not resolve_path(folder).is_dir():
            raise UserError(f"{flag} {folder}: no such folder; give the folder that holds the images")
