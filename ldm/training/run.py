"""One training run, from its options to the files in its log folder."""
from __future__ import annotations

import contextlib
import errno
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
import transformers
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from ldm.checkpoints.deferred_init import DeferredInit
from ldm.checkpoints.load import params_of_checkpoint
from ldm.common.errors import FileNotWritten, MemoryShortage, UserError, is_out_of_memory
from ldm.common.paths import quote_command
from ldm.data.concept_photos import ConceptPhotos
from ldm.data.images import describe_files
from ldm.inference.model_config import image_size, inference_defaults, latent_size
from ldm.inference.notices import warn_about_photos, warn_about_size
from ldm.training.callbacks import KeepEarlierState
from ldm.training.concept_callbacks import ConceptSaver
from ldm.training.log_folder import ResumePoint, log_folder
from ldm.training.next_command import generation_command
from ldm.training.options import TrainingOptions
from ldm.training.plan import RunPlan, plan_run
from ldm.training.trainer import make_trainer, restored_torch_settings
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FinishedRun:
    """The result of a training run.

    Attributes:
        logdir: its log folder.
        steps: steps taken, including those before it was resumed.
        concepts: files of the learned concepts, in the order of their placeholders.
    """

    logdir: Path
    steps: int
    concepts: tuple[Path, ...] = ()


def train(options: TrainingOptions) -> FinishedRun | None:
    """Train what the options describe. Return None if `options.train` is False.

    Raises:
        UserError: a config, a file or a value cannot be used, memory or disk space runs out, or a concept diverged.
    """
    return carry_out(plan_run(options))


def carry_out(plan: RunPlan) -> FinishedRun | None:
    """Train what `plan_run` has planned. Return None if its options say not to train.

    Raises:
        UserError: as `train`.
    """
    options, config, resumed = plan.options, plan.config, plan.resumed
    if resumed is not None and plan.is_finished:
        return FinishedRun(plan.folder, resumed.steps, tuple(sorted(plan.folder.glob("*.safetensors"))))
    _silence_libraries()
    pl.seed_everything(config.lightning.seed, workers=True, verbose=False)
    trainer: pl.Trainer | None = None

    def has_started() -> bool:
        return trainer is not None and (trainer.global_step > 0 or bool(_saved_concepts(trainer)))

    with (restored_torch_settings(), _open_log_folder(plan.folder, resumed, has_started) as folder,
          _explained_shortages(config, Path(folder))):
        trainer = make_trainer(config, Path(folder), plan.now)
        data, model = _build(config, trainer)
        _set_learning_rate(model, config, trainer, options.scale_lr)
        if not options.train:
            for photos in _concept_photos(data):
                if photos.left_out:
                    log.warning("%s: left out %s", photos.placeholder_token, describe_files(photos.left_out))
            log.info("model and data are ready; with '-t false' that is all")
            return None
        if plan.differs:
            trainer.callbacks.insert(0, KeepEarlierState(plan.folder, plan.now))
        if resumed:
            trainer.ckpt_path = str(resumed.checkpoint)  # the model reads it while it prepares itself
        trainer.fit(model, data, weights_only=True)
        return _finish(trainer, model)


def _open_log_folder(folder_path: Path, resumed: ResumePoint | None, has_started: Callable[[], bool]
                     ) -> contextlib.AbstractContextManager[str | Path]:
    """Return a context whose value is the folder that this process writes to."""
    if rank_zero_only.rank:  # nothing is kept of the other processes of a run
        return tempfile.TemporaryDirectory()
    return contextlib.nullcontext(folder_path) if resumed else log_folder(folder_path, has_started)


