"""The paper's statements, and whether they are seen here: "seen", "not seen", or "not decidable here".

Each statement is put as numbers that are positive where it is true. By their 95 % intervals, from a bootstrap over
concepts and prompts (see `evaluation.stats.crossed`) that draws the same ones for all methods, it is

    seen                  where their interval lies above 0,
    not seen              where it lies below 0, or within `MARGIN` on both sides of it: then the difference,
                          whichever way it goes, is too small to matter,
    not decidable here    otherwise: more concepts, prompts or seeds would have to tell.

Nothing is decided on fewer than `FEWEST_CONCEPTS` concepts: what they have in common by chance cannot be told from what
is true of any.

"A better trade-off" means more text similarity at equal image similarity: one curve above another (see
`evaluation.stats.tradeoff`). Where a method lies beyond the curve in more than `OUTSIDE` of the resamples, having more image
similarity than the curve reaches at any bias, it is compared there with the curve's end of most likeness. That can
refute the statement, where less likeness comes with less of the prompt, too; it cannot support it. Where it lies below
the curve, it is the other way round: more of the prompt with more likeness supports the statement, less of the prompt
decides nothing. A baseline is compared the other way about as well, by image similarity at equal text similarity: one
that has hardly learned the concept has nearly all of the prompt, and less likeness than the curve has anywhere. To be
above a method that is worse than the untaught base model in text and in image similarity says nothing either: that
method was badly taught.

"A higher bias does so" is not seen where any step between neighbouring biases goes back by more than `MARGIN`, by
intervals that are widened for the number of steps (Bonferroni).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.paper import studies
from evaluation.paper.measurements import Row
from evaluation.paper.studies import Curve, Setting, Study
from evaluation.paper.training_runs import Cost
from evaluation.stats.crossed import Cell, figure_of, means
from evaluation.stats.intervals import CONFIDENCE, Estimate
from evaluation.stats.tradeoff import Gap, Traced, gap, steps, traced

SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "not decidable here"
MARGIN = 0.5  # of cosines x 100, which for the bundled evaluation CLIP range from -50 to 90
OUTSIDE = 0.025  # of resamples
FEWEST_CONCEPTS = 5
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
    """All that was measured: the rows of each setting and the concepts in its pictures, and what teaching cost."""

    rows: Mapping[tuple[Setting, tuple[str, ...]], Sequence[Row]]
    costs: Mapping[studies.Method, Sequence[Cost]]

    @property
    def concepts(self) -> set[str]:
        """The names of those in the pictures."""
        return {name for _, names in self.rows for name in names}

    def cells(self, setting: Setting, measure: str) -> dict[Cell, list[float]]:
        """The values of a setting's pictures for which the measure says something."""
        found: dict[Cell, list[float]] = {}
        for (which, names), rows in self.rows.items():
            for row in rows if which == setting else ():
                if row[measure] is not None:
                    found.setdefault(Cell(names, row["template"]), []).append(row[measure])
        return found

    def traced(self, curve: Curve) -> Traced:
        return traced(*([self.cells(setting, measure) for setting in curve.settings] for measure in ("text", "image")))


def verdict_of(figure: Estimate, margin: float = MARGIN) -> str:
    """By the rule above."""
    if figure.low > 0:
        return SEEN
    return NOT_SEEN if figure.high < 0 or -margin < figure.low <= figure.high < margin else UNDECIDED


def verdict_of_gap(found: Gap) -> str:
    """By the rule above, for one curve over another."""
    idle = {SEEN: found.beyond > OUTSIDE, NOT_SEEN: found.below > OUTSIDE}
    verdict = verdict_of(found.figure, 0 if any(idle.values()) else MARGIN)
    return UNDECIDED if idle.get(verdict) else verdict


def verdicts(study: Study, found: Found) -> Iterator[Verdict]:
    """What is to be said of the statements that a study is about."""
    count = len(found.concepts)
    few = 0 < count < FEWEST_CONCEPTS  # none: of costs, which are the same for all
    reason = f"; {count} concepts, at least {FEWEST_CONCEPTS} are needed to generalise over concepts" if few else ""
    for statement, verdict, numbers in JUDGES[study.key](study, found):
        yield Verdict(study.key, statement, UNDECIDED if few else verdict, numbers + reason)


Judgement = tuple[str, str, str]
Judged = Iterator[Judgement]


def _above(statement: str, first: Traced, second: Traced, names: tuple[str, str]) -> Judgement:
    """The statement that one curve lies above another."""
    return _compared(statement, gap(first, second), names, "text", "image")


