"""Tell the photos of DreamBooth's subject from its regularization images, which public configs describe alike."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

PHOTOS = "ldm.data.personalized.PersonalizedBase"


def mark_subject(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the params of a data module with `reg: false` for the training set if it has regularization images.

    The configs of XavierXiao/Dreambooth-Stable-Diffusion have a section `reg` beside `train`. In that repository every
    `PersonalizedBase` is DreamBooth's. Here, without `reg: false`, it is Textual Inversion's, whose captions lack the
    identifier. Other params are returned as they are.
    """
    train = params.get("train")
    if not params.get("reg") or not isinstance(train, Mapping) or train.get("target") != PHOTOS:
        return params
    if "reg" in (train.get("params") or {}):
        return params
    marked = copy.deepcopy(params)
    if not marked["train"].get("params"):
        marked["train"]["params"] = {}
    marked["train"]["params"]["reg"] = False
    return marked
