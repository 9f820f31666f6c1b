"""Callbacks of every run: configs and sample grids in the log folder, faster frozen U-Nets, progress, clean stops."""
from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from ldm.common.errors import MemoryShortage
from ldm.common.files import write_atomically
from ldm.common.paths import quote_command
from ldm.data.contact_sheet import save_grid
from ldm.data.images import from_tensor
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.fast.sixteen_bits import MIXED_PRECISIONS
from ldm.training.input_files import INPUTS, describe_inputs
from ldm.training.run_record import describe_machine
from ldm.util import has_trainable_parameters

log = logging.getLogger(__name__)


class SetupCallback(pl.Callback):
    """Write the configs of a run, and descriptions of its machine and its files, into the log folder when it starts.

    Args:
        resume: the run that is continued, if any; kept for the LDM family's scripts.
        now: date and time in the names of the files.
        logdir: the log folder.
        ckptdir: the folder of checkpoints.
        cfgdir: the folder of configs.
        config: the sections that describe the model and its data.
        lightning_config: the section `lightning`.
    """

    def __init__(self, resume: str | Path | None, now: str, logdir: str | Path, ckptdir: str | Path,
                 cfgdir: str | Path, config: Mapping[str, Any], lightning_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config = config, lightning_config

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("logs in %s", self.logdir)
        self.ckptdir.mkdir(parents=True, exist_ok=True)
        lightning = {"lightning": self.lightning_config}
        for name, section in (("project", self.config), ("lightning", lightning)):
            write_atomically(self.cfgdir / f"{self.now}-{name}.yaml", _config_writer(OmegaConf.create(section)))
        for name, record in (("machine.json", describe_machine(pl_module.device)),
                             (INPUTS, describe_inputs(OmegaConf.create(self.config)))):
            write_atomically(self.cfgdir / f"{self.now}-{name}", _json_writer(record))


def _config_writer(config: DictConfig) -> Callable[[Path], None]:
    return lambda path: OmegaConf.save(config, path)


def _json_writer(record: Mapping[str, Any]) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(record) + "\n", encoding="utf-8")


class KeepEarlierState(pl.Callback):
    """Keep the log folder of a resumed run as it was, in its folder earlier/, before a session that differs from it.

    The copy can be resumed by itself. It takes hardly any room: files are hard links where the disk has them, since
    every file of a run is replaced by another and never changed.

    Args:
        folder: the log folder.
        now: date and time, the name of the copy.
    """

    NOT_COPIED = ("earlier", "tensorboard")

    def __init__(self, folder: Path, now: str) -> None:
        self.folder, self.copy = folder, folder / "earlier" / now

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shutil.copytree(self.folder, self.copy, copy_function=_link_or_copy,
                        ignore=shutil.ignore_patterns(*self.NOT_COPIED))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # of a disk without hard links
        shutil.copy2(source, target)


class ImageLogger(pl.Callback):
    """Every `batch_frequency` steps, save the model's `log_images` as grids: `<logdir>/images/train/` and TensorBoard.

    The params are those of the LDM family's main.py. Its grids of validation batches are left out.

    Args:
        batch_frequency: training steps between two grids.
        max_images: number of images of a batch to show; 0 shows none.
        clamp: kept for the public configs; grids are clamped to what an image file holds in any case.
        increase_log_steps: show steps 1, 2, 4, 8, ... below `batch_frequency` as well.
        rescale: whether images are in [-1, 1]; otherwise they are in [0, 1].
        disabled: save nothing.
        log_on_batch_idx: count batches of the epoch instead of steps.
        log_first_step: show the first step as well.
        log_images_kwargs: arguments for the model's `log_images`.
    """

    def __init__(self, batch_frequency: int, max_images: int = 8, clamp: bool = True, increase_log_steps: bool = True,
                 rescale: bool = True, disabled: bool = False, log_on_batch_idx: bool = False,
                 log_first_step: bool = False, log_images_kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.batch_freq, self.max_images = batch_frequency, max_images
        self.clamp, self.rescale = clamp, rescale
        self.disabled, self.log_on_batch_idx, self.log_first_step = disabled, log_on_batch_idx, log_first_step
        self.log_steps = _powers_of_two(batch_frequency) if increase_log_steps else [batch_frequency]
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.last_step = -1

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int, dataloader_idx: int = 0) -> None:
        step = trainer.global_step
        if self.disabled or self.max_images < 1 or not hasattr(pl_module, "log_images") or step == self.last_step:
            return
        if self.check_frequency(batch_idx if self.log_on_batch_idx else step) or (self.log_first_step and step == 1):
            self.last_step = step
            self.save_images(trainer, pl_module, batch, step)

    def check_frequency(self, check_idx: int) -> bool:
        """Return whether a step, or batch, has a grid."""
        return check_idx > 0 and (check_idx % self.batch_freq == 0 or check_idx in self.log_steps)

    def save_images(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int) -> None:
        """Save one grid per entry of `log_images`: images (N, C, H, W), or one (C, H, W)."""
        for name, images in self._images_of(pl_module, batch, step).items():
            images = (images if images.ndim == 4 else images[None])[: self.max_images].detach().float().cpu()
            images = (images if self.rescale else 2 * images - 1).clamp(-1, 1).expand(-1, 3, -1, -1)
            path = Path(trainer.default_root_dir) / "images" / "train" / f"{name}_gs-{step:06}.png"
            save_grid([from_tensor(image) for image in images], path, columns=min(4, len(images)))
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_images"):
                    logger.experiment.add_images(f"train/{name}", (images + 1) / 2, step)

    def _images_of(self, pl_module: pl.LightningModule, batch: Any, step: int) -> dict[str, Tensor]:
        options = {"split": "train", "N": self.max_images, **self.log_images_kwargs}
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad():
                return pl_module.log_images(batch, **_accepted(pl_module.log_images, options, self.log_images_kwargs))
        except (MemoryShortage, torch.OutOfMemoryError) as error:
            log.warning("no images at step %d: %s", step, " ".join(str(error).split()))
            return {}
        finally:
            pl_module.train(was_training)