def _beside(statement: str, first: Traced, second: Traced, names: tuple[str, str]) -> Judgement:
    """The statement that one curve has more image similarity than another at equal text similarity."""
    return _compared(statement, gap(first.transposed, second.transposed), names, "image", "text")


def _compared(statement: str, found: Gap, names: tuple[str, str], gained: str, equal: str) -> Judgement:
    """The statement that a curve has more of one similarity than another where the other similarity is equal."""
    numbers = f"{gained} similarity {_signed(found.figure)} {_where(found, names, equal)}"
    return statement, verdict_of_gap(found), numbers


def _where(found: Gap, names: tuple[str, str], equal: str = "image") -> str:
    """At what similarity two curves of these names were compared."""
    outside = ((found.beyond, f"more than {names[0]} reaches"), (found.below, f"less than {names[0]} has anywhere"))
    ends = [f"{names[1]} has {words} in {100 * share:.3g} % of resamples" for share, words in outside if share]
    return f"at equal {equal} similarity" + (f" ({', '.join(ends)}: nearest ends compared)" if ends else "")


def _baselines(study: Study, found: Found) -> Judged:
    own, curve = study.curves[0], found.traced(_own_curve(study.curves))
    yield from _over_points(own.name, curve, study.curves, found)
    if len(own.settings) > 1:
        swept, ends = found.traced(own), f"from bias {own.settings[0].bias:g} to {own.settings[-1].bias:g}"
        yield _rising("a higher bias follows the prompt more", swept.text, ends)
        yield _rising("a higher bias is less like the concept", -swept.image, ends)


def _own_curve(curves: Sequence[Curve]) -> Curve:
    """All that one file of Perfusion can be drawn at: bias and layers are dials of the sampler."""
    own = [one for one in curves if one.settings[0].method == studies.PERFUSION]
    return Curve(own[0].name, tuple(setting for one in own for setting in one.settings))


def _over_points(name: str, curve: Traced, curves: Sequence[Curve], found: Found) -> Judged:
    """The statements that a curve lies above, and beside, those of the methods among `curves` that have no bias.

    The untaught model's is one of them.
    """
    points = [one for one in curves if not one.settings[0].method.gated]
    (untaught,) = (point for point in points if not point.settings[0].method.taught)
    base = found.traced(untaught)
    for other in points:
        if other is not untaught:
            theirs, names = found.traced(other), (name, other.name)
            for judged in (_above(f"{name} is above {other.name}", curve, theirs, names),
                           _beside(f"{name} is more like the concept than {other.name}", curve, theirs, names)):
                yield _badly_taught(judged) if _worse(theirs, base) else judged


def _worse(point: Traced, base: Traced) -> bool:
    """Whether a point surely has less of both similarities than another."""
    differences = point.text - base.text, point.image - base.image
    return all(figure_of(each.mean(0)).high < 0 for each in differences)


def _badly_taught(judged: Judgement) -> Judgement:
    statement, _, numbers = judged
    reason = "it is worse than the untaught base model, as its learning rate or steps do not suit"
    return statement, UNDECIDED, f"{numbers}; {reason}"


def _rising(statement: str, values: np.ndarray, ends: str) -> Judgement:
    """The statement that values (P, 1 + R) rise from point to point."""
    whole, each = figure_of(values[-1] - values[0]), steps(values, 1 - (1 - CONFIDENCE) / (len(values) - 1))
    back = sum(step.high < -MARGIN for step in each)
    steps_back = f"{back or 'no'} step back by more than {MARGIN:g} among {len(each)}"
    return statement, NOT_SEEN if back else verdict_of(whole), f"{_signed(whole)} {ends}, {steps_back}"


def _locking(study: Study, found: Found) -> Judged:
    local, overall, trained = map(found.traced, study.curves)
    yield _above("key-locking gives a better trade-off than trained keys", local, trained, ("it", "trained keys"))
    beside = found.traced(_at_biases_of(study.curves[1], study.curves[0]))
    yield _more("the local lock is more like the concept than the global lock", beside.image - overall.image)
    yield _more("the global lock follows the prompt more than the local lock", overall.text - beside.text)


def _projection(study: Study, found: Found) -> Judged:
    """No statement of the paper's: whether the projection that this project adds to it is worth having."""
    gated, full = map(found.traced, study.curves)
    yield _follows_more("a gated projection follows the prompt more than Eq. 3's", *study.curves, found)
    yield _above("a gated projection gives a better trade-off than Eq. 3's", gated, full, ("gated", "Eq. 3's"))


