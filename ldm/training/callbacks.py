"""What happens beside the training steps: configs and pictures in the log folder, progress, stopping cleanly."""
from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_only

from ldm.common.errors import MemoryShortage
from ldm.common.files import write_atomically
from ldm.common.paths import quote_command
from ldm.data.images import from_tensor, save_grid
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.training.run_record import describe_machine
from ldm.util import has_trainable_parameters

log = logging.getLogger(__name__)


class SetupCallback(pl.Callback):
    """Writes the configs of a run, and what machine it is on, into its log folder when training starts."""

    def __init__(self, now: str, logdir: str | Path, config: DictConfig, lightning_config: DictConfig) -> None:
        self.folder, self.now = Path(logdir) / "configs", now
        self.configs = {f"{now}-project.yaml": config,
                        f"{now}-lightning.yaml": OmegaConf.create({"lightning": lightning_config})}

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("logs in %s", self.folder.parent)
        for name, config in self.configs.items():
            write_atomically(self.folder / name, lambda aside, config=config: OmegaConf.save(config, aside))
        machine = json.dumps(describe_machine(pl_module.device))
        write_atomically(self.folder / f"{self.now}-machine.json", lambda aside: aside.write_text(machine + "\n"))


class ImageLogger(pl.Callback):
    """Every `batch_frequency` steps: the model's `log_images` as grids in `<logdir>/images/<split>/` and TensorBoard.

    Args:
        batch_frequency: training steps between two grids.
        max_images: how many pictures of a batch are shown.
        log_images_kwargs: arguments for the model's `log_images`.
        log_first_step: also show the model before the first step.
    """

    def __init__(self, batch_frequency: int, max_images: int = 8, log_images_kwargs: dict[str, Any] | None = None,
                 log_first_step: bool = False) -> None:
        self.batch_frequency, self.max_images = batch_frequency, max_images
        self.log_images_kwargs = log_images_kwargs or {}
        self.log_first_step = log_first_step
        self.last_step = -1

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        step = trainer.global_step
        due = step % self.batch_frequency == 0 or (self.log_first_step and step == 1)
        if due and step != self.last_step and hasattr(pl_module, "log_images"):
            self.last_step = step
            self.show(trainer, pl_module, batch, step)

    def show(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, step: int) -> None:
        """Writes one grid per entry of `log_images`; pictures are (N, 3, H, W) in [-1, 1]."""
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad():
                shown = pl_module.log_images(batch, N=self.max_images, **self.log_images_kwargs)
        except MemoryShortage as error:
            log.warning("no pictures at step %d: %s", step, error)
            shown = {}
        pl_module.train(was_training)
        for name, images in shown.items():
            images = images[: self.max_images].detach().float().cpu().clamp(-1, 1)
            path = Path(trainer.default_root_dir) / "images" / "train" / f"{name}_gs-{step:06}.png"
            save_grid([from_tensor(image) for image in images], path, columns=min(4, len(images)))
            for logger in trainer.loggers:
                if hasattr(logger.experiment, "add_images"):
                    logger.experiment.add_images(f"train/{name}", (images + 1) / 2, step)


class AccelerateFrozenUNet(pl.Callback):
    """On a CUDA device with mixed precision, a U-Net that is not trained runs in 16 bits and by CUDA graphs.

    What stays in 32 bits, such as the text encoder, which is called by graphs, too, may then multiply in TF32: that
    moves gates by a hundredth of what bfloat16 would, and takes a quarter of the time.
    """

    DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network, dtype = getattr(pl_module, "model", None), self.DTYPES.get(str(trainer.precision))
        if dtype is None or pl_module.device.type != "cuda" or not isinstance(network, DiffusionWrapper):
            return
        averaged = getattr(pl_module, "use_ema", False)  # into copies of the weights as they were
        if averaged or has_trainable_parameters(network):
            return
        network.enable_fast_inference(dtype)
        torch.set_float32_matmul_precision("high")
        encoder = getattr(pl_module, "cond_stage_model", None)
        if isinstance(encoder, PromptEncoder) and not has_trainable_parameters(encoder):
            encoder.enable_fast_inference()


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar, counting the steps of the run rather than those of an epoch.

    Numbers of the last step are shown once a second: to read them is to wait until an accelerator has done that step,
    when it could have been given the next one.
    """

    SECONDS = 1.0
    _shown = -SECONDS

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.reset(total=trainer.max_steps if trainer.max_steps > 0 else None)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The bar goes on: it counts the steps of the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        bar = self.train_progress_bar
        if trainer.global_step == trainer.max_steps or time.monotonic() - self._shown >= self.SECONDS:
            self._shown = time.monotonic()
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(trainer.global_step - bar.n)

    def get_metrics(self, trainer: pl.Trainer, model: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, model)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}


class WholeEpochs(pl.Callback):
    """A run that goes on after the last batch of an epoch begins the next; Lightning would add a batch to the old one.

    Where gradients add up over several batches, that one would count as a whole step.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.completed >= trainer.num_training_batches:
            progress.reset_on_run()


class StopAfterStep(pl.Callback):
    """Ctrl-C ends training after the step at hand; a second one ends it at once. Every end leaves a checkpoint."""

    def __init__(self) -> None:
        self.previous: Any = None
        self.last_step: int | None = None  # that had been taken when the user asked

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def stop(*_: object) -> None:
            signal.signal(signal.SIGINT, self.previous)
            self.last_step = trainer.global_step
            log.info("stopping after this step")

        self.previous = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        over = self.last_step is not None and trainer.global_step > self.last_step  # a step may take several batches
        if trainer.strategy.reduce_boolean_decision(over, all=False):  # of any process of the run
            trainer.should_stop, self.last_step = True, trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGINT, self.previous)
        folder = Path(trainer.default_root_dir) / "checkpoints"
        regular = trainer.strategy.broadcast(any(folder.glob(f"*-{trainer.global_step:08}.ckpt")))
        if trainer.checkpoint_callbacks and not regular:  # the steps since the last regular one count as well
            trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        stopped = self.last_step is not None and trainer.global_step != trainer.max_steps
        if stopped and trainer.is_global_zero:  # whose log folder it is
            log.info("stopped after %d steps; go on with: python main.py --resume %s", trainer.global_step,
                     quote_command(trainer.default_root_dir))
