"""The trainers of the mini model's parts, on tiny towers, and what is done to their weights on the way into files."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import CLIPTrainer, clip_pixels
from ldm.models.segmenter import SegmenterTrainer, start_smooth
from ldm.modules.encoders.modules import TOKENIZER
from ldm.modules.encoders.vocabulary import load_pretrained

PROJECT = Path(__file__).resolve().parents[2]
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip() -> CLIPTrainer:
    torch.manual_seed(0)
    return CLIPTrainer(str(TOKENIZER), TOWER, {**TOWER, "image_size": 16, "patch_size": 8}, projection_dim=8,
                       max_length=12)


def scenes() -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(4, 1, 16, 16)
    mask[:, :, 4:12, 4:12] = 1
    return {"image": torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1, "mask": mask,
            "caption": ["a cat", "a dog", "a red car", "an owl in the snow"],
            "word": ["cat", "dog", "car", "owl"], "other": ["dog", "cat", "owl", "car"]}


def test_the_contrastive_loss_is_clips(clip: CLIPTrainer) -> None:
    batch = scenes()
    expected = clip.clip(input_ids=clip.tokens(batch["caption"]), pixel_values=clip_pixels(batch["image"]),
                         return_loss=True).loss
    assert torch.allclose(clip.training_step(batch, 0), expected, atol=1e-5)


def test_clip_learns_a_batch_by_heart(clip: CLIPTrainer) -> None:
    batch = scenes()
    optimizer = clip.configure_optimizers()["optimizer"]
    before = clip.step(batch, "train").item()
    for _ in range(20):
        optimizer.zero_grad()
        clip.step(batch, "train").backward()
        optimizer.step()
    assert clip.step(batch, "train").item() < 0.5 * before


@pytest.fixture(scope="module")
def segmenter(clip: CLIPTrainer, tmp_path_factory: pytest.TempPathFactory) -> SegmenterTrainer:
    folder = tmp_path_factory.mktemp("clip")
    clip.clip.save_pretrained(folder)
    return SegmenterTrainer(str(folder), reduce_dim=8, extract_layers=[0, 1],
                            decoder={"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16})


def test_the_segmenter_starts_from_the_clip_and_leaves_its_text_tower_alone(
        clip: CLIPTrainer, segmenter: SegmenterTrainer, tmp_path: Path) -> None:
    clip.clip.save_pretrained(tmp_path)
    for name, value in load_pretrained(CLIPModel, tmp_path).text_model.state_dict().items():
        assert torch.equal(value, segmenter.segmenter.clip.text_model.state_dict()[name])
    segmenter.training_step(scenes(), 0).backward()
    for name, parameter in segmenter.segmenter.named_parameters():
        if "clip.text" in name:
            assert parameter.grad is None and not parameter.requires_grad, name
    assert segmenter.segmenter.decoder.transposed_convolution.weight.grad.abs().sum() > 0


def test_a_text_tower_that_is_trained_along(clip: CLIPTrainer, tmp_path: Path) -> None:
    clip.clip.save_pretrained(tmp_path)
    trainer = SegmenterTrainer(str(tmp_path), reduce_dim=8, extract_layers=[0, 1], text_trainable=True,
                               decoder={"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16})
    trainer.training_step(scenes(), 0).backward()
    tower = trainer.segmenter.clip
    assert tower.text_projection.weight.grad.abs().sum() > 0
    assert tower.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0


def test_what_is_asked_of_a_picture_decides_what_is_found(segmenter: SegmenterTrainer) -> None:
    image = scenes()["image"][:1].repeat(2, 1, 1, 1)
    found = segmenter.logits(image, ["cat", "car"])
    assert found.shape == (2, 16, 16)
    assert not torch.allclose(found[0], found[1], atol=1e-6)


def test_finer_patches_see_the_same_picture(clip: CLIPTrainer, tmp_path: Path) -> None:
    clip.clip.save_pretrained(tmp_path)
    decoder = {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    coarse, fine = (SegmenterTrainer(str(tmp_path), 8, [0, 1], decoder, patch_size=size).segmenter.clip.vision_model
                    for size in (8, 4))
    flat = torch.randn(1, 3, 1, 1).expand(1, 3, 16, 16)  # one colour all over: what patches add up to is the same
    seen = [tower.embeddings.patch_embedding(flat).flatten(2)[0, :, 0] for tower in (coarse, fine)]
    torch.testing.assert_close(seen[0], seen[1])
    places = [tower.embeddings.position_embedding.weight for tower in (coarse, fine)]
    assert len(places[1]) == 17 and torch.equal(places[0][0], places[1][0])
    torch.testing.assert_close(places[1][1:].mean(0), places[0][1:].mean(0), atol=1e-3, rtol=0)
    trainer = SegmenterTrainer(str(tmp_path), 8, [0, 1], decoder, patch_size=4)
    assert trainer.logits(scenes()["image"], ["cat"] * 4).shape == (4, 16, 16)
    with pytest.raises(ValueError, match="patch_size 3: it must divide"):
        SegmenterTrainer(str(tmp_path), 8, [0, 1], decoder, patch_size=3)


def test_pixels_of_a_patch_start_alike() -> None:
    layer = torch.nn.ConvTranspose2d(4, 1, kernel_size=8, stride=8)
    start_smooth(layer)
    patches = layer(torch.randn(1, 4, 2, 2)).unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert torch.allclose(patches, patches[..., :1].expand_as(patches), atol=1e-6)


def test_folding_the_normalisation_leaves_pictures_alone() -> None:
    spec = importlib.util.spec_from_file_location("export_mini", PROJECT / "scripts" / "export_mini.py")
    export = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export)
    torch.manual_seed(0)
    shape = {"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3,
             "resolution": 16, "z_channels": 4}
    model = AutoencoderKL(shape, {"target": "torch.nn.Identity"}, embed_dim=4).eval()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before, latents = model(images, sample_posterior=False)[0], model.encode(images)
        mean, std = latents.mode().mean((0, 2, 3)), latents.mode().std((0, 2, 3))
        export.fold_normalisation(model, mean, std)
        after, folded = model(images, sample_posterior=False)[0], model.encode(images)
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(folded.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(folded.mode().std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(folded.std * std[:, None, None], latents.std, rtol=1e-3)
