"""Claims about each study, and whether the measurements support them.

To add a claim, yield it from the function of its study, or write such a function and decorate it with `claims_about`.
`evaluation.paper.decisions` has the rule that decides.

Two rules are added to it here. A baseline is also compared by image similarity at equal text similarity: a baseline
that has hardly learned the concept follows the prompt almost perfectly, so it lies where no curve reaches in the first
comparison. And nothing follows from a comparison with a baseline that has less text and less image similarity than the
base model: it was trained badly.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.paper.decisions import (
    INCONCLUSIVE,
    MARGIN,
    MIN_CONCEPTS,
    NOT_SUPPORTED,
    SUPPORTED,
    decide,
    decide_gap,
)
from evaluation.paper.design import Study, StudyCurve, Variant
from evaluation.paper.methods import (
    BASE_MODEL,
    CUSTOM_DIFFUSION,
    FROM_NOTHING,
    PERFUSION,
    PREDICTED,
    REFINED,
    SHARES_LAYERS,
    TEXTUAL_INVERSION,
    WITH_SCENES,
)
from evaluation.paper.results import Results
from evaluation.paper.studies import STUDIES
from evaluation.stats.crossed import percentile_estimate, resampled_means
from evaluation.stats.intervals import CONFIDENCE, Estimate
from evaluation.stats.tradeoff import CurveGap, TradeoffCurve, compare_curves, neighbor_differences

CLAIMED_TEMPERATURE = 0.15
PAIR_GOAL = 60.0  # % of images in which both concepts are recognized
# How many times as often as a baseline Perfusion has to generate both concepts. The second number is in words.
PAIR_FACTORS = {TEXTUAL_INVERSION: (2, "at least twice as often as"), CUSTOM_DIFFUSION: (1, "more often than")}
MAX_BYTES = 100_000
MIN_SIZE_RATIO = 10  # of files that hold weights to Perfusion's


@dataclass(frozen=True)
class Claim:
    """A claim and what follows from the measurements of a study.

    Attributes:
        text: the claim.
        outcome: `SUPPORTED`, `NOT_SUPPORTED` or `INCONCLUSIVE`.
        evidence: the numbers that decide.
    """

    text: str
    outcome: str
    evidence: str


@dataclass(frozen=True)
class ClaimCheck:
    """A checked claim, as reports show it; attributes as in `Claim`, and the key of the study."""

    study: str
    claim: str
    outcome: str
    evidence: str


Claims = Iterator[Claim]
ClaimFunction = Callable[[Study, Results], Claims]
CLAIMS: dict[str, ClaimFunction] = {}  # key of the study -> function that yields its claims


def claims_about(study: str) -> Callable[[ClaimFunction], ClaimFunction]:
    """Return a decorator that registers a function as the source of a study's claims.

    Raises:
        ValueError: if there is no such study.
    """
    if study not in STUDIES:
        raise ValueError(f"claims about {study!r}: there is no such study")

    def register(function: ClaimFunction) -> ClaimFunction:
        CLAIMS[study] = function
        return function

    return register


def check_claims(study: Study, results: Results) -> Iterator[ClaimCheck]:
    """Yield every claim about a study, checked; none if no claims are registered."""
    count = len(results.concepts)
    is_too_few = 0 < count < MIN_CONCEPTS  # there are no images of a cost study, whose numbers do not vary
    reason = f"; {count} concepts, at least {MIN_CONCEPTS} are needed to generalize over concepts" if is_too_few else ""
    function = CLAIMS.get(study.key)
    for claim in function(study, results) if function is not None else ():
        outcome = INCONCLUSIVE if is_too_few else claim.outcome
        yield ClaimCheck(study.key, claim.text, outcome, claim.evidence + reason)


# The claims, study by study


@claims_about("baselines")
def _baselines(study: Study, results: Results) -> Claims:
    own = study.curves[0]
    yield from _above_points(own.name, results.curve(_full_curve(study.curves)), study.curves, results)
    if len(own.variants) > 1:
        sweep, ends = results.curve(own), f"from bias {own.variants[0].bias:g} to {own.variants[-1].bias:g}"
        yield _rises("a higher bias follows the prompt more", sweep.text, ends)
        yield _rises("a higher bias is less like the concept", -sweep.image, ends)


@claims_about("locking")
def _locking(study: Study, results: Results) -> Claims:
    local, global_lock, trained = map(results.curve, study.curves)
    yield _is_above("key-locking gives a better trade-off than trained keys", local, trained, ("it", "trained keys"))
    local_at_same = results.curve(_at_biases_of(study.curves[1], study.curves[0]))
    yield _is_more("the local lock is more like the concept than the global lock",
                   local_at_same.image - global_lock.image)
    yield _is_more("the global lock follows the prompt more than the local lock",
                   global_lock.text - local_at_same.text)


@claims_about("projection")
def _projection(study: Study, results: Results) -> Claims:
    """Not claims of the paper: is the projection that this project adds an improvement?"""
    gated, full = map(results.curve, study.curves)
    yield _follows_more("a gated projection follows the prompt more than Eq. 3's", *study.curves, results)
    yield _is_above("a gated projection gives a better trade-off than Eq. 3's", gated, full, ("gated", "Eq. 3's"))


@claims_about("values")
def _values(study: Study, results: Results) -> Claims:
    """Are this project's additions an improvement, and how good is Perfusion without them?"""
    own = study.curves[0]
    others = [curve for curve in study.curves[1:] if curve.variants[0].method.has_bias]
    measured_own, measured_others = results.curve(own), [results.curve(other) for other in others]
    for other, measured in zip(others, measured_others, strict=True):
        yield _follows_more(f"{own.name} follows the prompt more than {other.name}", own, other, results)
        yield _is_above(f"{own.name} gives a better trade-off than {other.name}", measured_own, measured,
                        (own.name, other.name))
    for other, measured in zip(others, measured_others, strict=True):
        yield from _above_points(other.name, measured, study.curves, results)


