"""Which optimizers Lightning can clip gradients for, by runs in each precision."""
from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.optimization import can_use_fused_optimizer, optimizer_and_schedule


class Line(pl.LightningModule):
    """Learns y = 2 x, and records whether its optimizer was fused."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.fused: bool | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.line(batch) - 2 * batch).square().mean()

    def configure_optimizers(self) -> dict[str, Any]:
        self.fused = can_use_fused_optimizer(self)
        return optimizer_and_schedule(torch.optim.Adam(self.parameters(), lr=0.1, fused=self.fused), None)


@pytest.mark.parametrize(("precision", "clipped", "fused"), [
    ("32-true", None, True), ("32-true", 1.0, True), ("bf16-mixed", None, True), ("bf16-mixed", 1.0, False)])
def test_every_precision_trains_with_and_without_clipping(precision: str, clipped: float | None, fused: bool) -> None:
    torch.manual_seed(0)
    model, batches = Line(), [torch.linspace(-1, 1, 8)[:, None]] * 20
    before = float((model.line.weight - 2).abs())
    trainer = pl.Trainer(max_epochs=1, precision=precision, gradient_clip_val=clipped, accelerator="cpu", logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    assert model.fused == fused
    assert float((model.line.weight - 2).abs()) < 0.5 * before


def test_a_module_without_a_trainer() -> None:
    assert can_use_fused_optimizer(Line())
