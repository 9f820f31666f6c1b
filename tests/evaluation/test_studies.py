"""What is compared: every method is a run that main.py takes, and what studies share is one setting."""
from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation import reproduce
from evaluation.paper.studies import (
    FULL,
    GATED,
    LOWER_BIAS,
    PAPER,
    PERFUSION,
    POINTS,
    STUDY_KEYS,
    TRAINING_BIAS,
    Method,
    Setting,
    studies,
)
from evaluation.sweeps.samples import Manner
from ldm.cli.training import parse_training_options
from ldm.training.config import read_config

ALL = studies((0.4, 0.6, 0.75, 0.9, 1.1), (0.4, 0.75, 1.1), (0.4, 0.6))
METHODS = list(dict.fromkeys(method for study in ALL.values() for method in study.methods))
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "perfusion.yaml"


def test_the_script_offers_all_studies() -> None:
    assert tuple(ALL) == STUDY_KEYS == reproduce.STUDIES


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_every_method_is_a_config_of_its_own(method: Method) -> None:
    config = read_config(parse_training_options(["--base", *method.configs(CONFIG), *method.overrides]))
    plain = OmegaConf.load(CONFIG)
    assert (config.model.target == plain.model.target) == method.gated
    for override in method.overrides:
        key, _, value = override.partition("=")
        assert OmegaConf.select(config, key) == OmegaConf.from_dotlist([f"value={value}"]).value


@pytest.mark.parametrize("method", POINTS, ids=lambda method: method.slug)
def test_baselines_of_public_models_have_rates_of_their_own(method: Method) -> None:
    for perfusion, ending in (("perfusion.yaml", ""), ("perfusion-sd-v1.yaml", "-sd"), ("perfusion-ldm.yaml", "-sd")):
        _, file = method.configs(CONFIG.with_name(perfusion))
        assert Path(file).is_file() and Path(file).stem == f"{method.baseline}{ending}"


def test_names_are_told_apart() -> None:
    assert len({method.slug for method in METHODS}) == len(METHODS) == 11
    for study in ALL.values():
        assert len({setting.name for setting in study.settings}) == len(study.settings)
        assert len({curve.name for curve in study.curves}) == len(study.curves)


def test_comparisons_share_perfusions_own_curve() -> None:
    own = set(ALL["baselines"].curves[0].settings)
    for key in ("locking", "masks", "one_photo", "temperature", "training_bias"):
        assert set(ALL[key].curves[0].settings) == own
    assert OmegaConf.load(CONFIG).model.params.bias == TRAINING_BIAS
    trained = {curve.name: curve.settings[0].method for curve in ALL["training_bias"].curves}
    assert trained == {"trained at bias 0.75": PERFUSION, "trained at bias 0.4": LOWER_BIAS}


def test_what_the_config_does_anyway_is_not_taught_once_more() -> None:
    study = studies((0.4, 0.9), (0.4, 0.9), (0.5,), {"projection": "gated"})["projection"]
    assert [curve.name for curve in study.curves] == [GATED.name, FULL.name]
    assert study.methods == [PERFUSION, FULL]
    assert OmegaConf.load(CONFIG).model.params.projection == "gated"


@pytest.mark.parametrize(("projection", "used_layers", "names", "methods"), [
    ("gated", ["output_blocks.3"], ["Perfusion", "Perfusion, all layers", PAPER], [PERFUSION, FULL]),
    ("gated", None, ["Perfusion", PAPER], [PERFUSION, FULL]),
    ("full", ["output_blocks.3"], ["Perfusion", "Perfusion, all layers"], [PERFUSION]),
    ("full", None, ["Perfusion"], [PERFUSION])])
def test_what_perfusion_is_compared_with_depends_on_its_config(
        projection: str, used_layers: list[str] | None, names: list[str], methods: list[Method]) -> None:
    made = studies((0.4, 0.9), (0.4, 0.9), (0.5,), {"projection": projection, "used_layers": used_layers})
    values, inner = made["values"], [False, True][:1 + bool(used_layers)]
    assert [curve.name for curve in values.curves[:-3]] == names
    assert [method for method in values.methods if method.gated] == methods
    assert [setting.all_layers for setting in made["two_concepts"].settings if setting.method.gated] == inner
    by_name = {curve.name: curve for curve in values.curves}
    for setting in by_name[PAPER].settings if PAPER in names else ():
        assert (setting.method, setting.all_layers) == (FULL, bool(used_layers))  # all layers, as in the paper


def test_settings_change_what_is_drawn() -> None:
    usual = Manner(scale=4.0, steps=9)
    changed = Setting(PERFUSION, 0.6, 0.15, True, True).manner(usual)
    assert (changed.bias, changed.temperature, changed.global_locking, changed.steps) == (0.6, 0.15, True, 9)
    assert changed.all_layers
    assert Setting(POINTS[0]).manner(usual) == usual
    assert Setting(PERFUSION, 0.6, 0.15, True).name == "Perfusion, bias 0.6, temperature 0.15, global lock"
    assert Setting(PERFUSION, 0.6, all_layers=True).name == "Perfusion, bias 0.6, all layers"