@claims_about("masks")
def _masks(study: Study, results: Results) -> Claims:
    masked, plain = map(results.curve, study.curves)
    yield _follows_more("masks raise text similarity", *study.curves, results)
    yield _is_above("masks give a better trade-off", masked, plain, ("masked", "no masks"))


@claims_about("one_photo")
def _one_photo(study: Study, results: Results) -> Claims:
    all_photos, one_photo = map(results.curve, study.curves)
    yield _follows_more("one photo follows the prompt less than all of them", *study.curves, results)
    yield _is_above("one photo gives a worse trade-off than all of them", all_photos, one_photo,
                    ("all photos", "one photo"))


@claims_about("training_bias")
def _training_bias(study: Study, results: Results) -> Claims:
    higher, lower = study.curves
    yield _is_above(f"a higher training bias gives a better trade-off ({higher.name} over {lower.name})",
                    *map(results.curve, study.curves), (higher.name, lower.name))


@claims_about("temperature")
def _temperature(study: Study, results: Results) -> Claims:
    own, *others = study.curves
    (claimed,) = [other for other in others if other.variants[0].temperature == CLAIMED_TEMPERATURE]
    gap = compare_curves(results.curve(own), results.curve(claimed))
    where = _where(gap, ("the curve", claimed.name), "image")
    yield Claim(f"an inference temperature of {CLAIMED_TEMPERATURE:g} gives a better trade-off than that of training",
                decide_gap(gap.swapped()), f"text similarity {_signed(gap.swapped().difference)} {where}")


@claims_about("encoder")
def _encoder(study: Study, results: Results) -> Claims:
    """Not claims of the paper, but of the tuning-encoder's (arXiv 2307.06925): a few steps are enough from there."""
    curves = {curve.variants[0].method: curve for curve in study.curves}
    if REFINED not in curves:
        return
    own, refined, nothing = (results.curve(curves[method]) for method in (PERFUSION, REFINED, FROM_NOTHING))
    yield _is_above(f"{REFINED.name} give a better trade-off than {FROM_NOTHING.name}", refined, nothing,
                    (REFINED.name, FROM_NOTHING.name))
    yield _is_closer(f"{REFINED.name} are more like the concept than {FROM_NOTHING.name}", refined, nothing,
                     (REFINED.name, FROM_NOTHING.name))
    yield _is_above(f"{REFINED.name} give a better trade-off than all steps without the encoder", refined, own,
                    (REFINED.name, PERFUSION.name))
    # Similarities of whole images hardly see colors and patterns, so these are also counted.
    for first, second in ((PREDICTED, FROM_NOTHING), (PREDICTED, PERFUSION), (REFINED, PERFUSION)):
        yield _happens_more(f"images of {first.name} show the attributes more often than those of {second.name}",
                            "attributes", curves[first], curves[second], results)
    yield _happens_more(f"beside another subject, a concept of {REFINED.name} keeps its kind more often than one of "
                        f"{PERFUSION.name}", "own_kind", curves[REFINED], curves[PERFUSION], results)


