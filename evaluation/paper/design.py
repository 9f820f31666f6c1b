"""The parts of a comparison: methods, variants of how their concepts are used, curves, and studies.

A method is a training run of `main.py` that differs from a run with Perfusion's config by a config file or a few keys.
A variant is a method together with the settings that its concepts are used with. A curve is a sequence of variants that
differ in the bias alone. A study compares curves; variants that several studies share are generated once.

Imports no torch, so that command lines can list methods and studies at once.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evaluation.output.file_names import slug
from ldm.common.paths import resolve_path

if TYPE_CHECKING:
    from ldm.inference.settings import GenerationSettings

PUBLIC_CONFIGS = ("perfusion-sd", "perfusion-ldm")  # names of Perfusion's configs for public models start like this
PUBLIC_SUFFIX = "-sd"  # added to the name of a method's config for public models

StudyKind = Literal["trade-off", "pairs", "cost"]


@dataclass(frozen=True)
class Method:
    """One way to learn a concept.

    Attributes:
        name: what tables and figures call it; unique.
        config: config file that is merged after Perfusion's; its `model.target` is the method's class. A relative path
            may start at the project's root. If Perfusion's config is for a public model and there is a file of this
            name with "-sd" at its end, that file is used instead, as learning rates differ. None: Perfusion.
        overrides: key=value pairs for `main.py`.
        masks: whether training uses the masks of Perfusion's config; the bundled baselines ignore them.
        photos: number of photos to train on, the first ones; None: all.
        trained: False for the base model, which generates the super-category without any training.
        combinable: whether concepts of separate runs work together in one prompt.
        stores_weights: whether a concept file holds weights of the model.
    """

    name: str
    config: str | None = None
    overrides: tuple[str, ...] = ()
    masks: bool = True
    photos: int | None = None
    trained: bool = True
    combinable: bool = False
    stores_weights: bool = False

    @property
    def key(self) -> str:
        """The name as it stands in file names and on command lines."""
        return slug(self.name)

    @property
    def has_bias(self) -> bool:
        """Whether its concepts have a bias and a temperature."""
        return self.trained and self.config is None

    def configs(self, perfusion_config: str | Path) -> list[str]:
        """Return the config files of a training run, given Perfusion's config for the base model."""
        if self.config is None:
            return [str(perfusion_config)]
        own = resolve_path(self.config)
        public = own.with_name(f"{own.stem}{PUBLIC_SUFFIX}{own.suffix}")
        is_public = Path(perfusion_config).name.startswith(PUBLIC_CONFIGS)
        return [str(perfusion_config), str(public if is_public and public.is_file() else own)]


@dataclass(frozen=True)
class Variant:
    """A method and the settings that its concepts are used with; None keeps the setting of training.

    Attributes:
        method: how the concepts are learned.
        bias, temperature: beta and tau of Perfusion.
        global_locking: lock the keys of the whole prompt.
        all_layers: use the target outputs of all layers.
    """

    method: Method
    bias: float | None = None
    temperature: float | None = None
    global_locking: bool = False
    all_layers: bool = False

    @property
    def label(self) -> str:
        """The settings, for example "bias 0.75, temperature 0.15"."""
        values = (("bias", self.bias), ("temperature", self.temperature))
        parts = [f"{name} {value:g}" for name, value in values if value is not None]
        if self.global_locking:
            parts.append("global lock")
        if self.all_layers:
            parts.append("all layers")
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """The method and the settings."""
        return ", ".join(part for part in (self.method.name, self.label) if part)

    def generation_settings(self, common: GenerationSettings) -> GenerationSettings:
        """Return `common` with the settings of this variant."""
        return replace(common, bias=self.bias, temperature=self.temperature, global_locking=self.global_locking,
                       all_layers=self.all_layers)


@dataclass(frozen=True)
class StudyCurve:
    """One curve or one bar of a study.

    Attributes:
        name: what tables and figures call it.
        variants: one, or several that differ in the bias.
    """

    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
        key: name on the command line and of files.
        title: heading of its table and figure.
        curves: what is compared.
        kind: "trade-off" compares text and image similarity; "pairs" generates two concepts in one image; "cost"
            compares trainings and generates nothing.
    """

    key: str
    title: str
    curves: tuple[StudyCurve, ...]
    kind: StudyKind = "trade-off"

    @property
    def variants(self) -> list[Variant]:
        """All variants, in order, each once."""
        return list(dict.fromkeys(variant for curve in self.curves for variant in curve.variants))

    @property
    def methods(self) -> list[Method]:
        """All methods that need training, in order, each once."""
        return list(dict.fromkeys(variant.method for variant in self.variants if variant.method.trained))


def make_curve(name: str, method: Method, *, biases: tuple[float, ...] | None = None, global_locking: bool = False,
               all_layers: bool = False) -> StudyCurve:
    """Make a curve with one variant for each bias, or with a single variant if the method has no bias."""
    steps = (None,) if biases is None else biases
    return StudyCurve(name, tuple(Variant(method, bias, None, global_locking, all_layers) for bias in steps))
