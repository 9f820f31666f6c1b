"""The rule that decides whether measurements support a claim.

A claim is expressed as a number that is positive if the claim is true. By its 95 % interval, from a bootstrap over
concepts and prompts (see `evaluation.stats.crossed`), the claim is

    supported        if the interval lies above 0,
    not supported    if the interval lies below 0, or within `MARGIN` on both sides of 0: then the difference is too
                     small to matter, whatever its sign,
    inconclusive     otherwise: it takes more concepts, prompts or seeds to tell.

Every claim is inconclusive with fewer than `MIN_CONCEPTS` concepts.

"A better trade-off" means more text similarity at equal image similarity: one curve lies above another (see
`evaluation.stats.tradeoff`). A method may have more image similarity than the curve reaches at any bias. If that
happens in more than `MAX_OUTSIDE` of the resamples, the method is compared with the end of the curve that has the
highest image similarity. This comparison can refute the claim: the curve then has less of both similarities. It cannot
support the claim. A method with less image similarity than the whole curve is the opposite case: the comparison can
support the claim, and cannot refute it.
"""
from __future__ import annotations

from evaluation.stats.intervals import Estimate
from evaluation.stats.tradeoff import CurveGap

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
MARGIN = 0.5  # in cosines x 100, which range from -50 to 90 with the bundled evaluation CLIP
MAX_OUTSIDE = 0.025  # share of resamples
MIN_CONCEPTS = 5


def decide(difference: Estimate, margin: float = MARGIN) -> str:
    """Return the outcome for a difference that is positive if the claim is true."""
    if difference.low > 0:
        return SUPPORTED
    if difference.high < 0 or -margin < difference.low <= difference.high < margin:
        return NOT_SUPPORTED
    return INCONCLUSIVE


def decide_gap(gap: CurveGap) -> str:
    """Return the outcome for the claim that the first curve of a comparison lies above the second."""
    # Outcomes that the nearest ends of the curves cannot establish.
    excluded = {SUPPORTED: gap.beyond > MAX_OUTSIDE, NOT_SUPPORTED: gap.below > MAX_OUTSIDE}
    outcome = decide(gap.difference, margin=0 if any(excluded.values()) else MARGIN)
    return INCONCLUSIVE if excluded.get(outcome) else outcome
