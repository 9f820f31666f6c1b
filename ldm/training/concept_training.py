"""Learn concepts from Python, in a script or a notebook, from any working directory."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.common.errors import UserError
from ldm.concepts.finetuned_concept import AnyConcept
from ldm.concepts.storage import load_concepts
from ldm.training.options import TrainingOptions
from ldm.training.run import train

Words = str | Sequence[str]
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class TrainedConcept:
    """The result of `train_concept`.

    Attributes:
        paths: the concept files, one for each concept.
        concepts: their contents, as values.
        logdir: the log folder, with previews, masks and a checkpoint.
        steps: training steps taken.
    """

    paths: tuple[Path, ...]
    concepts: tuple[AnyConcept, ...]
    logdir: Path
    steps: int

    @property
    def path(self) -> Path:
        """The first concept's file."""
        return self.paths[0]

    @property
    def concept(self) -> AnyConcept:
        """The first concept."""
        return self.concepts[0]


def train_concept(photos: Paths, super_category: Words, placeholder: Words = "<my-concept>",
                  config: Paths = "configs/perfusion.yaml", max_steps: int | None = None, logdir: str | Path = "logs",
                  seed: int | None = None, checkpoint: str | Path | None = None, masks: Paths | None = None,
                  accelerator: str | None = None, name: str = "", overrides: Sequence[str] = ()) -> TrainedConcept:
    """Learn a concept from photos, as `python main.py` does.

        trained = train_concept("photos/", "teddy bear", placeholder="<my-teddy>")
        pipe.load_concepts(trained.path)

    The bundled config learns on the bundled mini model, on a CPU in a minute or two. Other base models have configs of
    their own, such as configs/perfusion-sd-v1.yaml. A config of configs/baselines after one of these learns by another
    method: `config=["configs/perfusion.yaml", "configs/baselines/dreambooth.yaml"]`.

    Args:
        photos: folder of 1 to 20 photos of the subject. Several folders are several concepts, which one run learns.
        super_category: what kind of subject it is, such as "teddy bear". Several concepts: one for all, or one each.
        placeholder: the concept's own word in prompts. Several concepts: one for each.
        config: YAML file, or several, of which later ones override earlier ones. A relative path may count from the
            project's root.
        max_steps: training steps; None: those of the config.
        logdir: folder in which the run gets a log folder.
        seed: the random seed; None: the config's.
        checkpoint: the base model, a .ckpt, .safetensors or diffusers folder; None: the config's.
        masks: folder of masks (one image per photo, of the same name, white where the subject is), or "none". None: the
            subject is segmented automatically.
        accelerator: "cpu", "gpu" or "mps"; None: the best there is.
        name: name of the log folder, after the date; "" uses the name of the config.
        overrides: "key=value" pairs that override the config, such as "data.params.batch_size=4".

    Raises:
        UserError: photos, config or arguments cannot be used, memory runs out, or training diverges.
    """
    options = TrainingOptions(
        configs=_as_tuple(config), overrides=tuple(overrides), name=name, logdir=str(logdir), seed=seed,
        data_root=_as_tuple(photos), super_category=_as_tuple(super_category), placeholder=_as_tuple(placeholder),
        masks=None if masks is None else _as_tuple(masks), checkpoint=None if checkpoint is None else str(checkpoint),
        accelerator=accelerator, max_steps=max_steps)
    run = train(options)
    if run is None or not run.concepts:
        raise UserError(f"config {', '.join(options.configs)}: learns no concept; choose one such as "
                        "configs/perfusion.yaml")
    concepts = tuple(concept for path in run.concepts for concept in load_concepts(path))
    return TrainedConcept(run.concepts, concepts, run.logdir, run.steps)


def _as_tuple(values: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(values),) if isinstance(values, str | Path) else tuple(str(value) for value in values)
