"""What the paper compares: methods, the settings that their concepts are drawn at, and the studies made of these.

The paper is Tewel, Gal, Chechik, Atzmon, "Key-Locked Rank One Editing for Text-to-Image Personalization" (SIGGRAPH
2023, arXiv 2305.01644). A method is a training run of `main.py` that differs from that of Perfusion's config in a file
or a few keys. A setting is a method's concepts drawn in one way. A curve is a row of settings that differ in the bias
alone. Settings that several studies share are drawn once.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from evaluation.output.table import slug
from evaluation.sweeps.samples import Manner

BASELINES = Path(__file__).resolve().parents[2] / "configs" / "baselines"
PUBLIC = ("perfusion-sd", "perfusion-ldm")  # so begin the names of configs whose baselines have rates of their own
TRAINING_BIAS = 0.75  # of configs/perfusion.yaml


@dataclass(frozen=True)
class Method:
    """One way of teaching a concept.

    Attributes:
        baseline: name of the config in `configs/baselines/` that replaces Perfusion; None: Perfusion.
        overrides: key=value pairs for main.py.
        masks: whether the masks of Perfusion's config are used; baselines never use any.
        photos: of so many photos, the first ones; None: of all.
        taught: False is the base model itself, which draws the super-category.
    """

    name: str
    baseline: str | None = None
    overrides: tuple[str, ...] = ()
    masks: bool = True
    photos: int | None = None
    taught: bool = True

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return slug(self.name)

    @property
    def gated(self) -> bool:
        """Whether its concepts have a bias and a temperature."""
        return self.taught and self.baseline is None

    def configs(self, perfusion: str | Path) -> list[str]:
        """The files for --base."""
        public = Path(perfusion).name.startswith(PUBLIC)
        return [str(perfusion), *([str(BASELINES / f"{self.baseline}{'-sd' * public}.yaml")] if self.baseline else [])]


@dataclass(frozen=True)
class Setting:
    """A method's concepts, drawn in one way; None: as they were trained."""

    method: Method
    bias: float | None = None
    temperature: float | None = None
    global_locking: bool = False
    all_layers: bool = False

    @property
    def label(self) -> str:
        """What is set, such as "bias 0.75, temperature 0.15"."""
        parts = [f"{name} {value:g}" for name, value in (("bias", self.bias), ("temperature", self.temperature))
                 if value is not None]
        return ", ".join([*parts, *(["global lock"] if self.global_locking else []),
                          *(["all layers"] if self.all_layers else [])])

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.method.name, self.label) if part)

    def manner(self, usual: Manner) -> Manner:
        """`usual` with what is set here."""
        return replace(usual, bias=self.bias, temperature=self.temperature, global_locking=self.global_locking,
                       all_layers=self.all_layers)


@dataclass(frozen=True)
class Curve:
    """Settings of one method that differ in the bias, or a single one."""

    name: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Study:
    """One comparison of the paper.

    Attributes:
        kind: "trade-off", of text- against image-similarity; "pairs", two concepts in a picture; "cost", of training.
    """

    key: str
    title: str
    curves: tuple[Curve, ...]
    kind: Literal["trade-off", "pairs", "cost"] = "trade-off"

    @property
    def settings(self) -> list[Setting]:
        """Each once, in order."""
        return list(dict.fromkeys(setting for curve in self.curves for setting in curve.settings))

    @property
    def methods(self) -> list[Method]:
        """Those that are trained, each once, in order."""
        return list(dict.fromkeys(setting.method for setting in self.settings if setting.method.taught))


BASE = Method("base model", taught=False)
PERFUSION = Method("Perfusion")
TRAINED_KEYS = Method("trained keys", overrides=("model.params.locking=trained",))
BY_PROJECTION = {name: Method(f"{name} projection", overrides=(f"model.params.projection={name}",))
                 for name in ("gated", "full")}
GATED, FULL = BY_PROJECTION.values()
NO_MASKS = Method("no masks", masks=False)
ONE_PHOTO = Method("one photo", photos=1)
TEXTUAL_INVERSION = Method("Textual Inversion", "textual-inversion")
FOUR_VECTORS = Method("Textual Inversion, 4 vectors", "textual-inversion", ("model.params.vectors_per_word=4",))
CUSTOM_DIFFUSION = Method("Custom Diffusion", "custom-diffusion")
DREAMBOOTH = Method("DreamBooth", "dreambooth")
POINTS = (TEXTUAL_INVERSION, FOUR_VECTORS, CUSTOM_DIFFUSION, DREAMBOOTH)
LOWER_TRAINING_BIAS = 0.4  # beside TRAINING_BIAS
LOWER_BIAS = Method(f"training bias {LOWER_TRAINING_BIAS:g}",
                    overrides=(f"model.params.bias={LOWER_TRAINING_BIAS:g}",))
