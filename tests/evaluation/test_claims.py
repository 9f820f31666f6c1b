"""Verdicts on measurements that are made up, so that what is true is known."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evaluation.paper import claims as statements
from evaluation.paper.claims import NOT_SEEN, SEEN, UNDECIDED, Found, verdict_of, verdict_of_gap, verdicts
from evaluation.paper.studies import (
    BASE,
    CUSTOM_DIFFUSION,
    DREAMBOOTH,
    FULL,
    NO_MASKS,
    PERFUSION,
    TEXTUAL_INVERSION,
    TRAINED_KEYS,
    Setting,
    Study,
    studies,
)
from evaluation.paper.training_runs import Cost
from evaluation.stats.intervals import Estimate
from evaluation.stats.tradeoff import Gap

BIASES = (0.4, 0.75, 1.1)
RULE = {"projection": "gated", "used_layers": ["output_blocks.3"]}
ALL = studies(BIASES, BIASES[:2], (0.5, 0.6), RULE)
CONCEPTS = ("cat", "owl", "car", "mug", "robot")
RING = [(first, CONCEPTS[place - 4]) for place, first in enumerate(CONCEPTS)]
Row = dict[str, float | str]
Made = Callable[[Setting], Row]
# A front on which text and image similarity add up to 100, whatever the bias.
FRONT = {0.4: 20.0, 0.75: 23.0, 1.1: 27.0}


def made(study: Study, row: Made, noise: float = 0.3, concepts: int = 5) -> Found:
    """What is measured where `row` gives the means of each setting."""
    subjects = RING if study.kind == "pairs" else [(name,) for name in CONCEPTS[:concepts]]
    draw = np.random.default_rng(0)
    return Found({(setting, names): [
        {name: value + draw.normal(0, noise) for name, value in row(setting).items()}
        | {"template": f"prompt {number // 2}"} for number in range(12)]
        for setting in study.settings for names in subjects}, {})


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
    assert verdict_of(Estimate((low + high) / 2, low, high)) == verdict


@pytest.mark.parametrize(("beyond", "below", "sign", "verdict"), [
    (0.02, 0, 1, SEEN), (0, 0.02, -1, NOT_SEEN), (0.03, 0, 1, UNDECIDED), (0.03, 0, -1, NOT_SEEN),
    (0, 0.03, 1, SEEN), (0, 0.03, -1, UNDECIDED), (0.5, 0.5, 1, UNDECIDED), (0.5, 0.5, -1, UNDECIDED)])
def test_outside_of_a_curve_only_one_verdict_is_possible(beyond: float, below: float, sign: int, verdict: str) -> None:
    assert verdict_of_gap(Gap(Estimate(sign * 2.0, sign * 2.0 - 1, sign * 2.0 + 1), beyond, below)) == verdict


def test_outside_of_a_curve_a_small_difference_decides_nothing() -> None:
    small = Estimate(0.0, -0.2, 0.2)
    assert (verdict_of_gap(Gap(small)), verdict_of_gap(Gap(small, beyond=0.1))) == (NOT_SEEN, UNDECIDED)


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


def test_a_curve_goes_on_where_all_layers_are_drawn_with() -> None:
    """By which alone an image similarity of 85 is reached; what is said of higher biases is of the layers in use."""
    def row(setting: Setting) -> Row:
        if setting.method.gated:
            more = 8.0 * setting.all_layers
            return {"text": FRONT[setting.bias] - more, "image": 100 - FRONT[setting.bias] + more}
        return {"text": 13.0, "image": 85.0} if setting.method == DREAMBOOTH else {"text": 23.0, "image": 77.0}

    found = said("baselines", row)
    assert found["Perfusion is above DreamBooth"] == found["a higher bias follows the prompt more"] == SEEN


@pytest.mark.parametrize(("image", "verdict"), [(70.0, SEEN), (76.0, NOT_SEEN)])
def test_likeness_is_compared_at_equal_text_similarity(image: float, verdict: str) -> None:
    """Where a hardly taught method has its text similarity, the curve has an image similarity of 73 to 74."""
    def row(setting: Setting) -> Row:
        return on_the_front(setting) if setting.method.gated else {"text": 26.5, "image": image}

    assert said("baselines", row)["Perfusion is more like the concept than Textual Inversion"] == verdict


def test_a_step_back_is_not_monotone() -> None:
    def found(last: float) -> str:
        texts = {0.4: 20.0, 0.75: 28.0, 1.1: last}
        return said("baselines", lambda setting: {"text": texts.get(setting.bias, 20.0), "image": 77.0})[
            "a higher bias follows the prompt more"]

    assert (found(27.0), found(27.8)) == (NOT_SEEN, SEEN)  # too small a step back does not matter


def test_a_single_bias_says_nothing_of_higher_ones() -> None:
    study = studies((0.6,), (0.6,), (0.5,))["baselines"]
    statements = [one.statement for one in verdicts(study, made(study, lambda _: {"text": 20.0, "image": 77.0}))]
    assert len(statements) == 8
    assert all(one.startswith(("Perfusion is above", "Perfusion is more like")) for one in statements)


@pytest.mark.parametrize(("text", "image", "verdict"), [(22.0, 70.0, UNDECIDED), (23.0, 70.0, SEEN),
                                                        (19.0, 78.0, SEEN)])
def test_to_be_above_what_is_worse_than_no_training_says_nothing(text: float, image: float, verdict: str) -> None:
    """The base model is at 23 and 77, and the curve reaches image similarities of 73 to 80."""
    def row(setting: Setting) -> Row:
        if setting.method.gated:
            return on_the_front(setting)
        taught = {"text": text, "image": image}
        return taught if setting.method == TEXTUAL_INVERSION else {"text": 23.0, "image": 77.0}

    (judged,) = [one for one in verdicts(ALL["baselines"], made(ALL["baselines"], row))
                 if one.statement == "Perfusion is above Textual Inversion"]
    assert judged.verdict == verdict
    assert ("worse than the untaught base model" in judged.numbers) == (verdict == UNDECIDED)


def test_few_concepts_decide_nothing_but_are_shown() -> None:
    study = ALL["masks"]
    found = made(study, lambda setting: on_the_front(setting, 1.5 * (setting.method == NO_MASKS)), concepts=4)
    for judged in verdicts(study, found):
        assert judged.verdict == UNDECIDED and " +1." in f" {judged.numbers}"
        assert judged.numbers.endswith("; 4 concepts, at least 5 are needed to generalise over concepts")


def test_locks_are_compared_at_equal_bias_and_keys_at_equal_image_similarity() -> None:
    def row(setting: Setting) -> Row:
        shift = 2.0 * setting.global_locking
        plain = on_the_front(setting, less=1.0 * (setting.method == TRAINED_KEYS))
        return {"text": plain["text"] + shift, "image": plain["image"] - shift}

    assert set(said("locking", row).values()) == {SEEN}


@pytest.mark.parametrize(("lost", "verdict"), [(1.5, SEEN), (-1.5, NOT_SEEN), (0.0, NOT_SEEN)])
def test_a_gated_projection_is_better_or_not(lost: float, verdict: str) -> None:
    found = said("projection", lambda setting: on_the_front(setting, lost * (setting.method == FULL)))
    assert len(found) == 2 and set(found.values()) == {verdict}


@pytest.mark.parametrize(("lost", "verdict"), [(1.5, SEEN), (-1.5, NOT_SEEN), (0.0, NOT_SEEN)])
def test_the_layers_in_use_are_better_or_not(lost: float, verdict: str) -> None:
    def row(setting: Setting) -> Row:
        if setting.method.gated:
            return on_the_front(setting, lost * (setting.all_layers or setting.method == FULL))
        point = {TEXTUAL_INVERSION: (23.0 - 6, 77.0), CUSTOM_DIFFUSION: (23.0 - 6, 79.0), BASE: (30.0, 60.0)}
        return dict(zip(("text", "image"), point[setting.method], strict=True))

    found = said("values", row)
    ours = [statement for statement in found if statement.startswith(("Perfusion follows", "Perfusion gives"))]
    assert len(ours) == 2 * 2 and {found.pop(statement) for statement in ours} == {verdict}
    assert len(found) == 2 * 4 and set(found.values()) == {SEEN}


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

    (judged,) = verdicts(ALL["temperature"], made(ALL["temperature"], softer))
    assert judged.verdict == SEEN and judged.numbers.endswith("at equal image similarity")

    def likelier(setting: Setting) -> Row:
        row = on_the_front(setting)
        return {**row, "image": row["image"] + 9.0 * (setting.temperature == statements.TEMPERATURE)}

    (judged,) = verdicts(ALL["temperature"], made(ALL["temperature"], likelier))
    assert judged.verdict == SEEN
    assert "(temperature 0.15 has more than the curve reaches in 100 % of resamples" in judged.numbers


def two(own: float, kinds: float) -> Made:
    """Perfusion reaches a share at bias 0.5, and more at 0.6; the base model draws both kinds in another."""
    shares = {PERFUSION: own, TEXTUAL_INVERSION: 30.0, CUSTOM_DIFFUSION: 80.0}
    return lambda setting: {"own": shares.get(setting.method, 0.0) + 20.0 * (setting.bias == 0.6), "kinds": kinds}


@pytest.mark.parametrize(("own", "kinds", "wanted"), [
    (70.0, 90.0, [SEEN, SEEN, NOT_SEEN]), (50.0, 90.0, [NOT_SEEN, NOT_SEEN, NOT_SEEN]),
    (50.0, 40.0, [UNDECIDED, NOT_SEEN, NOT_SEEN]), (70.0, 40.0, [SEEN, SEEN, NOT_SEEN])])
def test_two_concepts_at_the_first_bias(own: float, kinds: float, wanted: list[str]) -> None:
    found = list(verdicts(ALL["two_concepts"], made(ALL["two_concepts"], two(own, kinds))))
    assert [one.verdict for one in found] == wanted and "at bias 0.5" in found[0].numbers
    assert ("base model itself draws both plain kinds in only 40." in found[0].numbers) == (wanted[0] == UNDECIDED)


def test_what_a_concept_costs() -> None:
    study = ALL["cost"]
    sizes = dict.fromkeys(study.methods, 1000000) | {PERFUSION: 5_000, TEXTUAL_INVERSION: 600}
    found = Found({}, {method: [Cost(10.0, 100, sizes[method], "here")] for method in study.methods})
    first, second = verdicts(study, found)
    assert (first.verdict, first.numbers, second.verdict) == (SEEN, "5.0 KB", SEEN)
    assert "Custom Diffusion 1000.0 KB, 200 times" in second.numbers


def test_cells_are_prompts_of_concepts_and_leave_out_what_says_nothing() -> None:
    setting, other = Setting(PERFUSION, 0.4), Setting(PERFUSION, 0.6)
    rows = [{"template": "b", "text": 1.0}, {"template": "b", "text": 3.0}, {"template": "a", "text": None}]
    found = Found({(setting, ("owl",)): rows, (setting, ("cat",)): rows[:1], (other, ("cat",)): rows}, {})
    assert found.cells(setting, "text") == {(("owl",), "b"): [1.0, 3.0], (("cat",), "b"): [1.0]}
    assert found.concepts == {"owl", "cat"}
