"""Plan a run from its options: what is checked before torch is imported, weights are loaded or files are written."""
from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from ldm.common.errors import UserError
from ldm.training.config import read_config
from ldm.training.early_checks import check_inputs
from ldm.training.log_folder import ResumePoint, find_resume_point, new_log_folder
from ldm.training.options import TrainingOptions
from ldm.training.resuming import check_same_run, config_of_run

log = logging.getLogger(__name__)

SECONDS_FORMAT = "%Y-%m-%dT%H-%M-%S"


@dataclass(frozen=True)
class RunPlan:
    """A run whose options are checked.

    Attributes:
        options: its options.
        config: its config.
        folder: the log folder; for a new run one that does not exist yet, or with a number after it if it does.
        now: date and time in the names of the session's files.
        resumed: the run that it continues, if any.
        differs: whether it differs from that run, and goes on nevertheless.
        is_finished: whether that run has taken all its steps, so that there is nothing to do.
    """

    options: TrainingOptions
    config: DictConfig
    folder: Path
    now: str
    resumed: ResumePoint | None = None
    differs: bool = False
    is_finished: bool = False


def plan_run(options: TrainingOptions) -> RunPlan:
    """Read the config of a run and compare it with that of the run that it continues, if any. Writes nothing.

    Raises:
        UserError: a file or a value cannot be used, or the run differs from the one that it is to continue.
    """
    start = datetime.datetime.now()
    now = start.strftime(f"{SECONDS_FORMAT}.%f")  # a run may be resumed within the second
    if options.resume:
        return _plan_to_resume(options, now)
    # Checked first, since it costs nothing. Without a config there is no name, and reading it says so.
    folder = new_log_folder(options, start.strftime(SECONDS_FORMAT)) if options.configs else Path()
    config = read_config(options)
    check_inputs(config)
    _check_super_category(config)
    return RunPlan(options, config, folder, now)


def _check_super_category(config: DictConfig) -> None:
    """Raise UserError if the run is to learn a concept and nothing says what kind of subject it is."""
    params = config.model.get("params") or {}
    words = params.get("super_category", "not a concept")
    if isinstance(words, str | None) and not (words or "").strip():
        from ldm.training.likely_kinds import ask_for_super_category  # loads a CLIP, which no other run needs

        raise ask_for_super_category(config)


def _plan_to_resume(options: TrainingOptions, now: str) -> RunPlan:
    resumed = find_resume_point(options.resume)
    own = config_of_run(resumed)
    if own is None and not options.configs:
        raise UserError(f"--resume {options.resume}: {resumed.folder} has no configs/*.yaml of its run; name its "
                        "config with --base")
    config = read_config(options, own)
    differs = False if own is None else check_same_run(options, resumed, own, config)
    max_steps = config.lightning.trainer.get("max_steps", -1)
    is_finished = 0 <= max_steps <= resumed.steps
    if is_finished:
        log.info("--resume %s: is finished, it has taken %d steps of %d; to continue, give more with --max_steps",
                 options.resume, resumed.steps, max_steps)
    else:
        check_inputs(config)
    return RunPlan(options, config, resumed.folder, now, resumed, differs, is_finished)
