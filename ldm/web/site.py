"""What all parts of the page share: the base model, the runs, and the pipeline, which generates for one at a time.

torch is imported when it is first needed, or by `warm_up`, so that the page itself is there after few seconds.
"""
from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ldm.common.errors import UserError
from ldm.inference.model_config import read_model_config
from ldm.inference.settings import ModelSettings
from ldm.web.draft import Draft
from ldm.web.model_imports import import_models
from ldm.web.run_queue import RunQueue

if TYPE_CHECKING:
    import torch

    from ldm.inference.pipeline import PerfusionPipeline
    from ldm.web.photo_review import PhotoReview

log = logging.getLogger(__name__)


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
        UserError: a config cannot be used.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self.training_config: DictConfig = read_model_config(settings.base)
        self.model_config: DictConfig = read_model_config(settings.model.config)
        self.queue = RunQueue(settings.runs)
        self.draft = Draft(self.queue)
        self._pipeline: PerfusionPipeline | None = None
        self._lock = threading.Lock()

    @cached_property
    def device(self) -> torch.device:
        """Where the models run."""
        import_models()
        from ldm.util import pick_device

        return pick_device(self.settings.model.device)

    @cached_property
    def photos(self) -> PhotoReview:
        """What shows the photos of a run as training will see them."""
        import_models()
        from ldm.web.photo_review import PhotoReview

        return PhotoReview(self.training_config, self.device)

    @contextmanager
    def pipeline(self) -> Iterator[PerfusionPipeline]:
        """Lend the pipeline to one caller at a time. The first call loads the base model."""
        with self._lock:
            if self._pipeline is None:
                self._pipeline = self.load_pipeline()
            yield self._pipeline

    def load_pipeline(self) -> PerfusionPipeline:
        """Load the base model anew, as a pipeline of its own.

        Raises:
            UserError: the weights or the device cannot be used.
        """
        import_models()
        from ldm.inference.pipeline import PerfusionPipeline

        model = self.settings.model
        return PerfusionPipeline.from_config(self.model_config, model.checkpoint, self.device, model.precision,
                                             model.vae, model.text_encoder)

    def warm_up(self) -> None:
        """Load the base model in a thread of its own, so that the first image does not wait for it."""
        threading.Thread(target=self._load, daemon=True, name="load model").start()

    def _load(self) -> None:
        try:
            with self.pipeline():
                pass
        except UserError as error:  # the first image says so, too
            log.error("error: %s", error)
