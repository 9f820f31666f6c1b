"""What is compared: every method is a run that main.py takes, and what studies share is one setting."""
from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation import reproduce
from evaluation.samples import Manner
from evaluation.studies import (
    FULL,
    GATED,
    LOOKS,
    PAPER,
    PERFUSION,
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
    assert len({method.slug for method in METHODS}) == len(METHODS) == 15
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
    study = studies((0.4, 0.9), (0.4, 0.9), (0.5,), {"projection": "gated"})["projection"]
    assert [curve.name for curve in study.curves] == [GATED.name, FULL.name]
    assert study.methods == [PERFUSION, FULL]
    assert OmegaConf.load(CONFIG).model.params.projection == "gated"


@pytest.mark.parametrize(("rule", "names", "methods"), [
    (("gated", "plain", ["output_blocks.3"]), ["Perfusion", "Perfusion, all layers"], [PERFUSION, LOOKS, PAPER]),
    (("full", "plain", None), ["Perfusion"], [PERFUSION, LOOKS]),
    (("gated", "plain", None), ["Perfusion"], [PERFUSION, LOOKS, PAPER])])
def test_what_perfusion_is_compared_with_depends_on_its_config(rule: tuple, names: list[str], methods: list[Method]
                                                               ) -> None:
    made = studies((0.4, 0.9), (0.4, 0.9), (0.5,), dict(zip(("projection", "value_axes", "used_layers"), rule,
                                                            strict=True)))
    values = made["values"]
    assert [curve.name for curve in values.curves[:-3]] == [*names, LOOKS.name, PAPER.name]
    assert [method for method in values.methods if method.gated] == methods
    assert [curve.name for curve in made["baselines"].curves[:len(names)]] == names
    pairs = [setting.all_layers for setting in made["two_concepts"].settings if setting.method.gated]
    assert pairs == [False, True][:len(names)]


def test_rules_that_perfusion_is_compared_with_say_all_in_which_they_differ() -> None:
    """They are the same whatever the config is."""
    params = OmegaConf.load(CONFIG).model.params
    for method in (LOOKS, PAPER):
        given = OmegaConf.from_dotlist(list(method.overrides)).model.params
        assert {"value_axes", "initial_look", "value_lr", "value_decay", "embedding_lr", "used_layers"} <= set(given)
        assert given.used_layers is None and params.used_layers == ["output_blocks.3"]


def test_settings_change_what_is_drawn() -> None:
    usual = Manner(scale=4.0, steps=9)
    changed = Setting(PERFUSION, 0.6, 0.15, True, True).manner(usual)
    assert (changed.bias, changed.temperature, changed.global_locking, changed.steps) == (0.6, 0.15, True, 9)
    assert changed.all_layers
    assert Setting(POINTS[0]).manner(usual) == usual
    assert Setting(PERFUSION, 0.6, 0.15, True).name == "Perfusion, bias 0.6, temperature 0.15, global lock"
    assert Setting(PERFUSION, 0.6, all_layers=True).name == "Perfusion, bias 0.6, all layers"
