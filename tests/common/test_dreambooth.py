"""Telling DreamBooth's photos from its regularization images."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.common.dreambooth import PHOTOS, mark_subject
from ldm.util import instantiate_from_config

PAIR = {"batch_size": 1, "train": {"target": PHOTOS, "params": {"size": "${side}"}},
        "reg": {"target": PHOTOS, "params": {"reg": True}}}


class DataModule(SimpleNamespace):
    """A data module of a user."""


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
def test_a_training_set_beside_regularization_images_is_marked(make: Any) -> None:
    given = make(PAIR)
    marked = mark_subject(given)
    assert marked["train"]["params"]["reg"] is False and marked["reg"] == given["reg"]
    assert "reg" not in given["train"]["params"]
    assert mark_subject(make({**PAIR, "train": {"target": PHOTOS}}))["train"]["params"] == {"reg": False}


@pytest.mark.parametrize("params", [
    {}, {"train": PAIR["train"]}, {**PAIR, "reg": None}, {**PAIR, "train": {"target": "mine.Photos"}},
    {**PAIR, "train": {"target": PHOTOS, "params": {"reg": None}}}])
def test_other_params_stay_as_they_are(params: dict[str, Any]) -> None:
    assert mark_subject(params) is params


def test_data_modules_of_users_get_it() -> None:
    config = OmegaConf.create({"side": 8, "data": {"target": "test_dreambooth.DataModule", "params": PAIR}})
    module = instantiate_from_config(config.data)
    assert module.train.params.reg is False and module.train.params.size == 8  # references still resolve