@contextlib.contextmanager
def _explained_shortages(config: DictConfig, folder: Path) -> Iterator[None]:
    """Turn a lack of memory, or of disk space in the log folder, into a UserError that names the remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortage(
            f"not enough memory for batches of {config.data.params.get('batch_size')}; lower data.params.batch_size "
            "(and raise lightning.trainer.accumulate_grad_batches as much, for the same steps), or set "
            "model.params.unet_config.params.use_checkpoint=true if it is false") from error
    except FileNotWritten as error:
        raise FileNotWritten(f"{error}; {_way_to_go_on(folder)}") from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise FileNotWritten(f"{error.filename or folder}: cannot be written ({error.strerror}); free some space or "
                             f"choose another folder with --logdir; {_way_to_go_on(folder)}") from error


def _way_to_go_on(folder: Path) -> str:
    """Say what is left of a run that could not write its files."""
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        return "the run has no checkpoint yet"
    newest = folder if checkpoints[-1].name == "last.ckpt" else checkpoints[-1]
    return f"then continue with: python main.py --resume {quote_command(newest)}"


def _build(config: DictConfig, trainer: pl.Trainer) -> tuple[pl.LightningDataModule, pl.LightningModule]:
    """Build data and model, ready for training. Data are built first: this is fast and finds mistakes early."""
    data = instantiate_from_config(config.data)
    _check_type("data", data, pl.LightningDataModule)
    data.setup()
    _warn_about_photos(config, data)
    section = {key: config.model[key] for key in ("target", "params") if key in config.model}
    with DeferredInit():
        model = instantiate_from_config(section, **params_of_checkpoint(section))
    _check_type("model", model, pl.LightningModule)
    max_devices = getattr(model, "max_devices", trainer.world_size)
    if trainer.world_size > max_devices:
        allowed = "one device" if max_devices == 1 else f"at most {max_devices} devices, one for each concept"
        raise UserError(f"{config.model.target} is trained on {allowed}; "
                        f"leave out --devices {config.lightning.trainer.devices}")
    # On the device, weights are rearranged sooner. Large models move there in parts, when they are prepared.
    moves_now = trainer.num_devices == 1 and not getattr(model, "is_large", False)
    return data, model.to(trainer.strategy.root_device if moves_now else None, memory_format=torch.channels_last)


def _concept_photos(data: pl.LightningDataModule) -> list[ConceptPhotos]:
    """Return the training sets that are photos of concepts."""
    train = getattr(data, "datasets", {}).get("train")
    return [each for each in (train if isinstance(train, list) else [train]) if isinstance(each, ConceptPhotos)]


def _warn_about_photos(config: DictConfig, data: pl.LightningDataModule) -> None:
    """Warn if concepts are to be learned from photos, or in a size, that the base model does not know."""
    concepts = _concept_photos(data)
    if not concepts:
        return
    warn_about_size(config, concepts[0].size, concepts[0].size)
    sizes = [photo.image.size for concept in concepts for photo in concept.photos]
    warn_about_photos(inference_defaults(config), min(image_size(config, latent_size(config))), sizes)


def _check_type(section: str, built: object, expected: type) -> None:
    if not isinstance(built, expected):
        raise UserError(f"config: {section}.target must name a {expected.__name__}, not a {type(built).__name__}")


def _set_learning_rate(model: pl.LightningModule, config: DictConfig, trainer: pl.Trainer, scale: bool) -> None:
    """Set `model.base_learning_rate`, times devices, batch size and accumulation if `scale` (the LDM family's rule)."""
    rate = config.model.get("base_learning_rate")
    if rate is None:
        return
    factors = ""
    if scale:
        devices, batch, accumulated = (trainer.num_devices, config.data.params.batch_size,
                                       trainer.accumulate_grad_batches)
        factors = (f" = base_learning_rate {rate:.2e} x {devices} device{'' if devices == 1 else 's'} x batch size "
                   f"{batch} x {accumulated} accumulated batch{'' if accumulated == 1 else 'es'} (--scale_lr false "
                   "leaves the factors out)")
        rate *= devices * batch * accumulated
    model.learning_rate = rate
    log.info("learning rate %.2e%s", rate, factors)


def _finish(trainer: pl.Trainer, model: pl.LightningModule) -> FinishedRun:
    """Return the result of the run, and log the command that generates with its concepts."""
    folder = Path(trainer.default_root_dir)
    paths = _saved_concepts(trainer)
    if paths and trainer.is_global_zero:
        log.info("next: %s", generation_command(folder, paths, model.placeholders))
    return FinishedRun(folder, trainer.global_step, paths)


def _saved_concepts(trainer: pl.Trainer) -> tuple[Path, ...]:
    """Return the concept files that a run has written."""
    return tuple(path for callback in trainer.callbacks if isinstance(callback, ConceptSaver)
                 for path in callback.paths)


def _silence_libraries() -> None:
    """Silence messages of libraries that appear at every start and that no user can act on."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt if there is no network
    transformers.utils.logging.disable_progress_bar()
    for message in (".*does not have many workers.*", ".*tensorboardX.*", ".*Checkpoint directory.*",
                    ".*isinstance.treespec.*", ".*`LeafSpec`.*", ".*in eval mode at the start of training.*",
                    ".*have no `val_dataloader`.*", ".*dirpath has changed.*"):
        warnings.filterwarnings("ignore", message=message)
