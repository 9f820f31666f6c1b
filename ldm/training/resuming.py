"""Compare a run that is resumed with the run that it goes on from. Imports no torch."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.common.errors import UserError
from ldm.training.config import FLAGS, OPTION_KEYS, read_config
from ldm.training.input_files import describe_changes, describe_inputs, newest_inputs, restore_paths
from ldm.training.log_folder import ResumePoint
from ldm.training.options import TrainingOptions

log = logging.getLogger(__name__)

# What a session may change: how long it trains, on which machine, and what it shows and keeps.
FREE = ("lightning.", "inference.", "data.params.num_workers", "data.params.validation.", "data.params.test.",
        "data.params.wrap", "model.params.unet_config.params.use_checkpoint", "model.params.use_checkpoint")
NOT_FREE = ("lightning.seed", *(f"lightning.trainer.{name}" for name in (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches",
    "overfit_batches")))
NAMES = {"lightning.seed": "--seed"} | {
    keys[0]: FLAGS.get(option, f"--{option}") for option, keys in OPTION_KEYS.items()}
METHOD, PARAMS = "model.target", "model.params."
MOST_NAMED = 6  # differences in one message
LONGEST_VALUE = 70  # characters of a value in a message
Plain = Mapping[str, Any]


def config_of_run(resumed: ResumePoint) -> DictConfig | None:
    """Return the run's own config, with relative paths as they were there; None if its folder has no configs."""
    if not resumed.configs:
        return None
    own = read_config(TrainingOptions(configs=resumed.configs))
    return restore_paths(own, newest_inputs(resumed.folder).get("working_directory"))


def check_same_run(options: TrainingOptions, resumed: ResumePoint, own: DictConfig, config: DictConfig) -> bool:
    """Compare the config of a resumed session with the run's own, and the files that they name with those of then.

    What may differ, such as the number of steps, is logged.

    Args:
        options: the options of the session.
        resumed: the run that it continues.
        own: the run's config, from `config_of_run`.
        config: the session's config.

    Returns:
        Whether the session differs and goes on nevertheless.

    Raises:
        UserError: it differs, and `resume_anyway` is not set.
    """
    ignored = [flag for flag, value, default in (
        ("--logdir", options.logdir, TrainingOptions.logdir), ("--name", options.name, ""),
        ("--postfix", options.postfix, "")) if value != default]
    if ignored:
        log.warning("%s: not used with --resume, which goes on in %s", " and ".join(ignored), resumed.folder)

    free, differences = _compare(own, config, newest_inputs(resumed.folder).get("files", {}))
    if free:
        log.info("changed since the run began: %s", _listed(free))
    if not differences:
        return False
    if options.resume_anyway:
        log.warning("--resume_anyway: goes on although this differs from the run: %s; the run as it was is kept in "
                    "its folder earlier/", _listed(differences))
        return True
    base = " (its own config is used without --base)" if options.configs else ""
    raise UserError(f"--resume {options.resume}: differs from the run that it is to continue: {_listed(differences)}; "
                    f"leave that out{base}, train anew without --resume, or go on nevertheless with --resume_anyway")


def _compare(own: DictConfig, config: DictConfig, files_then: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the differences that may be, and those that may not, each as a text."""
    before, after = _leaves(own, resolve=True), _leaves(config, resolve=True)
    written_before, written_after = _leaves(own, resolve=False), _leaves(config, resolve=False)
    files_now = describe_inputs(config)["files"]
    free, differences = [], []
    for key in sorted({*before, *after}, key=lambda key: (key not in NAMES, key)):
        is_reference = "${" in str(written_after.get(key)) and written_after.get(key) == written_before.get(key)
        if before.get(key) == after.get(key) or is_reference or _same_content(files_then, files_now, key):
            continue
        text = f"{NAMES.get(key, key)} {_shown(after, key)} (the run: {_shown(before, key)})"
        (free if _is_free(key) else differences).append(text)
    # The same path may hold other photos, masks or weights by now.
    for key, then in files_then.items():
        if before.get(key) == after.get(key):
            differences += [f"{NAMES.get(key, key)} {_shown(after, key)}: {changes}"
                            for changes in _changed_files(then, files_now.get(key, []))]
    return free, differences if before.get(METHOD) == after.get(METHOD) else _without_params(differences)


def _without_params(differences: Sequence[str]) -> list[str]:
    """Leave out the params of another model: its name says it all."""
    return [text for text in differences if not text.startswith(PARAMS)]


def _changed_files(then: Sequence[Any], now: Sequence[Any]) -> list[str]:
    """Say what changed in each recorded folder that is still there; a missing one is another mistake."""
    pairs = zip(then, now, strict=False)
    return [changes for before, after in pairs if before and after and (changes := describe_changes(before, after))]


def _same_content(then: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Return whether the files under another path are those of the run."""
    before, after = then.get(key), now.get(key)
    return bool(before) and before is not None and None not in before and before == after


def _is_free(key: str) -> bool:
    return key.startswith(FREE) and not key.startswith(NOT_FREE)


def _leaves(config: DictConfig, resolve: bool) -> dict[str, Any]:
    """Return the values of a config by their dotted keys. A list is one value; one of one value is that value."""
    found: dict[str, Any] = {}

    def collect(section: Any, path: str) -> None:
        if isinstance(section, dict) and section:
            for name, value in section.items():
                collect(value, f"{path}.{name}" if path else str(name))
        else:
            found[path] = section[0] if isinstance(section, list) and len(section) == 1 else section

    collect(OmegaConf.to_container(config, resolve=resolve), "")
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    value = values[key]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - MOST_NAMED
    return "; ".join(texts[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
