"""Options of `clip_eval.py` and `pareto.py`, as plain values. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass

from evaluation.metrics.settings import ReferenceSettings
from evaluation.prompts.prompt_sets import MINI_PROMPTS
from ldm.inference.settings import GenerationSettings, ModelSettings

LOCKS = ("local", "global")


@dataclass(frozen=True)
class SampleSettings:
    """The images to generate of a concept.

    Attributes:
        prompts: file with one prompt per line.
        seed: seed of the first image of each prompt; each further image adds 1.
        num_seeds: images per prompt.
        batch_size: images generated at a time.
    """

    prompts: str = str(MINI_PROMPTS)
    seed: int = 1
    num_seeds: int = 4
    batch_size: int = 32

    @property
    def seeds(self) -> range:
        """The seeds of each prompt."""
        return range(self.seed, self.seed + self.num_seeds)


@dataclass(frozen=True)
class FolderSettings:
    """Images that exist already.

    Attributes:
        images: their folder.
        captions: CSV file with their prompts; None: `prompt`, or the images' own metadata.
        prompt: the prompt of all of them.
    """

    images: str
    captions: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class ClipEvalOptions:
    """Options of `clip_eval.py`.

    Attributes:
        references: what images are compared with.
        model: the base model.
        outdir: folder to write to.
        folder: the images; None: images of `concepts` are generated.
        concepts: concept files that hold one concept together.
        samples: which images to generate.
        settings: how to generate them.
        save: whether to write the generated images.
    """

    references: ReferenceSettings
    model: ModelSettings
    outdir: str
    folder: FolderSettings | None = None
    concepts: tuple[str, ...] = ()
    samples: SampleSettings = SampleSettings()
    settings: GenerationSettings = GenerationSettings()
    save: bool = False


@dataclass(frozen=True)
class ParetoOptions:
    """Options of `pareto.py`.

    Attributes:
        concepts: concept files, each of one concept and all of the same subject.
        biases: the points of each curve, in rising order.
        references: what images are compared with.
        model: the base model.
        outdir: folder to write to.
        labels: a name for each file; None: the names of the files.
        locks: some of `LOCKS`; each gives a curve.
        temperatures, guidance_scales: values to sweep besides the default one; none: no such sweep.
        samples: which images to generate at each point.
        settings: how to generate them, apart from what is swept.
    """

    concepts: tuple[str, ...]
    biases: tuple[float, ...]
    references: ReferenceSettings
    model: ModelSettings
    outdir: str
    labels: tuple[str, ...] | None = None
    locks: tuple[str, ...] = LOCKS
    temperatures: tuple[float, ...] = ()
    guidance_scales: tuple[float, ...] = ()
    samples: SampleSettings = SampleSettings()
    settings: GenerationSettings = GenerationSettings()