@claims_about("scenes")
def _scenes(study: Study, results: Results) -> Claims:
    """Not claims of the paper: is what this project adds an improvement?"""
    own, *others = study.curves
    curves = {curve.variants[0].method: curve for curve in others}
    for method in (SHARES_LAYERS, WITH_SCENES) if others else ():
        yield _is_above(f"{method.name}: a better trade-off than the last layer alone", results.curve(curves[method]),
                        results.curve(own), (method.name, "the last layer"))
        for column, what in (("attributes", "an image shows the attributes"),
                             ("exact_match", "an image matches the photos' sprite"),
                             ("own_kind", "beside another subject, a concept keeps its kind")):
            yield _happens_more(f"{method.name}: {what} more often than with the last layer alone", column,
                                curves[method], own, results)


@claims_about("two_concepts")
def _two_concepts(study: Study, results: Results) -> Claims:
    """The first bias is judged: choosing the best bias by the images that are judged would be unfair."""
    def share(variant: Variant, column: str = "attributes") -> np.ndarray:
        return resampled_means([results.cells(variant, column)])[0]

    own = next(variant for variant in study.variants if variant.method.has_bias)
    own_share = share(own)
    shown = percentile_estimate(own_share).text("%")
    outcome, reason = decide(percentile_estimate(own_share - PAIR_GOAL), margin=0), ""
    # A base model that cannot generate two plain subjects limits every method.
    plain = percentile_estimate(share(Variant(BASE_MODEL), "super_categories"))
    if outcome != SUPPORTED and plain.high < PAIR_GOAL:
        outcome = INCONCLUSIVE
        reason = f"; the base model itself generates both super-categories in only {plain.text('%')}"
    yield Claim(f"two concepts, each with its own attributes, in at least {PAIR_GOAL:g} % of images", outcome,
                f"{shown} at {own.label}{reason}")

    for method, (factor, words) in PAIR_FACTORS.items():
        if method in study.methods:
            other_share = share(Variant(method))
            yield Claim(f"two concepts {words} merged {method.name}",
                        decide(percentile_estimate(own_share - factor * other_share), margin=0),
                        f"{shown} against {percentile_estimate(other_share).text('%')}")


@claims_about("cost")
def _cost(study: Study, results: Results) -> Claims:
    sizes = {method: max(cost.size for cost in results.costs[method]) for method in study.methods}
    own_size = sizes.pop(PERFUSION)
    yield Claim("a concept is a file of less than 100 KB", SUPPORTED if own_size < MAX_BYTES else NOT_SUPPORTED,
                f"{own_size / 1e3:.1f} KB")
    with_weights = [size for method, size in sizes.items() if method.stores_weights]
    if with_weights:
        is_smaller = min(with_weights) > MIN_SIZE_RATIO * own_size
        evidence = [f"{method.name} {size / 1e3:.1f} KB, {size / own_size:.3g} times" for method, size in sizes.items()]
        yield Claim("it is far smaller than files with weights of the model",
                    SUPPORTED if is_smaller else NOT_SUPPORTED, ", ".join(evidence))


# Kinds of claims


def _is_above(text: str, first: TradeoffCurve, second: TradeoffCurve, names: tuple[str, str]) -> Claim:
    """Claim that the first curve has more text similarity than the second at equal image similarity."""
    return _claim_gap(text, compare_curves(first, second), names, "text", "image")


def _is_closer(text: str, first: TradeoffCurve, second: TradeoffCurve, names: tuple[str, str]) -> Claim:
    """Claim that the first curve has more image similarity than the second at equal text similarity."""
    return _claim_gap(text, compare_curves(first.transposed, second.transposed), names, "image", "text")


def _claim_gap(text: str, gap: CurveGap, names: tuple[str, str], gained: str, equal: str) -> Claim:
    evidence = f"{gained} similarity {_signed(gap.difference)} {_where(gap, names, equal)}"
    return Claim(text, decide_gap(gap), evidence)