def _powers_of_two(limit: int) -> list[int]:
    return [2 ** exponent for exponent in range(limit.bit_length()) if 2 ** exponent <= limit]


def _accepted(function: Callable[..., Any], options: Mapping[str, Any], required: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a function has parameters for, and those that are required of it."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in options.items() if key in names or key in required}


class CUDACallback(pl.Callback):
    """Log the seconds and, on a CUDA device, the peak memory of every epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            torch.cuda.synchronize(pl_module.device)
        self.start_time = time.monotonic()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            peak = torch.cuda.max_memory_allocated(pl_module.device) / 2**20
            log.info("peak memory of the epoch: %.0f MiB", peak)
        log.info("epoch: %.1f s", time.monotonic() - self.start_time)


class AccelerateFrozenUNet(pl.Callback):
    """On a CUDA device with mixed precision, run a U-Net that is not trained in 16 bits and by CUDA graphs.

    Modules that stay in 32 bits, such as the text encoder, may use TF32 until the run ends. This changes gates by a
    hundredth of what bfloat16 would, and takes a quarter of the time. CUDA graphs also replay the text encoder.
    """

    def __init__(self) -> None:
        self.previous_precision: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network, dtype = getattr(pl_module, "model", None), MIXED_PRECISIONS.get(str(trainer.precision))
        if dtype is None or pl_module.device.type != "cuda" or not isinstance(network, DiffusionWrapper):
            return
        averages_weights = getattr(pl_module, "use_ema", False)  # into copies of the weights as they were
        if averages_weights or has_trainable_parameters(network):
            return
        network.enable_fast_inference(dtype)
        self.previous_precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        encoder = getattr(pl_module, "cond_stage_model", None)
        if isinstance(encoder, PromptEncoder) and not has_trainable_parameters(encoder):
            encoder.enable_fast_inference()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_precision()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_precision()

    def _restore_precision(self) -> None:
        if self.previous_precision is not None:
            torch.set_float32_matmul_precision(self.previous_precision)
            self.previous_precision = None


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar, counting the steps of the run instead of those of an epoch.

    The numbers of the last step are shown once a second only: reading them waits until the accelerator has finished
    that step, and meanwhile it cannot be given the next one.
    """

    SECONDS = 1.0
    _last_shown = -SECONDS

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.reset(total=trainer.max_steps if trainer.max_steps > 0 else None)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keep the bar: it counts the steps of the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        bar = self.train_progress_bar
        if trainer.global_step == trainer.max_steps or time.monotonic() - self._last_shown >= self.SECONDS:
            self._last_shown = time.monotonic()
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_train_end(self, *arguments: Any) -> None:
        """Close the bar, and write its last newline at once: log lines, which go to stderr, would come before it."""
        super().on_train_end(*arguments)
        sys.stdout.flush()

    def get_metrics(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, model)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}


class WholeEpochs(pl.Callback):
    """Let a run that resumes after the last batch of an epoch begin the next one.

    Lightning would add a batch to the old epoch. With gradient accumulation, that single batch would count as a whole
    step.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.completed >= trainer.num_training_batches:
            progress.reset_on_run()


class StopAfterStep(pl.Callback):
    """End training after the current step on Ctrl-C; a second Ctrl-C ends it at once. Every end leaves a checkpoint.

    Only the main thread of a process can handle Ctrl-C. In any other thread, training leaves it alone.
    """

    def __init__(self) -> None:
        self.previous_handler: Any = None
        self.last_step: int | None = None  # steps taken when the user pressed Ctrl-C

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(*_: object) -> None:
            self._restore_handler()
            self.last_step = trainer.global_step
            log.info("stopping after this step")

        self.previous_handler = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        has_finished = self.last_step is not None and trainer.global_step > self.last_step  # a step may take batches
        if trainer.strategy.reduce_boolean_decision(has_finished, all=False):  # in any process of the run
            trainer.should_stop, self.last_step = True, trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handler()
        # Save the steps since the last regular checkpoint, too.
        folder = Path(trainer.default_root_dir) / "checkpoints"
        has_checkpoint = trainer.strategy.broadcast(any(folder.glob(f"*-{trainer.global_step:08}.ckpt")))
        if trainer.checkpoint_callbacks and not has_checkpoint:
            trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        was_stopped = self.last_step is not None and trainer.global_step != trainer.max_steps
        if was_stopped and trainer.is_global_zero:  # the process that owns the log folder
            log.info("stopped after %d steps; continue with: python main.py --resume %s", trainer.global_step,
                     quote_command(trainer.default_root_dir))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _restore_handler(self) -> None:
        if self.previous_handler is not None:
            signal.signal(signal.SIGINT, self.previous_handler)
            self.previous_handler = None
