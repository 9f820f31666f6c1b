"""The paper's statements, and whether they are seen here: "seen", "not seen", or "not decidable here".

Each statement is put as numbers that are positive where it is true. By their 95 % intervals, from a bootstrap that
resamples concepts' prompts for all methods alike, it is

    seen                  where their interval lies above 0,
    not seen              where it lies below 0, or within `MARGIN` on both sides of it: then the difference,
                          whichever way it goes, is too small to matter,
    not decidable here    otherwise: more concepts, prompts or seeds would have to tell.

"A better trade-off" means more text similarity at equal image similarity: one curve above another (see
`evaluation.tradeoff`). Where a method lies beyond the curve, having more image similarity than the curve reaches at
any bias, it is compared with the curve's end of most likeness. That can refute the statement, where less likeness comes
with less of the prompt, too; it cannot support it. Where it lies below the curve, it is the other way round: more of
the prompt with more likeness supports the statement, less of the prompt decides nothing.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation import studies
from evaluation.grading import Row
from evaluation.intervals import Figure
from evaluation.studies import Curve, Setting, Study
from evaluation.teaching import Cost
from evaluation.tradeoff import Gap, Traced, figure_of, gap, resampled, steps, traced

SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "not decidable here"
MARGIN = 0.5  # of cosines x 100, which for the bundled evaluation CLIP range from -50 to 90
TEMPERATURE = 0.15
TOGETHER = 60.0  # % of pictures in which two concepts are recognised, by the issue
TIMES = 2  # as often as merged Textual Inversion
MOST_BYTES = 100_000
TIMES_SMALLER = 10  # than files that hold weights


@dataclass(frozen=True)
class Verdict:
    """A statement, what is to be said of it, and the numbers that say it."""

    study: str
    statement: str
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Found:
    """All that was measured: the rows of each setting and subject, and what teaching cost."""

    rows: Mapping[tuple[Setting, str], Sequence[Row]]
    costs: Mapping[studies.Method, Sequence[Cost]]

    def clusters(self, setting: Setting, measure: str) -> np.ndarray:
        """(C,) means of a measure over the seeds of each subject's prompts, in one order for all settings."""
        means: dict[tuple[str, str], list[float]] = {}
        for (which, subject), rows in self.rows.items():
            for row in rows if which == setting else ():
                means.setdefault((subject, row["prompt"]), []).append(row[measure])
        return np.array([np.mean(values) for _, values in sorted(means.items())])

    def traced(self, curve: Curve) -> Traced:
        text, image = (np.stack([self.clusters(setting, measure) for setting in curve.settings])
                       for measure in ("text", "image"))
        return traced(text, image)


def verdict_of(figure: Figure, margin: float = MARGIN) -> str:
    """By the rule above."""
    if figure.low > 0:
        return SEEN
    return NOT_SEEN if figure.high < 0 or -margin < figure.low <= figure.high < margin else UNDECIDED


def verdict_of_gap(found: Gap) -> str:
    """By the rule above, for one curve over another."""
    verdict = verdict_of(found.figure, 0 if found.second != "inside" else MARGIN)
    idle = {"inside": (), "beyond": (SEEN,), "below": (NOT_SEEN,)}[found.second]
    return UNDECIDED if verdict in idle else verdict


def verdicts(study: Study, found: Found) -> Iterator[Verdict]:
    """What is to be said of the statements that a study is about."""
    for statement, verdict, numbers in JUDGES[study.key](study, found):
        yield Verdict(study.key, statement, verdict, numbers)


Judged = Iterator[tuple[str, str, str]]


def _above(statement: str, first: Traced, second: Traced, names: tuple[str, str]) -> tuple[str, str, str]:
    """The statement that one curve lies above another."""
    result = gap(first, second)
    where = {"inside": "at equal image similarity", "beyond": f"{names[1]} has more image similarity than {names[0]} "
             "reaches; nearest ends compared", "below": f"{names[1]} has less image similarity than {names[0]} has "
             "anywhere; nearest ends compared"}[result.second]
    return statement, verdict_of_gap(result), f"text similarity {_signed(result.figure)} ({where})"


def _baselines(study: Study, found: Found) -> Judged:
    own, *others = study.curves
    curve = found.traced(own)
    for other in others:
        if other.settings[0].method.taught:
            yield _above(f"Perfusion is above {other.name}", curve, found.traced(other), (own.name, other.name))
    for statement, sign, values in (("a higher bias follows the prompt more", 1, curve.text),
                                    ("a higher bias is less like the concept", -1, curve.image)):
        whole, each = figure_of(sign * (values[-1] - values[0])), steps(sign * values)
        back = sum(step.high < 0 for step in each)
        verdict = NOT_SEEN if back else verdict_of(whole)
        yield statement, verdict, (f"{_signed(whole)} from bias {own.settings[0].bias:g} to {own.settings[-1].bias:g}, "
                                   f"{back or 'no'} step back among {len(each)}")


