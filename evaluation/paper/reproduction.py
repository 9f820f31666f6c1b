"""Carry out studies: train, generate and measure what is missing, and report."""
from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evaluation.metrics.scoring import EVALUATION_CLIP
from evaluation.mini.fidelity import UNSEEN_BACKGROUNDS
from evaluation.paper.design import Method, Study, Variant
from evaluation.paper.evaluation_runs import EvaluationRuns
from evaluation.paper.evaluators import Evaluators
from evaluation.paper.examples import EvalTarget, ExampleConcept, concept_names, study_targets
from evaluation.paper.methods import ENCODER_BASE
from evaluation.paper.progress import Progress
from evaluation.paper.prompt_cases import EvalPlan
from evaluation.paper.report import Report
from evaluation.paper.results import Results
from evaluation.paper.settings import ReproduceOptions
from evaluation.paper.studies import StudyInputs, build_studies
from evaluation.paper.training_runs import TrainingRuns, available_cores
from evaluation.prompts.prompt_sets import MINI_PROMPTS, read_prompts, select_prompts
from evaluation.stats.intervals import Estimate, bootstrap_mean
from ldm.common.errors import UserError
from ldm.common.paths import PROJECT_ROOT, resolve_path
from ldm.data.mini.example_concepts import CONCEPTS
from ldm.inference.model_config import complete_settings, inference_defaults, read_model_config
from ldm.training.run_record import describe_machine
from ldm.util import pick_device

EXAMPLES_DIR = PROJECT_ROOT / "models" / "mini" / "examples"
OWN_KIND = "own kind of concepts beside another subject"  # name of a ceiling
MAX_JOBS = 4  # trainings at a time, unless a number is given
ACCELERATORS = {"": None, "cuda": "gpu"}  # what main.py calls the kind of a device, if not by the same name


