"""What is compared: every method is a run that main.py takes, and what studies share is one setting."""
from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation import reproduce
from evaluation.samples import Manner
from evaluation.studies import (
    FREE,
    FULL,
    GATED,
    LOOKS,
    PAPER,
    PERFUSION,
    PLAIN_START,
    POINTS,
    STUDY_KEYS,
    TRAINING_BIAS,
    Method,
    Setting,
    studies,
)
from ldm.training.options import get_parser, read_config

ALL = studies((0.4, 0.6, 0.75, 0.9, 1.1), (0.4, 0.75, 1.1), (0.4, 0.6))
METHODS = list(dict.fromkeys(method for study in ALL.values() for method in study.methods))
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "perfusion.yaml"


def test_the_script_offers_all_studies() -> None:
    assert tuple(ALL) == STUDY_KEYS == reproduce.STUDIES


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_every_method_is_a_config_of_its_own(method: Method) -> None:
    config = read_config(get_parser().parse_args(["--base", *method.configs(CONFIG)]), list(method.overrides))
    plain = OmegaConf.load(CONFIG)
    assert (config.model.target == plain.model.target) == method.gated
    for override in method.overrides:
        key, _, value = override.partition("=")
        assert OmegaConf.select(config, key) == OmegaConf.from_dotlist([f"value={value}"]).value


def test_names_are_told_apart() -> None:
    assert len({method.slug for method in METHODS}) == len(METHODS) == 17
    for study in ALL.values():
        assert len({setting.name for setting in study.settings}) == len(study.settings)
        assert len({curve.name for curve in study.curves}) == len(study.curves)


def test_comparisons_share_perfusions_own_curve() -> None:
    own = set(ALL["baselines"].curves[0].settings)
    for key in ("locking", "masks", "one_photo", "temperature"):
        assert set(ALL[key].curves[0].settings) <= own
    assert OmegaConf.load(CONFIG).model.params.bias == TRAINING_BIAS
    trained = {curve.name: curve.settings[0].method for curve in ALL["training_bias"].curves}
    assert list(trained) == [f"trained at bias {bias:g}" for bias in (0.4, 0.6, 0.75, 0.9)]
    assert trained["trained at bias 0.75"] == PERFUSION


def test_what_the_config_does_anyway_is_not_taught_once_more() -> None:
    study = studies((0.4, 0.9), (0.4, 0.9), (0.5,), "gated")["projection"]
    assert [curve.name for curve in study.curves] == [GATED.name, FULL.name]
    assert study.methods == [PERFUSION, FULL]
    assert OmegaConf.load(CONFIG).model.params.projection == "gated"


@pytest.mark.parametrize(("projection", "axes", "methods"), [
    ("gated", "looks", [PERFUSION, PLAIN_START, FREE, PAPER]),
    ("gated", "plain", [LOOKS, PLAIN_START, PERFUSION, PAPER]),
    ("full", "plain", [LOOKS, PLAIN_START, PERFUSION]), (None, None, [LOOKS, PLAIN_START, FREE, PAPER])])
def test_the_papers_rule_is_the_configs_own_or_not(projection: str | None, axes: str | None, methods: list[Method]
                                                   ) -> None:
    study = studies((0.4, 0.9), (0.4, 0.9), (0.5,), projection, axes)["values"]
    assert [curve.name for curve in study.curves[:4]] == [each.name for each in (LOOKS, PLAIN_START, FREE, PAPER)]
    assert [method for method in study.methods if method.gated] == methods


def test_values_along_looks_are_learned_as_by_the_config() -> None:
    params = OmegaConf.load(CONFIG).model.params
    given = OmegaConf.from_dotlist(list(LOOKS.overrides)).model.params
    assert len(given) == 4 and {key: params[key] for key in given} == given


def test_settings_change_what_is_drawn() -> None:
    usual = Manner(scale=4.0, steps=9)
    changed = Setting(PERFUSION, 0.6, 0.15, True).manner(usual)
    assert (changed.bias, changed.temperature, changed.global_locking, changed.steps) == (0.6, 0.15, True, 9)
    assert Setting(POINTS[0]).manner(usual) == usual
    assert Setting(PERFUSION, 0.6, 0.15, True).name == "Perfusion, bias 0.6, temperature 0.15, global lock"
