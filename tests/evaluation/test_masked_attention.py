"""Shares of attention inside a mask, on maps whose shares are known; and the picture made of them."""
from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.attention import cases as attention_cases
from evaluation.attention.figure import AttentionRow, attention_figure
from evaluation.attention.masked_attention import ALL, COLUMNS, STEP_GROUPS, MaskedAttention, estimate_attention, measure_attention, attention_records
from evaluation.stats.intervals import bootstrap_mean
from ldm.concepts.finetuned_concept import FinetunedConcept

SMALL, LARGE = "input_blocks.1.1.transformer_blocks.0.attn2", "middle_block.1.transformer_blocks.0.attn2"


def test_the_reference_names_things_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = FinetunedConcept("textual-inversion", "<toy>", "owl", torch.zeros(1, 2))
    monkeypatch.setattr(attention_cases, "_plan", lambda _, files, prompt: (files, prompt))
    case = attention_cases.Case("", Namespace(concepts=[toy]), "<toy>", "owl")
    reference = attention_cases._reference(Namespace(prompt="a photo of a <Toy> outside"), case)
    assert (reference.plan, reference.word) == (([], "a photo of an owl outside"), "owl")


def test_placeholders_that_contain_each_other_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    toys = [FinetunedConcept("textual-inversion", word, thing, torch.zeros(1, 2))
            for word, thing in (("sks", "owl"), ("sks-2", "mug"))]
    for prompt, word in (("a sks-2 outside", "sks-2"), ("a sks-2 on a sks", "sks")):
        assert attention_cases._concepts_word(prompt, "toys.safetensors", toys) == word
    monkeypatch.setattr(attention_cases, "_plan", lambda _, files, prompt: prompt)
    case = attention_cases.Case("", Namespace(concepts=toys), "sks-2", "mug")
    assert attention_cases._reference(Namespace(prompt="a sks-2 on a sks"), case).plan == "a mug on an owl"


def left_half() -> torch.Tensor:
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def made(peak: float = 3.0) -> dict[str, torch.Tensor]:
    """An even map of 0.1 at 2x2, and one of 4x4 with `peak` times as much on the left as on the right, 0.1."""
    halves = torch.tensor([0.1 * peak, 0.1 * peak, 0.1, 0.1]).expand(3, 4, 4).clone()
    halves[2] = 0.2  # late steps: even
    return {SMALL: torch.full((3, 2, 2), 0.1), LARGE: halves}


def test_shares_are_those_of_the_closed_form() -> None:
    one = measure_attention(made(), left_half())
    assert one.area == 0.5
    for layer, steps, share, attention in (
        (SMALL, ALL, 0.5, 0.1), (LARGE, "early", 0.75, 0.2), (LARGE, "late", 0.5, 0.2),
        (LARGE, ALL, (0.75 + 0.75 + 0.5) / 3, 0.2), (ALL, "middle", (0.05 + 0.15) / 0.3, 0.15),
        (ALL, ALL, (3 * 0.05 + 2 * 0.15 + 0.1) / 0.9, 0.15),
    ):
        assert one.share(layer, steps) == pytest.approx(share), (layer, steps)
        assert one.attention(layer, steps) == pytest.approx(attention), (layer, steps)


def test_an_even_map_has_the_share_of_the_area_and_all_of_a_whole_mask_is_inside() -> None:
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).round()
    even = measure_attention({SMALL: torch.full((3, 4, 4), 0.3)}, mask)
    assert even.share() == pytest.approx(even.area) == pytest.approx(float(mask.mean()))
    assert estimate_attention([even]).ratio.mean == pytest.approx(1)
    assert measure_attention(made(), torch.ones(8, 8)).share() == pytest.approx(1)
    spot = torch.zeros(3, 4, 4)
    spot[:, 1, 2] = 1
    there = torch.zeros(16, 16)
    there[4:8, 8:10] = 1  # half of that cell
    assert measure_attention({SMALL: spot}, there).share() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="mask is empty"):
        measure_attention(made(), torch.zeros(8, 8))


def test_a_row_for_each_layer_and_group_of_steps_with_intervals_over_pictures() -> None:
    pictures = [measure_attention(made(peak), left_half()) for peak in (1.0, 3.0, 7.0)]
    rows = list(attention_records("locked", pictures))
    assert [(row["layer"], row["steps"]) for row in rows] == [
        (layer, steps) for layer in (ALL, SMALL, LARGE) for steps in (ALL, *STEP_GROUPS)]
    assert all(tuple(sorted(row)) == tuple(sorted(COLUMNS)) for row in rows)
    early = next(row for row in rows if (row["layer"], row["steps"]) == (LARGE, "early"))
    expected = bootstrap_mean([50, 75, 87.5])
    assert early["share"] == pytest.approx(expected.mean) and early["share_low"] == pytest.approx(expected.low)
    assert early["ratio"] == pytest.approx(2 * expected.mean / 100) and early["area"] == 50 and early["pictures"] == 3
    assert list(attention_records("locked", [])) == []


def row(mask: torch.Tensor | None, size: tuple[int, int] = (8, 8)) -> AttentionRow:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    inside: MaskedAttention | None = None if mask is None else measure_attention(made(), mask)
    return AttentionRow("Perfusion,\nlocal lock", "seed 1", picture, made(), mask, inside)


def test_the_picture_grows_with_its_rows_and_shows_what_was_found() -> None:
    one = attention_figure([row(left_half())], "Attention")
    two = attention_figure([row(left_half()), row(None)], "Attention")
    assert one.mode == "RGB" and one.width == two.width and two.height > one.height + 100
    assert attention_figure([row(left_half(), (8, 16))], "Attention").width > one.width - 10
    pixels = np.asarray(one, dtype=int)
    assert (pixels.max(-1) - pixels.min(-1) > 100).sum() > 1000  # maps have colours
    again = attention_figure([row(left_half())], "Attention")
    assert np.array_equal(np.asarray(again), np.asarray(one))