def _values(study: Study, found: Found) -> Judged:
    """Whether what this project adds is worth having, and how far one comes without."""
    own, others = study.curves[0], [one for one in study.curves[1:] if one.settings[0].method.gated]
    mine, theirs = found.traced(own), [found.traced(other) for other in others]
    for other, curve in zip(others, theirs, strict=True):
        yield _follows_more(f"{own.name} follows the prompt more than {other.name}", own, other, found)
        yield _above(f"{own.name} gives a better trade-off than {other.name}", mine, curve, (own.name, other.name))
    for other, curve in zip(others, theirs, strict=True):
        yield from _over_points(other.name, curve, study.curves, found)


def _masks(study: Study, found: Found) -> Judged:
    masked, plain = map(found.traced, study.curves)
    yield _follows_more("masks raise text similarity", *study.curves, found)
    yield _above("masks give a better trade-off", masked, plain, ("masked", "no masks"))


def _one_photo(study: Study, found: Found) -> Judged:
    every, one = map(found.traced, study.curves)
    yield _follows_more("one photo follows the prompt less than all of them", *study.curves, found)
    yield _above("one photo gives a worse trade-off than all of them", every, one, ("all photos", "one photo"))


def _training_bias(study: Study, found: Found) -> Judged:
    higher, lower = study.curves
    yield _above(f"a higher training bias gives a better trade-off ({higher.name} over {lower.name})",
                 *map(found.traced, study.curves), (higher.name, lower.name))


def _temperature(study: Study, found: Found) -> Judged:
    own, *others = study.curves
    (better,) = [other for other in others if other.settings[0].temperature == TEMPERATURE]
    result = gap(found.traced(own), found.traced(better))
    yield (f"an inference temperature of {TEMPERATURE:g} gives a better trade-off than that of training",
           verdict_of_gap(result.turned()),
           f"text similarity {_signed(result.turned().figure)} {_where(result, ('the curve', better.name))}")


def _two_concepts(study: Study, found: Found) -> Judged:
    """At the first bias: the best of several, picked on the very pictures that are judged, would be no fair trial."""
    def share(setting: Setting, measure: str = "own") -> np.ndarray:
        return means([found.cells(setting, measure)])[0]

    own = next(setting for setting in study.settings if setting.method.gated)
    rates = {"merged Textual Inversion": studies.TEXTUAL_INVERSION, "merged Custom Diffusion": studies.CUSTOM_DIFFUSION}
    shares, mine = {name: share(Setting(method)) for name, method in rates.items()}, share(own)
    verdict, shown = verdict_of(figure_of(mine - TOGETHER), 0), figure_of(mine).text("%")
    kinds, reason = figure_of(share(Setting(studies.BASE), "kinds")), ""
    if verdict != SEEN and kinds.high < TOGETHER:
        verdict, reason = UNDECIDED, f"; the base model itself draws both plain kinds in only {kinds.text('%')}"
    yield (f"two concepts, each with its own marks, in at least {TOGETHER:g} % of pictures", verdict,
           f"{shown} at {own.label}{reason}")
    for name, theirs in shares.items():
        times = TIMES if name.endswith("Inversion") else 1
        yield (f"two concepts {'at least twice as often as' if times == TIMES else 'more often than'} {name}",
               verdict_of(figure_of(mine - times * theirs), 0), f"{shown} against {figure_of(theirs).text('%')}")


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
    "baselines": _baselines, "locking": _locking, "projection": _projection, "values": _values, "masks": _masks,
    "one_photo": _one_photo, "training_bias": _training_bias, "temperature": _temperature,
    "two_concepts": _two_concepts, "cost": _cost}


def _more(statement: str, differences: np.ndarray) -> Judgement:
    """The statement that differences (P, 1 + R) at the same biases are positive in the mean."""
    figure = figure_of(differences.mean(0))
    return statement, verdict_of(figure), f"{_signed(figure)} at equal bias"


def _follows_more(statement: str, first: Curve, second: Curve, found: Found) -> Judgement:
    """The statement that the first curve has more text similarity than the second at the biases that both have."""
    one, other = found.traced(_at_biases_of(second, first)), found.traced(_at_biases_of(first, second))
    return _more(statement, one.text - other.text)


def _at_biases_of(other: Curve, curve: Curve) -> Curve:
    """The settings of `curve` at biases that another has."""
    biases = {setting.bias for setting in other.settings}
    return Curve(curve.name, tuple(setting for setting in curve.settings if setting.bias in biases))


def _signed(figure: Estimate) -> str:
    return f"{figure.mean:+.2f} ({figure.low:+.2f} to {figure.high:+.2f})"
