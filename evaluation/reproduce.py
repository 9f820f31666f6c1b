"""Repeats the paper's comparisons on the bundled model, and says of each of its statements whether it is seen here.

    python evaluation/reproduce.py --quick              # a first look, about 6 minutes on two cores
    python evaluation/reproduce.py                      # about an hour and a half on two cores
    python evaluation/reproduce.py --only baselines two_concepts --concepts 10

Concepts are taught by main.py, pictures drawn and graded set by set. Whatever is there already in OUTDIR, made in the
same way, is used again: an interrupted run goes on where it was. For each study a table and a figure are written, for
all of them summary.md and results.json, which also have what --only leaves out where all of it is there.
"""
from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli.generation import add_model_flags  # noqa: E402
from ldm.cli.parser import Parser, number, whole  # noqa: E402
from ldm.common.errors import UserError, one_line_errors  # noqa: E402
from ldm.common.paths import check_folder
from ldm.models.diffusion.samplers import SAMPLERS  # noqa: E402

if TYPE_CHECKING:
    from evaluation.paper.claims import Found
    from evaluation.paper.measurements import Grading, Subject
    from evaluation.paper.studies import Setting, Study
    from evaluation.paper.training_runs import Example, School
    from evaluation.stats.intervals import Estimate

MINI = Path(__file__).resolve().parents[1] / "models" / "mini"
STUDIES = ("baselines", "locking", "projection", "values", "masks", "one_photo", "training_bias", "temperature",
           "two_concepts", "cost")
BIASES, PAIR_BIASES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.1, 1.3), (0.5,)
OTHER_BIASES = (0.3, 0.75, 1.1)
QUICK = {"concepts": 2, "prompts_limit": 4, "seeds": 2, "train_steps": 50, "pair_places": 2}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY",
                        help=f"what to compare (default: all of {', '.join(STUDIES)})")
    parser.add_argument("--quick", action="store_true",
                        help="fewer of everything, and trainings of a quarter of the length: a first look")
    much = parser.add_argument_group("how much")
    much.add_argument("--concepts", type=whole(2, 11), default=8, metavar="N",
                      help="so many of the bundled examples (default: %(default)s)")
    much.add_argument("--prompts", metavar="FILE", help="one a line, with {} for the concept (default: "
                      "evaluation/prompts/mini.txt)")
    much.add_argument("--prompts-limit", "--prompts_limit", type=whole(1), default=12, metavar="N",
                      help="so many of them, of all categories in turn (default: %(default)s)")
    much.add_argument("--pair_places", type=whole(1), default=4, metavar="N",
                      help="so many places for two concepts (default: %(default)s)")
    much.add_argument("--seeds", type=whole(1), default=8, metavar="N",
                      help="pictures of each prompt (default: %(default)s)")
    much.add_argument("--train_steps", type=whole(1), metavar="N", help="of each training (default: the config's)")
    drawing = parser.add_argument_group("how it is drawn")
    drawing.add_argument("--biases", nargs="+", type=number(), default=BIASES, metavar="NUMBER",
                         help=f"of Perfusion's curve, rising (default: {' '.join(map(str, BIASES))})")
    drawing.add_argument("--other_biases", nargs="+", type=number(), metavar="NUMBER",
                         help="some of these, of the curves that it is compared with (default: those of "
                         f"{' '.join(map(str, OTHER_BIASES))} that are among them, or all)")
    drawing.add_argument("--pair_biases", nargs="+", type=number(), default=PAIR_BIASES, metavar="NUMBER",
                         help="of two concepts in a picture; the first is judged, others are only shown (default: "
                         f"{' '.join(map(str, PAIR_BIASES))})")
    drawing.add_argument("--sampler", choices=tuple(SAMPLERS), default="dpm",
                         help="default: %(default)s, whose 10 steps are nearer to the limit of many than DDIM's 25")
    drawing.add_argument("--steps", "--ddim_steps", dest="steps", type=whole(1), default=10, metavar="N",
                         help="sampling steps (default: %(default)s)")
    drawing.add_argument("--scale", type=number(1), default=2.0, metavar="NUMBER",
                         help="guidance (default: %(default)s)")
    drawing.add_argument("--batch_size", type=whole(1), default=32, metavar="N",
                         help="pictures drawn at a time (default: %(default)s)")
    parser.add_argument("--evaluation_clip", default=str(MINI / "evaluation_clip"), metavar="FOLDER",
                        help="the CLIP that grades, or its name (default: models/mini/evaluation_clip)")
    parser.add_argument("--jobs", type=whole(1), metavar="N",
                        help="trainings side by side, which share the cores (default: one for each core, up to 4)")
    add_model_flags(parser, outdir="outputs/reproduce")
    options = parser.parse_args(arguments)
    if options.quick:
        shorten(options)
    options.other_biases = options.other_biases or [
        bias for bias in OTHER_BIASES if bias in options.biases] or list(options.biases)
    check(options)
    return options


