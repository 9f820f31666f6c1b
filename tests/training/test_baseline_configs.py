"""configs/baselines: each file adds a method to the photos, base model and schedule of a Perfusion config."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.training.config import read_config
from ldm.util import check_param_names, check_param_types, get_obj_from_str, known_params

ROOT = Path(__file__).resolve().parents[2]
BASELINES = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))
PERFUSION = sorted((ROOT / "configs").glob("perfusion*.yaml"))


PUBLIC = [path for path in PERFUSION if path.stem != "perfusion"]
PRIOR = {"prior_count": 200, "prior_steps": 50, "prior_scale": 6.0}
PUBLIC_RATES = {
    "textual-inversion": {"embedding_lr": 5e-3}, "custom-diffusion": {"embedding_lr": 8e-5, "weight_lr": 8e-5, **PRIOR},
    "dreambooth": {"weight_lr": 5e-6, **PRIOR},
}


SUBJECT = ("--data_root", "photos", "--init_word", "teddy bear")  # what the public models' configs require


def merge(*paths: Path) -> DictConfig:
    return read_config(parse_training_options(["--base", *map(str, paths), *SUBJECT]))


@pytest.mark.slow
@pytest.mark.parametrize("perfusion", PERFUSION, ids=lambda path: path.stem)
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_keeps_the_params_that_it_shares(perfusion: Path, baseline: Path) -> None:
    config, before, own = merge(perfusion, baseline), merge(perfusion), OmegaConf.load(baseline)
    target = get_obj_from_str(config.model.target)
    params = OmegaConf.to_container(config.model.params, resolve=True)
    check_param_names("model", target, params)
    check_param_types("model", target, params)
    assert config.model.target == own.model.target and config.data == before.data
    assert config.lightning == before.lightning  # so as many steps of as many photos
    for name in set(before.model.params) & known_params(target) - set(own.model.params):
        assert config.model.params[name] == before.model.params[name], name
    gone = set(before.model.params) - set(config.model.params)
    assert {"bias", "temperature", "locking", "value_lr"} & set(before.model.params) <= gone


@pytest.mark.slow
@pytest.mark.parametrize("perfusion", PUBLIC, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", PUBLIC_RATES)
def test_public_models_have_their_own_learning_rates(perfusion: Path, method: str) -> None:
    folder = ROOT / "configs" / "baselines"
    config, mini = merge(perfusion, folder / f"{method}-sd.yaml"), merge(perfusion, folder / f"{method}.yaml")
    rates = PUBLIC_RATES[method]
    assert {name: config.model.params[name] for name in rates} == rates
    assert config.model.target == mini.model.target and config.model.params.keys() == mini.model.params.keys()
    assert all(mini.model.params[name] == config.model.params[name] for name in set(config.model.params) - set(rates))


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_the_commands_in_a_header_work(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    header = "\n".join(line[1:] for line in baseline.read_text().splitlines() if line.startswith("#"))
    commands = re.findall(r"python main\.py (.*)", header.replace("\\\n", ""))
    bases = {}
    for command in commands:
        options = parse_training_options(shlex.split(command))
        model = read_config(options).model
        assert model.target == OmegaConf.load(baseline).model.target
        bases[model.params.ckpt_path] = Path(options.configs[1]).stem
    if baseline.stem.endswith("-sd-xl"):
        assert bases == {"sd_xl_base_1.0.safetensors": baseline.stem}
        return
    method = baseline.stem.removesuffix("-sd")
    own = {} if baseline.stem != method else {"models/mini/model.safetensors": method}
    assert bases == {**own, "v1-5-pruned-emaonly.safetensors": f"{method}-sd"}


def test_params_that_neither_model_has_are_refused(tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    config = OmegaConf.load(PERFUSION[0])
    config.model.params.plaecholder = "<toy>"
    OmegaConf.save(config, typo)
    params = merge(typo, BASELINES[0]).model.params
    assert "plaecholder" in params and "bias" not in params
    with pytest.raises(UserError, match="plaecholder"):
        check_param_names("model", get_obj_from_str(OmegaConf.load(BASELINES[0]).model.target), params)