def _locking(study: Study, found: Found) -> Judged:
    local, overall, trained = map(found.traced, study.curves)
    yield _above("key-locking gives a better trade-off than trained keys", local, trained, ("it", "trained keys"))
    yield _more("the local lock is more like the concept than the global lock", local.image - overall.image)
    yield _more("the global lock follows the prompt more than the local lock", overall.text - local.text)


def _masks(study: Study, found: Found) -> Judged:
    masked, plain = map(found.traced, study.curves)
    yield _more("masks raise text similarity", masked.text - plain.text)
    yield _above("masks give a better trade-off", masked, plain, ("masked", "no masks"))


def _one_photo(study: Study, found: Found) -> Judged:
    every, one = map(found.traced, study.curves)
    yield _more("one photo follows the prompt less than all of them", every.text - one.text)
    yield _above("one photo gives a worse trade-off than all of them", every, one, ("all photos", "one photo"))


def _training_bias(study: Study, found: Found) -> Judged:
    lowest, highest = study.curves[0], study.curves[-1]
    yield _above(f"a higher training bias gives a better trade-off ({highest.name} over {lowest.name})",
                 found.traced(highest), found.traced(lowest), (highest.name, lowest.name))


def _temperature(study: Study, found: Found) -> Judged:
    own, *others = study.curves
    (better,) = [other for other in others if other.settings[0].temperature == TEMPERATURE]
    result = gap(found.traced(own), found.traced(better))
    turned = Gap(_turned(result.figure), {"inside": "inside", "beyond": "below", "below": "beyond"}[result.second])
    yield (f"an inference temperature of {TEMPERATURE:g} gives a better trade-off than that of training",
           verdict_of_gap(turned), f"text similarity {_signed(turned.figure)} above the curve")


def _two_concepts(study: Study, found: Found) -> Judged:
    def share(setting: Setting) -> np.ndarray:
        return resampled(found.clusters(setting, "own"))

    settings = [curve.settings[0] for curve in study.curves]
    own = [setting for setting in settings if setting.method.gated]
    best = max(own, key=lambda setting: share(setting)[0])
    rates = {"merged Textual Inversion": studies.TEXTUAL_INVERSION, "merged Custom Diffusion": studies.CUSTOM_DIFFUSION}
    shares, mine = {name: share(Setting(method)) for name, method in rates.items()}, share(best)
    yield (f"two concepts, each with its own marks, in at least {TOGETHER:g} % of pictures",
           verdict_of(figure_of(mine - TOGETHER), 0), f"{figure_of(mine).text('%')} at {best.label}")
    for name, theirs in shares.items():
        times = TIMES if name.endswith("Inversion") else 1
        yield (f"two concepts {'at least twice as often as' if times == TIMES else 'more often than'} {name}",
               verdict_of(figure_of(mine - times * theirs), 0),
               f"{figure_of(mine).text('%')} against {figure_of(theirs).text('%')}")


def _cost(study: Study, found: Found) -> Judged:
    largest = {method: max(cost.size for cost in found.costs[method]) for method in study.methods}
    mine = largest[studies.PERFUSION]
    heavy = min(largest[method] for method in (studies.CUSTOM_DIFFUSION, studies.DREAMBOOTH))
    small = mine < MOST_BYTES
    yield "a concept is a file of less than 100 KB", SEEN if small else NOT_SEEN, f"{mine / 1e3:.1f} KB"
    yield ("it is far smaller than files with weights of the model",
           SEEN if heavy > TIMES_SMALLER * mine else NOT_SEEN, ", ".join(
               f"{method.name} {size / 1e3:.1f} KB, {size / mine:.3g} times" for method, size in largest.items()
               if method != studies.PERFUSION))


JUDGES: dict[str, Callable[[Study, Found], Judged]] = {
    "baselines": _baselines, "locking": _locking, "masks": _masks, "one_photo": _one_photo,
    "training_bias": _training_bias, "temperature": _temperature, "two_concepts": _two_concepts, "cost": _cost}


def _more(statement: str, differences: np.ndarray) -> tuple[str, str, str]:
    """The statement that differences (P, 1 + R) at the same biases are positive in the mean."""
    figure = figure_of(differences.mean(0))
    return statement, verdict_of(figure), f"{_signed(figure)} at equal bias"


def _turned(figure: Figure) -> Figure:
    return Figure(-figure.mean, -figure.high, -figure.low, figure.count)


def _signed(figure: Figure) -> str:
    return f"{figure.mean:+.2f} ({figure.low:+.2f} to {figure.high:+.2f})"
