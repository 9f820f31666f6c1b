"""The studies: what is compared, and by which curves.

To add a study, write a function here that returns its curves, and decorate it with `register_study`. Command line,
tables, figures and summary follow from that. Claims about it are optional: see `evaluation.paper.claims`.

The comparisons are those of Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image
Personalization" (SIGGRAPH 2023, arXiv 2305.01644), and some of what this project adds to the paper.

Imports no torch, so that command lines can list the studies at once.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evaluation.paper.design import Method, Study, StudyCurve, StudyKind, Variant, make_curve
from evaluation.paper.methods import (
    BASE_MODEL,
    BASELINES,
    FROM_NOTHING,
    FULL_PROJECTION,
    GATED_PROJECTION,
    LOWER_BIAS,
    LOWER_TRAINING_BIAS,
    NO_MASKS,
    ONE_PHOTO,
    PERFUSION,
    PREDICTED,
    PREDICTED_AT,
    PREDICTED_FROM_ONE,
    REFINED,
    SHARES_LAYERS,
    STARTED_FROM_ENCODER,
    TRAINED_KEYS,
    TRAINING_BIAS,
    WITH_SCENES,
)

TEMPERATURES = (0.05, 0.15)  # compared with the temperature of training
PAPERS_RULE = "the paper's rule"  # all layers, and Eq. 3 without a gate on the projection


@dataclass(frozen=True)
class StudyInputs:
    """The inputs from which studies are built.

    Attributes:
        biases: biases of Perfusion's own curve.
        comparison_biases: biases of curves that are compared with it; some of `biases`.
        pair_biases: biases for two concepts in one image; the first one is judged.
        baselines: methods to compare Perfusion with.
        projection: `projection` in Perfusion's config, "gated" or "full", which is not trained twice. None: unknown.
        has_used_layers: whether Perfusion's config selects layers by `used_layers`.
        has_encoder: whether the bundled concept encoder is for the base model.
    """

    biases: tuple[float, ...]
    comparison_biases: tuple[float, ...]
    pair_biases: tuple[float, ...]
    baselines: tuple[Method, ...] = BASELINES
    projection: str | None = None
    has_used_layers: bool = False
    has_encoder: bool = True

    def perfusion(self, name: str = "Perfusion") -> StudyCurve:
        """Return Perfusion's own curve, under a name that suits the study."""
        return make_curve(name, PERFUSION, biases=self.biases)

    def compared(self, name: str, method: Method = PERFUSION, **settings: bool) -> StudyCurve:
        """Return a curve that Perfusion's own is compared with."""
        return make_curve(name, method, biases=self.comparison_biases, **settings)

    def encoded(self) -> list[Method]:
        """Return the methods that begin with the encoder's prediction, if there is an encoder."""
        return [PREDICTED, REFINED] if self.has_encoder else []

    @property
    def can_make_scenes(self) -> bool:
        """Whether the settings of `WITH_SCENES` suit the base model and its config."""
        return self.has_encoder and self.has_used_layers

    def all_layers(self, biases: Sequence[float]) -> list[StudyCurve]:
        """Return Perfusion with the target outputs of all layers, if its config does not use all layers anyway."""
        if not self.has_used_layers:
            return []
        return [make_curve("Perfusion, all layers", PERFUSION, biases=tuple(biases), all_layers=True)]

    def with_projection(self, method: Method) -> Method:
        """Return `method`, or Perfusion if its config has the same projection, so that nothing is trained twice."""
        return PERFUSION if f"model.params.projection={self.projection}" in method.overrides else method


@dataclass(frozen=True)
class StudyEntry:
    """A registered study.

    Attributes:
        title, kind: as in `Study`.
        make_curves: returns the curves.
    """

    title: str
    kind: StudyKind
    make_curves: Callable[[StudyInputs], list[StudyCurve]]


STUDIES: dict[str, StudyEntry] = {}  # key -> entry, in the order of the summary


def register_study(key: str, title: str, kind: StudyKind = "trade-off"
                   ) -> Callable[[Callable[[StudyInputs], list[StudyCurve]]], Callable]:
    """Return a decorator that registers a function as the study `key`; the other arguments are as in `Study`."""

    def register(make_curves: Callable[[StudyInputs], list[StudyCurve]]) -> Callable:
        STUDIES[key] = StudyEntry(title, kind, make_curves)
        return make_curves

    return register


def build_studies(inputs: StudyInputs) -> dict[str, Study]:
    """Return all studies by their keys, in the order of `STUDIES`."""
    return {key: Study(key, entry.title, tuple(entry.make_curves(inputs)), entry.kind)
            for key, entry in STUDIES.items()}


@register_study("baselines", "Perfusion against the baselines")
def _baselines(inputs: StudyInputs) -> list[StudyCurve]:
    return [inputs.perfusion(), *inputs.all_layers(inputs.comparison_biases),
            *_points(*inputs.baselines, BASE_MODEL)]


