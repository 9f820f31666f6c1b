"""Choose between the two sets of a network's weights in public checkpoints: the last ones and their moving averages."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

AVERAGES = "model_ema."
STATE = (f"{AVERAGES}decay", f"{AVERAGES}num_updates")
NETWORK = "model."


def moving_averages(tensors: Mapping[str, Tensor], required: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the moving averages in a checkpoint under the names of their weights.

    Args:
        tensors: the checkpoint's tensors.
        required: names of a model's weights; a file may hold the averages without the weights themselves.
    """
    averages: dict[str, Tensor] = {}
    for key in dict.fromkeys([*tensors, *required]):
        average = tensors.get(_average_name(key))
        if average is not None and (key not in tensors or average.shape == tensors[key].shape):
            averages[key] = average
    return averages


def complete_averages(path: str | Path, tensors: Mapping[str, Tensor], required: Iterable[str]) -> dict[str, Tensor]:
    """Return what `moving_averages` does, or none, with a warning, if some of the network's weights have no average.

    A file that was cut, merged or converted may hold only some. With them, a model would be a mixture of two.
    """
    required = list(required)
    averages = moving_averages(tensors, required)
    network = {key for key in [*tensors, *required] if key.startswith(NETWORK) and key in tensors}
    without = sorted(network - averages.keys())
    if averages and without:
        log.warning("warning: %s: only %d of %d weights have moving averages, so these are not used; download the file "
                    "again if it should have all", path, len(network) - len(without), len(network))
        return {}
    return averages


def averages_alone(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file holds averages of a network and not its weights."""
    has_averages = any(key.startswith(AVERAGES) and key not in STATE for key in tensors)
    return has_averages and not any(key.startswith(NETWORK) for key in tensors)


def _average_name(key: str) -> str:
    """Return the name of a weight's average, as `ldm.modules.ema.LitEma` forms it."""
    return AVERAGES + key.removeprefix(NETWORK).replace(".", "")
