"""Training of the segmenter on tiny towers, and the normalization of latents at export."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_clips import overfit, tiny_openclip

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.mini.segmenter import SegmenterTrainer, select_queries
from ldm.models.open_clip_folder import load_openclip
from scripts.mini.export import fold_normalization, write_openclip

SIDE = 32


def scenes() -> dict[str, object]:
    """Four scenes. The second has two subjects."""
    mask = torch.zeros(4, 1, SIDE, SIDE)
    mask[:, :, 8:24, 8:24] = 1
    second = torch.zeros(4, 1, SIDE, SIDE)
    second[1, :, :8] = 1
    image = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": image, "mask": mask, "second_mask": second, "word": ["cat", "dog", "car", "owl"],
            "second_word": ["", "tree", "", ""], "absent_kind": ["dog", "cat", "owl", "car"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.mini.export.world_captions", lambda: ("a cat", "a dog", "a red car", "an owl"))
        write_openclip(path, tiny_openclip(), {"format": "pt"})
    return path


@pytest.fixture
def segmenter(folder: Path) -> SegmenterTrainer:
    torch.manual_seed(0)
    return SegmenterTrainer(str(folder), widths=[32, 32, 32, 32, 64])


@pytest.mark.slow
def test_the_segmenter_starts_from_the_clip_and_trains_both_its_towers(
        folder: Path, segmenter: SegmenterTrainer) -> None:
    started = segmenter.segmenter.clip.state_dict()
    for name, value in load_openclip(folder).state_dict().items():
        assert name.startswith("visual.attnpool.") or torch.equal(value, started[name]), name
    with torch.no_grad():  # a residual block starts at zero, so the text has no influence yet
        for parameter in segmenter.segmenter.blocks.parameters():
            parameter.normal_(std=0.1)
    segmenter.training_step(scenes(), 0).backward()
    unused = [name for name, parameter in segmenter.segmenter.named_parameters() if parameter.grad is None]
    assert unused == ["clip.logit_scale"]


@pytest.mark.slow
def test_a_batch_is_overfitted(segmenter: SegmenterTrainer) -> None:
    batch = scenes()
    losses = overfit(segmenter, batch, 30)
    assert losses[-1] < 0.5 * losses[0]
    found = segmenter.logits(batch["image"], batch["word"])
    assert found.shape == (4, SIDE, SIDE)
    assert not torch.allclose(found[:1], segmenter.logits(batch["image"], ["car", *batch["word"][1:]])[:1], atol=1e-3)


def test_either_subject_is_queried_and_sometimes_an_absent_kind() -> None:
    many = {key: value.repeat(8, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value * 8
            for key, value in scenes().items()}
    words, masks, absent = select_queries(many, torch.cat([many["mask"], many["second_mask"]], 1))
    assert words == ["cat", "tree", "car", "owl"] * 7 + ["cat", "tree", "car", "car"]
    assert absent.tolist() == [False] * 31 + [True]
    first, second = many["mask"][0, 0], many["second_mask"][1, 0]
    expected = [first, second, first, first] * 7 + [first, second, first, torch.zeros(SIDE, SIDE)]
    assert all(torch.equal(mask, shown) for mask, shown in zip(masks, expected, strict=True))


def test_folding_the_normalization_keeps_the_reconstructions() -> None:
    torch.manual_seed(0)
    shape = {"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
             "resolution": 16, "z_channels": 4}
    model = AutoencoderKL(shape, {"target": "torch.nn.Identity"}, embed_dim=4).eval()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before, latents = model(images, sample_posterior=False)[0], model.encode(images)
        mean, std = latents.mode().mean((0, 2, 3)), latents.mode().std((0, 2, 3))
        fold_normalization(model, mean, std)
        after, folded = model(images, sample_posterior=False)[0], model.encode(images)
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(folded.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(folded.mode().std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(folded.std * std[:, None, None], latents.std, rtol=1e-3)