@register_study("locking", "Local lock, global lock, trained keys")
def _locking(inputs: StudyInputs) -> list[StudyCurve]:
    return [inputs.perfusion("local lock"), inputs.compared("global lock", global_locking=True),
            inputs.compared("trained keys", TRAINED_KEYS)]


@register_study("projection", "What the gate removes: gated, or everything as in Eq. 3")
def _projection(inputs: StudyInputs) -> list[StudyCurve]:
    curves = []
    for projection in (GATED_PROJECTION, FULL_PROJECTION):
        method = inputs.with_projection(projection)
        biases = inputs.biases if method == PERFUSION else inputs.comparison_biases
        curves.append(make_curve(projection.name, method, biases=biases))
    return curves


@register_study("values", "Target outputs: of the layers in use, of all layers, and by Eq. 3 as in the paper")
def _values(inputs: StudyInputs) -> list[StudyCurve]:
    curves = [inputs.perfusion(), *inputs.all_layers(inputs.comparison_biases)]
    full = inputs.with_projection(FULL_PROJECTION)
    if full != PERFUSION:
        curves.append(inputs.compared(PAPERS_RULE, full, all_layers=inputs.has_used_layers))
    return [*curves, *_points(*_combinable(inputs.baselines), BASE_MODEL)]


@register_study("masks", "With and without the mask loss")
def _masks(inputs: StudyInputs) -> list[StudyCurve]:
    return [inputs.perfusion("with masks"), inputs.compared("no masks", NO_MASKS)]


@register_study("one_photo", "One photo against all")
def _one_photo(inputs: StudyInputs) -> list[StudyCurve]:
    return [inputs.perfusion("all photos"), inputs.compared("one photo", ONE_PHOTO)]


@register_study("training_bias", "Training bias")
def _training_bias(inputs: StudyInputs) -> list[StudyCurve]:
    return [inputs.perfusion(f"trained at bias {TRAINING_BIAS:g}"),
            inputs.compared(f"trained at bias {LOWER_TRAINING_BIAS:g}", LOWER_BIAS)]


@register_study("temperature", "Inference temperature")
def _temperature(inputs: StudyInputs) -> list[StudyCurve]:
    middle = inputs.comparison_biases[len(inputs.comparison_biases) // 2]
    points = [StudyCurve(f"temperature {value:g}", (Variant(PERFUSION, middle, value),)) for value in TEMPERATURES]
    return [inputs.perfusion("temperature of training"), *points]


@register_study("encoder", "Concepts predicted from photos, with and without a few steps")
def _encoder(inputs: StudyInputs) -> list[StudyCurve]:
    others = [*inputs.encoded(), FROM_NOTHING] if inputs.has_encoder else []
    return [inputs.perfusion(), *(inputs.compared(method.name, method) for method in others)]


@register_study("encoder_settings", "The encoder at other strengths, from one photo, and as the start of all steps")
def _encoder_settings(inputs: StudyInputs) -> list[StudyCurve]:
    if not inputs.has_encoder:
        return [inputs.perfusion()]
    curves = _points(PREDICTED, *PREDICTED_AT, PREDICTED_FROM_ONE, STARTED_FROM_ENCODER, PERFUSION)
    if inputs.has_used_layers:
        curves += [make_curve(f"{method.name}, all layers", method, all_layers=True)
                   for method in (STARTED_FROM_ENCODER, PERFUSION)]
    return curves


@register_study("scenes", "A share of all layers, without and with training scenes beside other things")
def _scenes(inputs: StudyInputs) -> list[StudyCurve]:
    others = [SHARES_LAYERS, WITH_SCENES] if inputs.can_make_scenes else []
    curves = [inputs.perfusion(), *(inputs.compared(method.name, method) for method in others)]
    return curves + (inputs.all_layers(inputs.comparison_biases) if others else [])


@register_study("two_concepts", "Two concepts, trained separately, in one image", "pairs")
def _two_concepts(inputs: StudyInputs) -> list[StudyCurve]:
    curves = [make_curve("Perfusion", PERFUSION, biases=inputs.pair_biases), *inputs.all_layers(inputs.pair_biases)]
    variants = [variant for curve in curves for variant in curve.variants]
    variants += [Variant(method) for method in inputs.encoded()]
    variants += [Variant(WITH_SCENES)] if inputs.can_make_scenes else []
    variants += [Variant(method) for method in (*_combinable(inputs.baselines), BASE_MODEL)]
    # Each variant is a bar of its own.
    return [StudyCurve(variant.name, (variant,)) for variant in variants]


@register_study("cost", "What a concept costs", "cost")
def _cost(inputs: StudyInputs) -> list[StudyCurve]:
    return _points(PERFUSION, *inputs.baselines)


def _points(*methods: Method) -> list[StudyCurve]:
    """Return a single point for each method, used as it was trained."""
    return [make_curve(method.name, method) for method in methods]


def _combinable(methods: Sequence[Method]) -> list[Method]:
    return [method for method in methods if method.combinable]
