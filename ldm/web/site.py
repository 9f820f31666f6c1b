"""What all parts of the page share: the base model, the runs, and the pipeline, which generates for one at a time."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ldm.inference.model_config import read_model_config
from ldm.inference.pipeline import PerfusionPipeline
from ldm.inference.settings import ModelSettings
from ldm.util import pick_device
from ldm.web.photo_review import PhotoReview
from ldm.web.run_queue import RunQueue


@dataclass(frozen=True)
class SiteSettings:
    """What the command that starts the page chooses.

    Attributes:
        runs: folder of all runs.
        base: training config.
        model: the base model for generation; its checkpoint is that of training, too.
    """

    runs: Path
    base: str
    model: ModelSettings


class Site:
    """The state of the server: it can be thrown away at any time, since all runs are in folders.

    Args:
        settings: see `SiteSettings`.

    Raises:
        UserError: a config or the device cannot be used.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self.training_config: DictConfig = read_model_config(settings.base)
        self.model_config: DictConfig = read_model_config(settings.model.config)
        self.device = pick_device(settings.model.device)
        self.queue = RunQueue(settings.runs)
        self.photos = PhotoReview(self.training_config, self.device)
        self._pipeline: PerfusionPipeline | None = None
        self._lock = threading.Lock()

    @contextmanager
    def pipeline(self) -> Iterator[PerfusionPipeline]:
        """Lend the pipeline to one caller at a time. The first call loads the base model."""
        with self._lock:
            if self._pipeline is None:
                model = self.settings.model
                self._pipeline = PerfusionPipeline.from_config(self.model_config, model.checkpoint, self.device,
                                                               model.precision, model.vae, model.text_encoder)
            yield self._pipeline

    def warm_up(self) -> None:
        """Load the base model in a thread of its own, so that the first image does not wait for it."""
        threading.Thread(target=self._load, daemon=True, name="load model").start()

    def _load(self) -> None:
        with self.pipeline():
            pass
