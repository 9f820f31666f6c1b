"""The learning rate of a run, and the line that tells its factors."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from ldm.training.run import _set_learning_rate


@pytest.mark.parametrize(("scale", "rate", "line"), [
    (True, 0.096, "learning rate 9.60e-02 = base_learning_rate 6.00e-03 x 1 device x batch size 4 x 4 accumulated "
     "batches (--scale_lr false leaves the factors out)"),
    (False, 0.006, "learning rate 6.00e-03")])
def test_the_factors_are_told(scale: bool, rate: float, line: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = OmegaConf.create({"model": {"base_learning_rate": 0.006}, "data": {"params": {"batch_size": 4}}})
    model, trainer = SimpleNamespace(), SimpleNamespace(num_devices=1, accumulate_grad_batches=4)
    _set_learning_rate(model, config, trainer, scale)
    assert model.learning_rate == pytest.approx(rate) and caplog.messages == [line]