class Reproduction:
    """The studies of one run of `reproduce.py`.

    Args:
        options: what to do.

    Attributes:
        training: trains concepts, or finds them.
        evaluation: generates and measures images, or finds the results.
        studies: all studies, including those that are not selected.
        examples: the concepts.

    Raises:
        UserError: if a file that the options name cannot be used.
    """

    def __init__(self, options: ReproduceOptions) -> None:
        model, folder = options.model, Path(options.outdir)
        self.options = options
        jobs = options.jobs or min(MAX_JOBS, available_cores())
        machine = describe_machine(pick_device(model.device))
        self.training = TrainingRuns(model.config, folder, model.checkpoint, _accelerator(model.device),
                                     options.train_steps, jobs,
                                     ", ".join(f"{name} {value}" for name, value in machine.items()))

        config = read_model_config(model.config)
        defaults = inference_defaults(config, model.checkpoint)
        plan = EvalPlan(select_prompts(read_prompts(options.prompts or MINI_PROMPTS), options.prompt_limit),
                        UNSEEN_BACKGROUNDS[:options.pair_backgrounds], options.seeds,
                        complete_settings(options.generation, config, defaults))
        clip = _evaluation_clip(options.evaluation_clip, defaults.evaluation_clip)
        evaluators = Evaluators(model.config, clip, model.checkpoint, model.device, options.batch_size,
                                model.precision)
        self.evaluation = EvaluationRuns(evaluators, self.training, plan, folder)

        self.studies = list(build_studies(_study_inputs(options, config)).values())
        examples = [ExampleConcept(name, EXAMPLES_DIR / name, kind) for name, (kind, _) in CONCEPTS.items()]
        self.examples = examples[:options.concepts]

    def run(self) -> Path:
        """Carry out the studies and print the claims; return the path of the summary.

        Studies that an earlier run completed are reported as well, even if they are not selected.
        """
        selected = [study for study in self.studies if study.key in self.options.studies]
        progress = self.measure_work(selected)
        print(f"{len(selected)} studies of {len(self.examples)} concepts: {progress.remaining()}", flush=True)
        report = Report(Path(self.options.outdir), self._report_settings())
        for study in self.studies:
            if study in selected:
                print(study.title, flush=True)
                self.complete(study, progress)
            elif self.is_complete(study):
                print(f"{study.title} (from an earlier run)", flush=True)
            else:
                continue
            if study.kind != "cost" and not report.ceilings:
                report.ceilings = self.estimate_ceilings()
            for claim in report.add(study, self.collect_results(study)):
                print(f"  {claim.outcome.upper()}: {claim.claim}: {claim.evidence}", flush=True)
        return report.folder / "summary.md"

    def complete(self, study: Study, progress: Progress) -> None:
        """Train, generate and measure what a study still lacks."""
        runs = [run for run in self._trainings([study]) if not self.training.is_finished(*run)]
        for method, example in runs:
            if self.training.is_outdated(method, example):
                print(f"  {method.name}, {example.name}: trained by other code or settings; training again")
        started = time.perf_counter()
        # Closing ends trainings that are running, whatever ends this loop.
        with closing(self.training.train(runs)) as finished:
            for method, example, _ in finished:
                ended = time.perf_counter()  # trainings run side by side: each counts for the time since the last one
                progress.report(f"trained {example.name} by {method.name}", "trainings", 1, ended - started)
                started = ended

        for variant, target in self._sets([study]):
            if self.evaluation.is_finished(variant, target):
                continue
            if self.evaluation.is_outdated(variant, target):
                print(f"  {variant.name}, {target.name}: made by other code or settings; generating again")
            started = time.perf_counter()
            self.evaluation.evaluate(variant, target)
            progress.report(f"generated {target.name}, {variant.name}", "images",
                            self.evaluation.plan.count_images(target), time.perf_counter() - started)

    def is_complete(self, study: Study) -> bool:
        """Return whether everything that a study needs exists. One of a single curve has nothing to compare."""
        is_trained = all(self.training.is_finished(*run) for run in self._trainings([study]))
        is_generated = all(self.evaluation.is_finished(*one) for one in self._sets([study]))
        return len(study.curves) > 1 and is_trained and is_generated

    def collect_results(self, study: Study) -> Results:
        """Read the results of a complete study."""
        images = {(variant, concept_names(target)): self.evaluation.read_records(variant, target)
                  for variant, target in self._sets([study])}
        costs = {method: [self.training.read_cost(method, example) for example in self.examples]
                 for method in study.methods}
        return Results(images, costs)

    def measure_work(self, studies: Iterable[Study]) -> Progress:
        """Return how many trainings and images some studies still lack."""
        chosen = list(studies)
        trainings = sum(not self.training.is_finished(*run) for run in self._trainings(chosen))
        images = sum(self.evaluation.plan.count_images(target) for variant, target in self._sets(chosen)
                     if not self.evaluation.is_finished(variant, target))
        return Progress(trainings, images)

    def estimate_ceilings(self) -> dict[str, Estimate]:
        """Return how often attributes and kinds are recognized on real scenes, in percent."""
        evaluators = self.evaluation.evaluators
        hits = evaluators.fidelity.measure_ceilings()
        hits[OWN_KIND] = [hit for example in self.examples
                          for hit in evaluators.own_kinds.measure_ceiling(example.name)]
        return {name: bootstrap_mean(values) for name, values in hits.items()}

    def _trainings(self, studies: Sequence[Study]) -> list[tuple[Method, ExampleConcept]]:
        """Return the trainings of some studies, each once."""
        methods = dict.fromkeys(method for study in studies for method in study.methods)
        return [(method, example) for method in methods for example in self.examples]

    def _sets(self, studies: Sequence[Study]) -> list[tuple[Variant, EvalTarget]]:
        """Return the sets of images of some studies, each once."""
        return list(dict.fromkeys((variant, target) for study in studies for variant in study.variants
                                  for target in study_targets(study, self.examples)))

    def _report_settings(self) -> dict[str, Any]:
        """Return the settings that all results in the report share, whichever studies are selected."""
        settings = asdict(replace(self.options, generation=self.evaluation.plan.settings))
        del settings["studies"]
        settings["baselines"] = [method.name for method in self.options.baselines]
        model, generation = settings.pop("model"), settings.pop("generation")
        flat = {**model, **settings, **generation, "machine": self.training.machine}
        return {name: value for name, value in flat.items() if value not in (None, False)}


def _accelerator(device: str | None) -> str | None:
    """Return what main.py calls the kind of a device."""
    kind = (device or "").partition(":")[0]
    return ACCELERATORS.get(kind, kind)


def _evaluation_clip(given: str | None, default: str | None) -> str:
    """Return the folder or name of the CLIP that measures: the given one, the model's, or the bundled one."""
    if given is not None:
        return given
    folder = resolve_path(default or EVALUATION_CLIP)
    if not folder.is_dir():
        raise UserError(f"--evaluation_clip {folder}: there are no weights; train it with "
                        "configs/mini/evaluation_clip.yaml and scripts/mini/export.py")
    return str(folder)


def _study_inputs(options: ReproduceOptions, config: DictConfig) -> StudyInputs:
    return StudyInputs(options.biases, options.comparison_biases, options.pair_biases, options.baselines,
                       OmegaConf.select(config, "model.params.projection", default="full"),
                       OmegaConf.select(config, "model.params.used_layers") is not None,
                       options.model.checkpoint is None
                       and OmegaConf.select(config, "model.params.ckpt_path") == ENCODER_BASE)
