"""The options of `evaluation/base_model.py`, as plain values. Imports no torch."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.common.paths import PROJECT_ROOT
from ldm.inference.settings import ModelSettings

MINI = PROJECT_ROOT / "models" / "mini"
MEASUREMENTS = ("autoencoder", "clip", "segmenter", "one_subject", "two_subjects", "speed", "size")
CAPTIONS = 64  # among which an image's own caption has to be found


@dataclass(frozen=True)
class BaseModelSettings:
    """Which parts of the base model are measured, and how thoroughly.

    Attributes:
        model: the base model.
        outdir: folder for tables and images.
        measurements: names in `MEASUREMENTS`.
        prompts: number of prompts with one subject, and of prompts with two.
        scenes: number of composed scenes for every other measurement and for ceilings.
        num_inference_steps: DDIM steps.
        guidance_scale: guidance scale; 1 means no guidance.
        batch_size: images generated at a time.
        seed: seed of prompts, images and scenes.
        autoencoder: weights of a first stage to measure instead of the base model's own.
        clip: folder or name of the CLIP to measure.
        segmenter: folder of the segmenter to measure.
        evaluation_clip: folder or name of the CLIP that recognizes subjects in images.
        weights: folder whose size is measured.
    """

    model: ModelSettings
    outdir: Path
    measurements: tuple[str, ...] = MEASUREMENTS
    prompts: int = 200
    scenes: int = 512
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    batch_size: int = 40
    seed: int = 1
    autoencoder: str | None = None
    clip: Path = MINI / "clip"
    segmenter: Path = MINI / "segmenter"
    evaluation_clip: Path = MINI / "evaluation_clip"
    weights: Path = MINI

    def record(self) -> dict[str, Any]:
        """Return the settings as values that JSON has."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
