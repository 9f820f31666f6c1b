"""Put the settings that an image's file holds back into the form."""
from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from ldm.common.errors import UserError
from ldm.inference.output_folder import read_metadata
from ldm.sampling.samplers import SAMPLERS
from ldm.sampling.spacings import TIMESTEP_SPACINGS
from ldm.web.generate_form import (
    LARGEST_SEED,
    LEAST_STRENGTH,
    MIDDLE_BIAS,
    MOST_BIAS,
    MOST_GUIDANCE,
    MOST_PIXELS,
    MOST_STEPS,
    MOST_TEMPERATURE,
    OWN_BIAS,
    OWN_SPACING,
    SET_BIAS,
    Values,
)


def stored_settings(path: str) -> dict[str, Any]:
    """Return how an image was made.

    Raises:
        UserError: the file does not say it.
    """
    try:
        metadata = read_metadata(path)
    except Exception:  # decoders raise almost anything, and users drop any file
        metadata = {}
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        raise UserError("this file holds no settings; choose an image that was made here or by scripts/txt2img.py")
    return metadata


def stored_sources(metadata: dict[str, Any]) -> list[str]:
    """Return the concept files that an image was made with."""
    return list(dict.fromkeys(str(entry.get("source")) for entry in _entries(metadata)))


def recall(metadata: dict[str, Any], current: Values, found: Sequence[str], own: Sequence[Any]) -> Values:
    """Return the values of the form that made an image. Files are not trusted: values out of range are left out.

    Args:
        metadata: what the image's file holds.
        current: the values of the form now.
        found: those of the concept files that are here.
        own: the concepts in them, as trained.
    """
    entry = next(iter(_entries(metadata)), {})
    bias = _number(entry.get("bias"), 0, MOST_BIAS, None)
    temperature = _number(entry.get("temperature"), 0, MOST_TEMPERATURE, 0)
    first = own[0] if own else None
    sampler, spacing = metadata.get("sampler"), metadata.get("timestep_spacing")
    return current._replace(
        prompt=metadata["prompt"], negative_prompt=str(metadata.get("negative_prompt") or ""), concepts=list(found),
        bias_mode=OWN_BIAS if bias is None or getattr(first, "bias", None) == bias else SET_BIAS,
        bias=MIDDLE_BIAS if bias is None else bias,
        temperature=0 if getattr(first, "temperature", None) == temperature else temperature,
        global_locking=metadata.get("global_locking") is True,
        sampler=sampler if sampler in SAMPLERS else current.sampler,
        spacing=spacing if spacing in TIMESTEP_SPACINGS else OWN_SPACING,
        steps=_number(metadata.get("num_inference_steps"), 1, MOST_STEPS, current.steps),
        guidance=_number(metadata.get("guidance_scale"), 0, MOST_GUIDANCE, current.guidance),
        height=_number(metadata.get("height"), 1, MOST_PIXELS, 0),
        width=_number(metadata.get("width"), 1, MOST_PIXELS, 0),
        seed=_number(metadata.get("seed"), 0, LARGEST_SEED, -1),
        strength=_number(metadata.get("strength"), LEAST_STRENGTH, 1, current.strength))


def _entries(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    stored = metadata.get("concepts")
    return [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []


def _number(value: Any, least: float, most: float, default: float | None) -> Any:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return value if is_number and least <= value <= most else default
