"""What is compared: every method is a run that main.py accepts, and studies share variants."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation.paper import claims, studies
from evaluation.paper.claims import claims_about
from evaluation.paper.design import Method, Variant
from evaluation.paper.methods import (
    BASELINES,
    FULL_PROJECTION,
    GATED_PROJECTION,
    LOWER_BIAS,
    PERFUSION,
    REFINED,
    SHARES_LAYERS,
    TRAINING_BIAS,
    WITH_SCENES,
)
from evaluation.paper.studies import PAPERS_RULE, STUDIES, StudyInputs, build_studies, register_study
from ldm.cli.training import parse_training_options
from ldm.inference.settings import GenerationSettings
from ldm.training.config import read_config

BIASES, COMPARISON_BIASES = (0.4, 0.6, 0.75, 0.9, 1.1), (0.4, 0.75, 1.1)
ALL = build_studies(StudyInputs(BIASES, COMPARISON_BIASES, (0.4, 0.6)))
METHODS = list(dict.fromkeys(method for study in ALL.values() for method in study.methods))
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "perfusion.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_every_method_has_a_config_that_main_accepts(method: Method) -> None:
    config = read_config(parse_training_options(["--base", *method.configs(CONFIG), *method.overrides]))
    plain = OmegaConf.load(CONFIG)
    assert (config.model.target == plain.model.target) == method.has_bias
    for override in method.overrides:
        key, _, value = override.partition("=")
        assert OmegaConf.select(config, key) == OmegaConf.from_dotlist([f"value={value}"]).value


@pytest.mark.parametrize("method", BASELINES, ids=lambda method: method.key)
def test_baselines_of_public_models_have_configs_of_their_own(method: Method) -> None:
    name = Path(method.config).stem
    for perfusion, ending in (("perfusion.yaml", ""), ("perfusion-sd-v1.yaml", "-sd"), ("perfusion-ldm.yaml", "-sd")):
        _, file = method.configs(CONFIG.with_name(perfusion))
        assert Path(file).is_file() and Path(file).stem == f"{name}{ending}"


def test_a_method_without_a_config_for_public_models_uses_its_only_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    mine = Method("mine", str(tmp_path / "mine.yaml"))
    assert mine.configs("configs/perfusion-sd-v1.yaml")[1] == str(tmp_path / "mine.yaml")


def test_names_are_unique() -> None:
    assert len({method.key for method in METHODS}) == len(METHODS) == 20
    for study in ALL.values():
        assert len({variant.name for variant in study.variants}) == len(study.variants)
        assert len({curve.name for curve in study.curves}) == len(study.curves)


def test_studies_share_perfusions_own_curve() -> None:
    own = set(ALL["baselines"].curves[0].variants)
    for key in ("locking", "masks", "one_photo", "temperature", "training_bias"):
        assert set(ALL[key].curves[0].variants) == own
    assert OmegaConf.load(CONFIG).model.params.bias == TRAINING_BIAS
    trained = {curve.name: curve.variants[0].method for curve in ALL["training_bias"].curves}
    assert trained == {"trained at bias 0.75": PERFUSION, "trained at bias 0.4": LOWER_BIAS}


def test_the_projection_of_the_config_is_not_trained_twice() -> None:
    study = build_studies(StudyInputs((0.4, 0.9), (0.4, 0.9), (0.5,), projection="gated"))["projection"]
    assert [curve.name for curve in study.curves] == [GATED_PROJECTION.name, FULL_PROJECTION.name]
    assert study.methods == [PERFUSION, FULL_PROJECTION]
    assert OmegaConf.load(CONFIG).model.params.projection == "gated"


@pytest.mark.parametrize(("projection", "has_used_layers", "names", "methods"), [
    ("gated", True, ["Perfusion", "Perfusion, all layers", PAPERS_RULE], [PERFUSION, FULL_PROJECTION]),
    ("gated", False, ["Perfusion", PAPERS_RULE], [PERFUSION, FULL_PROJECTION]),
    ("full", True, ["Perfusion", "Perfusion, all layers"], [PERFUSION]),
    ("full", False, ["Perfusion"], [PERFUSION])])
def test_curves_of_target_outputs_depend_on_perfusions_config(
        projection: str, has_used_layers: bool, names: list[str], methods: list[Method]) -> None:
    inputs = StudyInputs((0.4, 0.9), (0.4, 0.9), (0.5,), projection=projection, has_used_layers=has_used_layers)
    built = build_studies(inputs)
    values = built["values"]
    assert [curve.name for curve in values.curves[:-4]] == names
    assert [method for method in values.methods if method.has_bias] == methods
    pairs = [variant for variant in built["two_concepts"].variants if variant.method == PERFUSION]
    assert [variant.all_layers for variant in pairs] == [False, True][:1 + has_used_layers]
    started = [curve.name for curve in built["encoder_settings"].curves if curve.name.endswith("all layers")]
    assert len(started) == 2 * has_used_layers
    by_name = {curve.name: curve for curve in values.curves}
    for variant in by_name[PAPERS_RULE].variants if PAPERS_RULE in names else ():
        # The paper uses all layers.
        assert (variant.method, variant.all_layers) == (FULL_PROJECTION, has_used_layers)


def test_the_bundled_encoder_is_compared_on_its_own_base_alone() -> None:
    assert [method.name for method in ALL["encoder"].methods] == [
        "Perfusion", "encoder", "encoder and 12 steps", "12 steps from nothing"]
    assert {"encoder", "encoder and 12 steps"} <= {method.name for method in ALL["two_concepts"].methods}
    others = build_studies(StudyInputs(BIASES, COMPARISON_BIASES, (0.4, 0.6), has_encoder=False))
    assert others["encoder"].methods == others["encoder_settings"].methods == [PERFUSION]
    assert list(claims.check_claims(others["encoder"], claims.Results({}, {}))) == []


@pytest.mark.parametrize(("method", "name"), [(REFINED, "perfusion-fast.yaml"), (WITH_SCENES, "perfusion-scenes.yaml")])
def test_methods_with_a_config_of_their_own_have_its_settings(method: Method, name: str) -> None:
    config = OmegaConf.load(CONFIG.with_name(name))
    for override in method.overrides:
        key, _, value = override.partition("=")
        assert OmegaConf.select(config, key) == OmegaConf.from_dotlist([f"value={value}"]).value


def test_scenes_are_made_with_the_bundled_model_alone() -> None:
    inputs = StudyInputs(BIASES, COMPARISON_BIASES, (0.4,), has_used_layers=True)
    study = build_studies(inputs)["scenes"]
    assert [curve.name for curve in study.curves] == ["Perfusion", SHARES_LAYERS.name, WITH_SCENES.name,
                                                      "Perfusion, all layers"]
    assert WITH_SCENES in build_studies(inputs)["two_concepts"].methods
    for changes in ({"has_used_layers": False}, {"has_encoder": False}):
        others = build_studies(replace(inputs, **changes))
        assert others["scenes"].methods == [PERFUSION] and WITH_SCENES not in others["two_concepts"].methods
        assert list(claims.check_claims(others["scenes"], claims.Results({}, {}))) == []


def test_variants_override_generation_settings() -> None:
    common = GenerationSettings(num_inference_steps=9, guidance_scale=4.0)
    changed = Variant(PERFUSION, 0.6, 0.15, True, True).generation_settings(common)
    assert (changed.bias, changed.temperature, changed.global_locking) == (0.6, 0.15, True)
    assert changed.all_layers and changed.num_inference_steps == 9
    assert Variant(BASELINES[0]).generation_settings(common) == common
    assert Variant(PERFUSION, 0.6, 0.15, True).name == "Perfusion, bias 0.6, temperature 0.15, global lock"
    assert Variant(PERFUSION, 0.6, all_layers=True).name == "Perfusion, bias 0.6, all layers"


def test_selected_baselines_are_the_only_ones_in_all_studies() -> None:
    mine = Method("mine", "mine.yaml", combinable=True)
    built = build_studies(StudyInputs((0.4,), (0.4,), (0.5,), baselines=(mine,)))
    for study in built.values():
        assert {method for method in study.methods if not method.has_bias} <= {mine}
    assert all(mine in built[key].methods for key in ("baselines", "values", "two_concepts", "cost"))


def test_a_new_study_needs_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "STUDIES", dict(STUDIES))
    monkeypatch.setattr(claims, "STUDIES", studies.STUDIES)
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))

    @register_study("mine", "My study")
    def _(inputs: StudyInputs) -> list[studies.StudyCurve]:
        return [inputs.perfusion()]

    study = build_studies(StudyInputs((0.4,), (0.4,), (0.5,)))["mine"]
    assert (study.key, study.title, study.kind) == ("mine", "My study", "trade-off")
    results = claims.Results({}, {})
    assert list(claims.check_claims(study, results)) == []

    @claims_about("mine")
    def _(study: studies.Study, results: claims.Results) -> claims.Claims:
        yield claims.Claim("it works", claims.SUPPORTED, "1 of 1")

    assert [check.claim for check in claims.check_claims(study, results)] == ["it works"]


def test_claims_about_an_unknown_study_are_refused() -> None:
    with pytest.raises(ValueError, match="'beauty': there is no such study"):
        claims_about("beauty")
