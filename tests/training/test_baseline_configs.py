"""configs/baselines: a method's own params over the photos, base model and schedule of a Perfusion config."""
from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from ldm.errors import UserError
from ldm.training.options import get_parser, read_config
from ldm.util import get_obj_from_str, known_params, refuse_unknown_params, refuse_wrong_kinds

ROOT = Path(__file__).resolve().parents[2]
BASELINES = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))
PERFUSION = sorted((ROOT / "configs").glob("perfusion*.yaml"))


def merged(*paths: Path) -> DictConfig:
    return read_config(get_parser().parse_args(["--base", *map(str, paths)]), [])


@pytest.mark.parametrize("perfusion", PERFUSION, ids=lambda path: path.stem)
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_takes_over_what_it_shares(perfusion: Path, baseline: Path) -> None:
    config, before, own = merged(perfusion, baseline), merged(perfusion), OmegaConf.load(baseline)
    target = get_obj_from_str(config.model.target)
    params = OmegaConf.to_container(config.model.params, resolve=True)
    refuse_unknown_params("model", target, params)
    refuse_wrong_kinds("model", target, params)
    assert config.model.target == own.model.target and config.data == before.data
    assert config.lightning == before.lightning  # so as many steps of as many photos
    for name in set(before.model.params) & known_params(target) - set(own.model.params):
        assert config.model.params[name] == before.model.params[name], name
    gone = set(before.model.params) - set(config.model.params)
    assert {"bias", "temperature", "locking", "value_lr"} & set(before.model.params) <= gone


def test_params_that_neither_model_knows_stay_to_be_refused(tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    config = OmegaConf.load(PERFUSION[0])
    config.model.params.plaecholder = "<toy>"
    OmegaConf.save(config, typo)
    params = merged(typo, BASELINES[0]).model.params
    assert "plaecholder" in params and "bias" not in params
    with pytest.raises(UserError, match="plaecholder"):
        refuse_unknown_params("model", get_obj_from_str(OmegaConf.load(BASELINES[0]).model.target), params)