def shorten(options: argparse.Namespace) -> None:
    """Never more than was asked for."""
    for name, most in QUICK.items():
        given = getattr(options, name)
        setattr(options, name, most if given is None else min(most, given))
    options.biases = options.biases[::2]  # the usual ones of other curves are among them


def check(options: argparse.Namespace) -> None:
    """Raises a UserError for what is missing, before anything heavy is loaded."""
    check_folder("--outdir", Path(options.outdir))
    if find_spec("matplotlib") is None:
        raise UserError('figures need matplotlib; pip install -e ".[evaluation]"')
    if not Path(options.config).is_file():
        raise UserError(f"--config {options.config}: no such file; name Perfusion's config for the base model")
    if options.evaluation_clip == str(MINI / "evaluation_clip") and not Path(options.evaluation_clip).is_dir():
        raise UserError(f"--evaluation_clip {options.evaluation_clip}: there are no weights; train it with "
                        "configs/mini/evaluation_clip.yaml and scripts/mini/export.py")
    if sorted(set(options.biases)) != list(options.biases):
        raise UserError(f"--biases {' '.join(map(str, options.biases))}: give them in rising order")
    if not set(options.other_biases) <= set(options.biases):
        raise UserError(f"--other_biases {' '.join(map(str, options.other_biases))}: give some of --biases, "
                        f"{' '.join(map(str, options.biases))}")


class Progress:
    """A line for each finished unit, with its seconds and about how long the rest will take.

    Args:
        trainings, pictures: how many there will be.
    """

    def __init__(self, trainings: int, pictures: int) -> None:
        self.left = {"trainings": trainings, "pictures": pictures}
        self.spent = {"trainings": (0.0, 0), "pictures": (0.0, 0)}

    def done(self, what: str, unit: str, count: int, seconds: float) -> None:
        """Says that `what` is done: so many of the unit, in so many seconds."""
        before, number_of = self.spent[unit]
        self.spent[unit] = before + seconds, number_of + count
        self.left[unit] -= count
        print(f"  {what}: {seconds:.1f} s; {self.remaining()}", flush=True)

    def remaining(self) -> str:
        """Such as "about 12 min left, 3 trainings and 1,536 pictures"."""
        left = [f"{count:,} {unit}" for unit, count in self.left.items() if count]
        if not left:
            return "nothing is left to make"
        known = all(self.spent[unit][1] for unit, count in self.left.items() if count)
        seconds = sum(count * self.spent[unit][0] / max(1, self.spent[unit][1]) for unit, count in self.left.items())
        about = f"about {max(1, round(seconds / 60))} min left, " if known else "left are "
        return about + " and ".join(left)


def accelerator(device: str | None) -> str | None:
    """The name that main.py has for a device."""
    kind = (device or "").partition(":")[0]
    return {"": None, "cuda": "gpu"}.get(kind, kind)


def set_up(options: argparse.Namespace) -> tuple[School, Grading, list[Study], list[Example]]:
    """What teaches, what grades, all that can be compared, and the examples to teach.

    Raises:
        UserError: a file that the options name cannot be used.
    """
    from omegaconf import OmegaConf

    from evaluation.mini.fidelity import FREE_PLACES
    from evaluation.paper.measurements import Graders, Grading, Wanted
    from evaluation.paper.studies import studies
    from evaluation.paper.training_runs import Example, School, cores
    from evaluation.prompts.prompt_sets import MINI_PROMPTS, read_prompts, select_prompts
    from evaluation.sweeps.samples import Manner
    from ldm.data.mini.example_concepts import CONCEPTS
    from ldm.inference.sampling import read_model_config
    from ldm.training.run_record import describe_machine
    from ldm.util import pick_device

    folder = Path(options.outdir)
    at_once = options.jobs or min(4, cores())
    machine = describe_machine(pick_device(options.device))
    school = School(options.config, folder, options.ckpt, accelerator(options.device), options.train_steps, at_once,
                    ", ".join(f"{name} {value}" for name, value in machine.items()))
    prompts = select_prompts(read_prompts(options.prompts or MINI_PROMPTS), options.prompts_limit)
    wanted = Wanted(prompts, FREE_PLACES[:options.pair_places], options.seeds,
                    Manner(scale=options.scale, steps=options.steps, sampler=options.sampler))
    graders = Graders(options.config, options.evaluation_clip, options.ckpt, options.device, options.batch_size)
    examples = [Example(name, MINI / "examples" / name, kind) for name, (kind, _) in CONCEPTS.items()]
    config = read_model_config(options.config)
    rule = {key: OmegaConf.select(config, f"model.params.{key}", default=usual)
            for key, usual in (("projection", "full"), ("used_layers", None))}
    every = studies(options.biases, options.other_biases, options.pair_biases, rule)
    return school, Grading(graders, school, wanted, folder), list(every.values()), examples[:options.concepts]