TEMPERATURES = (0.05, 0.15)  # beside that of training
PAPER = "the paper's rule"
STUDY_KEYS = ("baselines", "locking", "projection", "values", "masks", "one_photo", "training_bias", "temperature",
              "two_concepts", "cost")


def studies(biases: Sequence[float], others: Sequence[float], pair_biases: Sequence[float],
            rule: Mapping[str, Any] | None = None) -> dict[str, Study]:
    """All studies by their keys, in the order of `STUDY_KEYS`.

    Args:
        biases: of Perfusion's own curve.
        others: some of them, for the curves that it is compared with.
        pair_biases: for two concepts in one picture.
        rule: `projection` and `used_layers` of Perfusion's config, whose concepts then need not be taught once more to
            be compared; None: not known.
    """
    rule = rule or {}
    gated, full = (PERFUSION if name == rule.get("projection") else method for name, method in BY_PROJECTION.items())

    def every_layer(biases: Iterable[float]) -> tuple[Curve, ...]:
        """Perfusion's concepts with what all layers learned, where they are not drawn so anyway."""
        made = curve("Perfusion, all layers", PERFUSION, biases, all_layers=True)
        return (made,) if rule.get("used_layers") else ()

    def own(name: str = "Perfusion") -> Curve:
        return curve(name, PERFUSION, biases)

    middle = others[len(others) // 2]
    softer = [Curve(f"temperature {value:g}", (Setting(PERFUSION, middle, value),)) for value in TEMPERATURES]
    paper = curve(PAPER, full, others, all_layers=bool(rule.get("used_layers")))
    together = (curve("Perfusion", PERFUSION, pair_biases), *every_layer(pair_biases))
    merged = [*(setting for one in together for setting in one.settings),
              Setting(TEXTUAL_INVERSION), Setting(CUSTOM_DIFFUSION), Setting(BASE)]
    made = (
        Study("baselines", "Perfusion against the baselines",
              (own(), *every_layer(others), *(Curve(method.name, (Setting(method),)) for method in (*POINTS, BASE)))),
        Study("locking", "Local lock, global lock, trained keys",
              (own("local lock"), curve("global lock", PERFUSION, others, global_locking=True),
               curve("trained keys", TRAINED_KEYS, others))),
        Study("projection", "What the gate takes out: gated, or all as in Eq. 3",
              tuple(curve(name.name, method, biases if method == PERFUSION else others)
                    for name, method in ((GATED, gated), (FULL, full)))),
        Study("values", "Target outputs: of the layers in use, of all, and by Eq. 3 as in the paper",
              (own(), *every_layer(others), *((paper,) if paper.settings[0].method != PERFUSION else ()),
               *(Curve(method.name, (Setting(method),)) for method in (TEXTUAL_INVERSION, CUSTOM_DIFFUSION, BASE)))),
        Study("masks", "With and without the mask loss",
              (own("with masks"), curve("no masks", NO_MASKS, others))),
        Study("one_photo", "One photo against all",
              (own("all photos"), curve("one photo", ONE_PHOTO, others))),
        Study("training_bias", "Training bias",
              (own(f"trained at bias {TRAINING_BIAS:g}"),
               curve(f"trained at bias {LOWER_TRAINING_BIAS:g}", LOWER_BIAS, others))),
        Study("temperature", "Inference temperature", (own("temperature of training"), *softer)),
        Study("two_concepts", "Two concepts, trained apart, in one picture",
              tuple(Curve(setting.name, (setting,)) for setting in merged), "pairs"),
        Study("cost", "What a concept costs",
              tuple(Curve(method.name, (Setting(method),)) for method in (PERFUSION, *POINTS)), "cost"),
    )
    return {study.key: study for study in made}


def curve(name: str, method: Method, biases: Iterable[float], global_locking: bool = False,
          all_layers: bool = False) -> Curve:
    return Curve(name, tuple(Setting(method, bias, None, global_locking, all_layers) for bias in biases))
