"""Attention inside a mask, on maps whose shares are known, and the figure made of them."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.attention.cases import first_placeholder, reference_prompt
from evaluation.attention.figure import AttentionRow, attention_figure
from evaluation.attention.masked_attention import (
    ALL,
    COLUMNS,
    STEP_GROUPS,
    MaskedAttention,
    attention_records,
    estimate_attention,
    measure_attention,
)
from evaluation.stats.intervals import bootstrap_mean
from ldm.concepts.finetuned_concept import FinetunedConcept

SMALL, LARGE = "input_blocks.1.1.transformer_blocks.0.attn2", "middle_block.1.transformer_blocks.0.attn2"


def concept(placeholder: str, super_category: str) -> FinetunedConcept:
    return FinetunedConcept("textual-inversion", placeholder, super_category, torch.zeros(1, 2))


def test_the_reference_prompt_has_super_categories_with_fitting_articles() -> None:
    assert reference_prompt("a photo of a <Toy> outside", [concept("<toy>", "owl")]) == "a photo of an owl outside"


def test_a_placeholder_may_be_part_of_another() -> None:
    concepts = [concept("sks", "owl"), concept("sks-2", "mug")]
    for prompt, placeholder in (("a sks-2 outside", "sks-2"), ("a sks-2 on a sks", "sks")):
        assert first_placeholder(prompt, "toys.safetensors", concepts) == placeholder
    assert reference_prompt("a sks-2 on a sks", concepts) == "a mug on an owl"


def left_half() -> torch.Tensor:
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def maps_with(peak: float = 3.0) -> dict[str, torch.Tensor]:
    """Return a uniform map of 0.1 at 2x2, and one of 4x4 with 0.1 on the right and `peak` times that on the left."""
    halves = torch.tensor([0.1 * peak, 0.1 * peak, 0.1, 0.1]).expand(3, 4, 4).clone()
    halves[2] = 0.2  # late steps: uniform
    return {SMALL: torch.full((3, 2, 2), 0.1), LARGE: halves}


def test_shares_agree_with_the_closed_form() -> None:
    measured = measure_attention(maps_with(), left_half())
    assert measured.area == 0.5
    for layer, steps, share, attention in (
        (SMALL, ALL, 0.5, 0.1), (LARGE, "early", 0.75, 0.2), (LARGE, "late", 0.5, 0.2),
        (LARGE, ALL, (0.75 + 0.75 + 0.5) / 3, 0.2), (ALL, "middle", (0.05 + 0.15) / 0.3, 0.15),
        (ALL, ALL, (3 * 0.05 + 2 * 0.15 + 0.1) / 0.9, 0.15),
    ):
        assert measured.share(layer, steps) == pytest.approx(share), (layer, steps)
        assert measured.attention(layer, steps) == pytest.approx(attention), (layer, steps)


def test_a_uniform_map_has_the_share_of_the_area() -> None:
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).round()
    uniform = measure_attention({SMALL: torch.full((3, 4, 4), 0.3)}, mask)
    assert uniform.share() == pytest.approx(uniform.area) == pytest.approx(float(mask.mean()))
    assert estimate_attention([uniform]).ratio.mean == pytest.approx(1)


def test_masks_may_be_full_or_cover_a_part_of_a_position() -> None:
    assert measure_attention(maps_with(), torch.ones(8, 8)).share() == pytest.approx(1)
    spot = torch.zeros(3, 4, 4)
    spot[:, 1, 2] = 1
    mask = torch.zeros(16, 16)
    mask[4:8, 8:10] = 1  # half of that position
    assert measure_attention({SMALL: spot}, mask).share() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="mask is empty"):
        measure_attention(maps_with(), torch.zeros(8, 8))


def test_records_have_each_layer_and_step_group_with_intervals_over_images() -> None:
    images = [measure_attention(maps_with(peak), left_half()) for peak in (1.0, 3.0, 7.0)]
    records = list(attention_records("locked", images))
    assert [(record["layer"], record["steps"]) for record in records] == [
        (layer, steps) for layer in (ALL, SMALL, LARGE) for steps in (ALL, *STEP_GROUPS)]
    assert all(tuple(sorted(record)) == tuple(sorted(COLUMNS)) for record in records)
    early = next(record for record in records if (record["layer"], record["steps"]) == (LARGE, "early"))
    expected = bootstrap_mean([50, 75, 87.5])
    assert early["share"] == pytest.approx(expected.mean) and early["share_low"] == pytest.approx(expected.low)
    assert early["ratio"] == pytest.approx(2 * expected.mean / 100) and early["area"] == 50 and early["images"] == 3
    assert list(attention_records("locked", [])) == []


def attention_row(mask: torch.Tensor | None, size: tuple[int, int] = (8, 8)) -> AttentionRow:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    measured: MaskedAttention | None = None if mask is None else measure_attention(maps_with(), mask)
    return AttentionRow("Perfusion,\nlocal lock", "seed 1", image, maps_with(), mask, measured)


@pytest.mark.slow
def test_the_figure_grows_with_its_rows_and_is_deterministic() -> None:
    one = attention_figure([attention_row(left_half())], "Attention")
    two = attention_figure([attention_row(left_half()), attention_row(None)], "Attention")
    assert one.mode == "RGB" and one.width == two.width and two.height > one.height + 100
    assert attention_figure([attention_row(left_half(), (8, 16))], "Attention").width > one.width - 10
    pixels = np.asarray(one, dtype=int)
    assert (pixels.max(-1) - pixels.min(-1) > 100).sum() > 1000  # maps have colors
    again = attention_figure([attention_row(left_half())], "Attention")
    assert np.array_equal(np.asarray(again), np.asarray(one))