def subjects(study: Study, examples: Sequence[Example]) -> list[Subject]:
    """What a study draws: the examples, or each beside the next one, so that each is named first and second once."""
    from evaluation.paper.measurements import Pair

    if study.kind == "trade-off":
        return list(examples)
    ring = [*examples[1:], examples[0]]
    return [Pair(*both) for both in zip(examples, ring, strict=True)] if study.kind == "pairs" else []


def carry_out(study: Study, school: School, grading: Grading, examples: Sequence[Example], progress: Progress
              ) -> Found:
    """Teaches and draws what a study still lacks; all that it is made of."""
    missing = [(method, one) for method in study.methods for one in examples if not school.is_there(method, one)]
    for method, one in missing:
        if school.outdated(method, one):
            print(f"  {method.name}, {one.name}: there is one that was taught in another way; teaching anew")
    began = time.perf_counter()
    for method, one, _ in school.teach(missing):
        ended = time.perf_counter()  # of several at once each has its part
        progress.done(f"taught {one.name} by {method.name}", "trainings", 1, ended - began)
        began = ended
    for setting, subject in sets_of(study, examples):
        if grading.is_there(setting, subject):
            continue
        if grading.outdated(setting, subject):
            print(f"  {setting.name}, {subject.name}: there are pictures made in another way; drawing anew")
        began = time.perf_counter()
        grading.grade(setting, subject)
        progress.done(f"drew {subject.name}, {setting.name}", "pictures", grading.count(subject),
                      time.perf_counter() - began)
    return found(study, school, grading, examples)


def sets_of(study: Study, examples: Sequence[Example]) -> list[tuple[Setting, Subject]]:
    """What a study draws, set by set."""
    return [(setting, subject) for setting in study.settings for subject in subjects(study, examples)]


def is_complete(study: Study, school: School, grading: Grading, examples: Sequence[Example]) -> bool:
    """Whether all that a study is made of is there."""
    return all(school.is_there(method, one) for method in study.methods for one in examples) and all(
        grading.is_there(*each) for each in sets_of(study, examples))


def found(study: Study, school: School, grading: Grading, examples: Sequence[Example]) -> Found:
    """All that a complete study is made of."""
    from evaluation.paper.claims import Found

    return Found({(setting, subject.names): grading.rows(setting, subject)
                  for setting, subject in sets_of(study, examples)},
                 {method: [school.cost(method, one) for one in examples] for method in study.methods})


def to_do(chosen: Sequence[Study], school: School, grading: Grading, examples: Sequence[Example]) -> Progress:
    """What is missing for all studies."""
    methods = dict.fromkeys(method for study in chosen for method in study.methods)
    trainings = sum(not school.is_there(method, one) for method in methods for one in examples)
    sets = dict.fromkeys(each for study in chosen for each in sets_of(study, examples))
    pictures = sum(grading.count(subject) for setting, subject in sets if not grading.is_there(setting, subject))
    return Progress(trainings, pictures)


def ceilings_of(grading: Grading) -> dict[str, Estimate]:
    """What the recogniser of marks reaches on real scenes."""
    from evaluation.stats.intervals import bootstrap_mean

    return {name: bootstrap_mean(hits) for name, hits in grading.graders.marks.ceilings().items()}


def stop(*_: object) -> None:
    """What to do when told to end: leave, so that trainings that have been begun are ended, too."""
    sys.exit("told to stop; the same command goes on from what is there")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    began = time.perf_counter()
    school, grading, every, examples = set_up(options)
    from evaluation.paper.report import Report

    chosen = [study for study in every if study.key in options.only]
    progress = to_do(chosen, school, grading, examples)
    print(f"{len(chosen)} studies of {len(examples)} concepts: {progress.remaining()}", flush=True)
    settings = {name: value for name, value in vars(options).items() if name != "only"}  # others are told of, too
    report = Report(Path(options.outdir), {**settings, "machine": school.machine})
    for study in every:
        if study in chosen:
            print(study.title, flush=True)
            made = carry_out(study, school, grading, examples, progress)
        elif is_complete(study, school, grading, examples):  # by an earlier run: the summary is of all that is there
            print(f"{study.title} (all of it was there)", flush=True)
            made = found(study, school, grading, examples)
        else:
            continue
        if study.kind != "cost" and not report.ceilings:
            report.ceilings = ceilings_of(grading)
        for said in report.add(study, made):
            print(f"  {said.verdict.upper()}: {said.statement}: {said.numbers}", flush=True)
    print(f"{(time.perf_counter() - began) / 60:.1f} min; read {report.folder / 'summary.md'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main()
