"""The options of `reproduce.py`, as plain values. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass, replace

from evaluation.paper.design import Method
from evaluation.paper.methods import BASELINES
from evaluation.paper.studies import STUDIES
from ldm.inference.settings import GenerationSettings, ModelSettings

BIASES, PAIR_BIASES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.1, 1.3), (0.5,)
COMPARISON_BIASES = (0.3, 0.75, 1.1)
QUICK_LIMITS = {"concepts": 2, "prompt_limit": 4, "seeds": 2, "train_steps": 50, "pair_backgrounds": 2}


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `reproduce.py`.

    Attributes:
        model: Perfusion's training config, and the base model's weights.
        outdir: folder to write to, and to read earlier results from.
        studies: keys of `STUDIES`.
        baselines: methods to compare Perfusion with.
        concepts: number of bundled examples.
        prompts: file with one prompt per line; None: the bundled list for the mini model.
        prompt_limit: number of prompts.
        pair_backgrounds: number of backgrounds for two concepts in one image.
        seeds: number of images per prompt.
        train_steps: steps of each training; None: as in the config.
        biases: biases of Perfusion's curve, in rising order.
        comparison_biases: biases of the curves that it is compared with; some of `biases`.
        pair_biases: biases for two concepts in one image.
        generation: how to generate; None in it means the model's default.
        batch_size: images generated at a time.
        evaluation_clip: folder or name of the CLIP that measures; None: the model's.
        jobs: trainings at a time; None: one for each core, at most 4.
    """

    model: ModelSettings
    outdir: str
    studies: tuple[str, ...] = tuple(STUDIES)
    baselines: tuple[Method, ...] = BASELINES
    concepts: int = 8
    prompts: str | None = None
    prompt_limit: int = 12
    pair_backgrounds: int = 4
    seeds: int = 8
    train_steps: int | None = None
    biases: tuple[float, ...] = BIASES
    comparison_biases: tuple[float, ...] = COMPARISON_BIASES
    pair_biases: tuple[float, ...] = PAIR_BIASES
    generation: GenerationSettings = GenerationSettings(num_inference_steps=10, sampler="dpm")
    batch_size: int = 32
    evaluation_clip: str | None = None
    jobs: int | None = None

    def quick(self) -> ReproduceOptions:
        """Return a copy that takes minutes: less of everything, and never more than these options."""
        limited = {}
        for name, limit in QUICK_LIMITS.items():
            value = getattr(self, name)
            limited[name] = limit if value is None else min(limit, value)
        # The default biases of the other curves are among every second one.
        return replace(self, biases=self.biases[::2], **limited)