def _is_more(text: str, differences: np.ndarray, margin: float = MARGIN, unit: str = "") -> Claim:
    """Claim that differences (P, 1 + R) at equal biases are positive on average; `margin` as for `decide`."""
    estimate = percentile_estimate(differences.mean(0))
    return Claim(text, decide(estimate, margin), f"{_signed(estimate)}{unit} at equal bias")


def _follows_more(text: str, first: StudyCurve, second: StudyCurve, results: Results) -> Claim:
    """Claim that the first curve has more text similarity than the second at the biases that both have."""
    one = results.curve(_at_biases_of(second, first))
    other = results.curve(_at_biases_of(first, second))
    return _is_more(text, one.text - other.text)


def _happens_more(text: str, column: str, first: StudyCurve, second: StudyCurve, results: Results) -> Claim:
    """Claim that the first curve has more images with what a column of percents records, at the biases of both."""
    pairs = [[results.cells(variant, column) for variant in curve.variants]
             for curve in (_at_biases_of(second, first), _at_biases_of(first, second))]
    differences = np.stack([np.subtract(*resampled_means(pair)) for pair in zip(*pairs, strict=True)])
    return _is_more(text, differences, margin=0, unit=" % of images")


def _rises(text: str, values: np.ndarray, ends: str) -> Claim:
    """Claim that values (P, 1 + R) rise from point to point.

    It is not supported if any step falls by more than `MARGIN`. The intervals of the steps are widened for their number
    (Bonferroni).
    """
    total = percentile_estimate(values[-1] - values[0])
    steps = neighbor_differences(values, confidence=1 - (1 - CONFIDENCE) / (len(values) - 1))
    falling = sum(step.high < -MARGIN for step in steps)
    evidence = f"{_signed(total)} {ends}, {falling or 'no'} step back by more than {MARGIN:g} among {len(steps)}"
    return Claim(text, NOT_SUPPORTED if falling else decide(total), evidence)


def _above_points(name: str, curve: TradeoffCurve, curves: Sequence[StudyCurve], results: Results) -> Claims:
    """Claim that a curve lies above, and is more like the concept than, each of `curves` that has no bias.

    The base model is one of these; the others are compared with it first.
    """
    points = [point for point in curves if not point.variants[0].method.has_bias]
    (base,) = (point for point in points if not point.variants[0].method.trained)
    measured_base = results.curve(base)
    for point in points:
        if point is not base:
            measured, names = results.curve(point), (name, point.name)
            claims = (_is_above(f"{name} is above {point.name}", curve, measured, names),
                      _is_closer(f"{name} is more like the concept than {point.name}", curve, measured, names))
            is_bad = _is_worse(measured, measured_base)
            yield from map(_withdraw, claims) if is_bad else claims


def _is_worse(point: TradeoffCurve, base: TradeoffCurve) -> bool:
    """Return whether a point has less text and less image similarity than the base model, beyond doubt."""
    differences = point.text - base.text, point.image - base.image
    return all(percentile_estimate(difference.mean(0)).high < 0 for difference in differences)


def _withdraw(claim: Claim) -> Claim:
    """Make a claim about a badly trained method inconclusive."""
    reason = "it is worse than the untrained base model, as its learning rate or steps do not suit"
    return Claim(claim.text, INCONCLUSIVE, f"{claim.evidence}; {reason}")


# Curves and texts


def _full_curve(curves: Sequence[StudyCurve]) -> StudyCurve:
    """Return everything that one file of Perfusion can generate: bias and layers are chosen at inference."""
    own = [curve for curve in curves if curve.variants[0].method == PERFUSION]
    return StudyCurve(own[0].name, tuple(variant for curve in own for variant in curve.variants))


def _at_biases_of(other: StudyCurve, curve: StudyCurve) -> StudyCurve:
    """Return the part of `curve` at the biases of `other`."""
    biases = {variant.bias for variant in other.variants}
    return StudyCurve(curve.name, tuple(variant for variant in curve.variants if variant.bias in biases))


def _where(gap: CurveGap, names: tuple[str, str], equal: str) -> str:
    """Describe the similarity at which two curves of these names were compared."""
    outside = ((gap.beyond, f"more than {names[0]} reaches"), (gap.below, f"less than {names[0]} has anywhere"))
    ends = [f"{names[1]} has {words} in {100 * share:.3g} % of resamples" for share, words in outside if share]
    return f"at equal {equal} similarity" + (f" ({', '.join(ends)}: nearest ends compared)" if ends else "")


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
