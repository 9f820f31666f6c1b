"""Verdicts on measurements that are made up, so that what is true is known."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evaluation import statements
from evaluation.intervals import Figure
from evaluation.statements import NOT_SEEN, SEEN, UNDECIDED, Found, verdict_of, verdict_of_gap, verdicts
from evaluation.studies import (
    BASE,
    CUSTOM_DIFFUSION,
    DREAMBOOTH,
    NO_MASKS,
    PERFUSION,
    TEXTUAL_INVERSION,
    TRAINED_KEYS,
    Setting,
    Study,
    studies,
)
from evaluation.teaching import Cost
from evaluation.tradeoff import Gap

BIASES = (0.4, 0.75, 1.1)
ALL = studies(BIASES, BIASES, (0.4, 0.6))
Row = dict[str, float | str]
Made = Callable[[Setting], Row]
# A front on which text and image similarity add up to 100, whatever the bias.
FRONT = {0.4: 20.0, 0.75: 23.0, 1.1: 27.0}


def made(study: Study, row: Made, noise: float = 0.3) -> Found:
    """What is measured where `row` gives the means of each setting."""
    rows = {}
    for place, setting in enumerate(study.settings):
        for subject in ("cat", "owl", "car"):
            draw = np.random.default_rng((place, len(subject)))
            rows[setting, subject] = [
                {name: value + draw.normal(0, noise) for name, value in row(setting).items()}
                | {"prompt": f"prompt {number // 2}"} for number in range(12)]
    return Found(rows, {})


def on_the_front(setting: Setting, less: float = 0.0) -> Row:
    text = FRONT[setting.bias]
    return {"text": text - less, "image": 100 - text}


def said(key: str, row: Made, **settings: float) -> dict[str, str]:
    """Statement -> verdict."""
    return {one.statement: one.verdict for one in verdicts(ALL[key], made(ALL[key], row, **settings))}


@pytest.mark.parametrize(("low", "high", "verdict"), [
    (0.1, 3.0, SEEN), (-3.0, -0.1, NOT_SEEN), (-1.0, 1.0, UNDECIDED), (-0.2, 0.2, NOT_SEEN), (-0.1, 0.8, UNDECIDED),
    (0.05, 0.2, SEEN)])
def test_the_rule(low: float, high: float, verdict: str) -> None:
    assert verdict_of(Figure((low + high) / 2, low, high)) == verdict


@pytest.mark.parametrize(("where", "sign", "verdict"), [
    ("inside", 1, SEEN), ("inside", -1, NOT_SEEN), ("beyond", 1, UNDECIDED), ("beyond", -1, NOT_SEEN),
    ("below", 1, SEEN), ("below", -1, UNDECIDED)])
def test_outside_of_a_curve_only_one_verdict_is_possible(where: str, sign: int, verdict: str) -> None:
    assert verdict_of_gap(Gap(Figure(sign * 2.0, sign * 2.0 - 1, sign * 2.0 + 1), where)) == verdict


def test_baselines_are_below_the_curve_or_not() -> None:
    def row(setting: Setting) -> Row:
        if setting.method.gated:
            return on_the_front(setting)
        return {TEXTUAL_INVERSION: {"text": 20.0, "image": 77.0}, CUSTOM_DIFFUSION: {"text": 26.0, "image": 77.0},
                DREAMBOOTH: {"text": 19.5, "image": 85.0}}.get(setting.method, {"text": 23.0, "image": 77.0})

    found = said("baselines", row)
    assert found["Perfusion is above Textual Inversion"] == SEEN
    assert found["Perfusion is above Custom Diffusion"] == NOT_SEEN
    assert found["Perfusion is above DreamBooth"] == UNDECIDED  # more like the concept than any bias makes it
    assert found["a higher bias follows the prompt more"] == found["a higher bias is less like the concept"] == SEEN
    assert not any(BASE.name in statement for statement in found)


def test_a_step_back_is_not_monotone() -> None:
    def row(setting: Setting) -> Row:
        text = {0.4: 20.0, 0.75: 28.0, 1.1: 27.0}.get(setting.bias, 20.0)
        return {"text": text, "image": 100 - text}

    assert said("baselines", row)["a higher bias follows the prompt more"] == NOT_SEEN


def test_locks_are_compared_at_equal_bias_and_keys_at_equal_image_similarity() -> None:
    def row(setting: Setting) -> Row:
        shift = 2.0 * setting.global_locking
        plain = on_the_front(setting, less=1.0 * (setting.method == TRAINED_KEYS))
        return {"text": plain["text"] + shift, "image": plain["image"] - shift}

    assert set(said("locking", row).values()) == {SEEN}


@pytest.mark.parametrize(("lost", "verdict"), [(1.5, SEEN), (-1.5, NOT_SEEN), (0.0, NOT_SEEN)])
def test_masks_raise_text_similarity_or_not(lost: float, verdict: str) -> None:
    found = said("masks", lambda setting: on_the_front(setting, lost * (setting.method == NO_MASKS)))
    assert found["masks raise text similarity"] == verdict


def test_too_much_noise_decides_nothing() -> None:
    found = said("masks", lambda setting: on_the_front(setting, 0.5 * (setting.method == NO_MASKS)), noise=12.0)
    assert found["masks raise text similarity"] == UNDECIDED


def test_one_photo_training_bias_and_temperature() -> None:
    one = said("one_photo", lambda setting: on_the_front(setting, 2.0 * (setting.method.photos == 1)))
    assert set(one.values()) == {SEEN}

    def trained(setting: Setting) -> Row:
        return on_the_front(setting, 2.0 * (setting.method.name == "training bias 0.4"))

    assert set(said("training_bias", trained).values()) == {SEEN}

    def softer(setting: Setting) -> Row:
        return on_the_front(setting, -2.0 * (setting.temperature == statements.TEMPERATURE))

    assert set(said("temperature", softer).values()) == {SEEN}


def test_two_concepts_at_the_better_bias() -> None:
    shares = {PERFUSION: 70.0, TEXTUAL_INVERSION: 30.0, CUSTOM_DIFFUSION: 80.0}

    def row(setting: Setting) -> Row:
        return {"own": shares.get(setting.method, 0.0) - 40.0 * (setting.bias == 0.4)}

    found = said("two_concepts", row)
    assert list(found.values()) == [SEEN, SEEN, NOT_SEEN]


def test_what_a_concept_costs() -> None:
    study = ALL["cost"]
    sizes = dict.fromkeys(study.methods, 1000000) | {PERFUSION: 5_000, TEXTUAL_INVERSION: 600}
    found = Found({}, {method: [Cost(10.0, 100, sizes[method])] for method in study.methods})
    first, second = verdicts(study, found)
    assert (first.verdict, first.numbers, second.verdict) == (SEEN, "5.0 KB", SEEN)
    assert "Custom Diffusion 1000.0 KB, 200 times" in second.numbers


def test_clusters_are_prompts_of_concepts_in_one_order_for_all_settings() -> None:
    first, second = Setting(PERFUSION, 0.4), Setting(PERFUSION, 0.6)
    rows = [{"prompt": "b", "text": 1.0}, {"prompt": "b", "text": 3.0}, {"prompt": "a", "text": 5.0}]
    found = Found({(first, "owl"): rows, (first, "cat"): rows[2:], (second, "cat"): rows[:1],
                   (second, "owl"): rows[::-1]}, {})
    assert found.clusters(first, "text").tolist() == [5.0, 5.0, 2.0]
    assert found.clusters(second, "text").tolist() == [1.0, 5.0, 2.0]
