"""What models of the LDM family add to a latent diffusion model: further conditions, edits, and fitted weights."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_latent_diffusion import Words, images, latent_model, locate
from torch import Tensor, nn

from ldm.common.errors import UserError
from ldm.models.diffusion import ddpm_edit
from ldm.models.diffusion.ddpm import (
    DiffusionWrapper,
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion,
    disabled_train,
)
from ldm.models.diffusion.weight_fitting import repeat_to_fit
from ldm.models.frozen import freeze
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class Recorder(nn.Module):
    """A network that keeps what it is called with, and returns the first three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: Tensor, context: Any = None, y: Any = None) -> Tensor:
        self.seen = {"x": x, "context": context, "y": y}
        return self.slope * x[:, :3]


class Halving(nn.Module):
    """A first stage whose posterior has the halved image as its mean, and no variance."""

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(torch.cat([x / 2, torch.full_like(x, -100.0)], 1))

    def decode(self, z: Tensor) -> Tensor:
        return 2 * z


class Depth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class LowScale(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, torch.arange(len(x))

    def decode(self, x: Tensor) -> Tensor:
        return x - 1


class Embedder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)


class NoiseAugmentation(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, torch.ones_like(x)


def recording_model(cls: type[LatentDiffusion], **params: Any) -> LatentDiffusion:
    given = {"unet_config": locate(Recorder), "first_stage_config": locate(Halving), "conditioning_key": "hybrid"}
    return latent_model(cls, **{**given, **params})


def batch(**more: Any) -> dict[str, Any]:
    return {"image": images(), "caption": ["a", "abc"], **more}


# The wrapper


@pytest.mark.parametrize(("key", "channels", "context", "vector"), [
    (None, 2, False, False), ("concat", 5, False, False), ("crossattn", 2, True, False), ("hybrid", 5, True, False),
    ("adm", 2, False, True), ("hybrid-adm", 5, True, True), ("crossattn-adm", 2, True, True)])
def test_where_conditions_go(key: str | None, channels: int, context: bool, vector: bool) -> None:
    wrapper = DiffusionWrapper(locate(Recorder), key)
    tokens, labels = torch.ones(2, 4, 8), torch.tensor([1, 2])
    crossattn = [labels] if key == "adm" else [tokens, tokens]
    wrapper(torch.zeros(2, 2, 4, 4), labels, c_concat=[torch.ones(2, 1, 4, 4), torch.ones(2, 2, 4, 4)],
            c_crossattn=crossattn, c_adm=labels)
    seen = wrapper.diffusion_model.seen
    assert seen["x"].shape[1] == channels
    assert (seen["context"] is not None and seen["context"].shape == (2, 8, 8)) == context
    assert (seen["y"] is not None and torch.equal(seen["y"], labels)) == vector


def test_contexts_may_stay_a_list() -> None:
    config = {**locate(Recorder), "sequential_crossattn": True}
    wrapper, tokens = DiffusionWrapper(config, "crossattn"), torch.ones(2, 4, 8)
    wrapper(torch.zeros(2, 2, 4, 4), torch.tensor([1, 2]), c_crossattn=[tokens, 2 * tokens])
    assert wrapper.sequential_cross_attn and len(wrapper.diffusion_model.seen["context"]) == 2


def test_a_missing_vector_is_named() -> None:
    with pytest.raises(UserError, match="crossattn-adm: needs a condition c_adm"):
        DiffusionWrapper(locate(Recorder), "crossattn-adm")(torch.zeros(1, 2, 4, 4), torch.tensor([1]))


def test_further_outputs_of_a_network_are_returned_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = latent_model()
    monkeypatch.setattr(model.model, "forward", lambda x, t, **_: (x, "ids"))
    x = images()
    assert model.apply_model(x, torch.tensor([1, 2]), None) is x
    assert model.apply_model(x, torch.tensor([1, 2]), None, return_ids=True) == (x, "ids")


def test_frozen_modules_ignore_train() -> None:
    module = freeze(nn.Sequential(nn.Linear(1, 1), nn.Dropout()))
    nn.Sequential(module).train()
    assert module.train() is module and not any(part.training for part in module.modules())
    assert not module[0].weight.requires_grad and disabled_train(module, True) is module


# Empty conditions


def test_unconditional_conditions() -> None:
    model = latent_model()
    assert model.get_unconditional_conditioning(3, ["abc"]).flatten().tolist() == [3.0] * 3
    with pytest.raises(UserError, match="unconditional_guidance_label: needed"):
        model.get_unconditional_conditioning(3)


# Images to edit


def edit_model(**params: Any) -> ddpm_edit.LatentDiffusion:
    return recording_model(ddpm_edit.LatentDiffusion, first_stage_key="edited", cond_stage_key="edit", **params)


def edit_batch(count: int = 400) -> dict[str, Any]:
    x = images(1).expand(count, -1, -1, -1)
    return {"edited": x, "edit": {"c_concat": x + 1, "c_crossattn": ["abc"] * count}}


def test_a_batch_of_edits_drops_conditions_at_random() -> None:
    torch.manual_seed(0)
    z, c = edit_model(scale_factor=3.0).get_input(edit_batch(), "edited")
    torch.testing.assert_close(z, 1.5 * edit_batch()["edited"])
    text, image = c["c_crossattn"][0].flatten(), c["c_concat"][0]
    torch.testing.assert_close(image[image.flatten(1).any(1)][0], (edit_batch()["edited"][0] + 1) / 2)  # not scaled
    no_text, no_image = text == 0, ~image.flatten(1).any(1)
    assert set(text.tolist()) == {0.0, 3.0}
    for share in (no_text & ~no_image, ~no_text & no_image, no_text & no_image):
        assert share.float().mean() == pytest.approx(0.05, abs=0.03)
    _, kept = edit_model().get_input(edit_batch(), "edited", uncond=0.0)
    assert kept["c_crossattn"][0].min() == 3 and kept["c_concat"][0].flatten(1).any(1).all()


def test_edits_for_the_log() -> None:
    shown = edit_model(timesteps=4).log_images(edit_batch(3), N=2, split="train", quantize_denoised=False)
    assert set(shown) == {"inputs", "reconstruction", "samples", "reals"}
    assert all(len(value) == 2 for value in shown.values())


class FirstLayer(nn.Module):
    """A network whose first layer has the family's name."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, 4, 3)])])


@pytest.mark.parametrize(("cls", "more", "load_ema"), [
    (ddpm_edit.LatentDiffusion, {"load_ema": True}, True), (ddpm_edit.LatentDiffusion, {"load_ema": False}, False),
    (LatentInpaintDiffusion, {}, True)])
def test_a_first_layer_for_fewer_channels_is_extended_by_zeros(cls: type, more: dict[str, Any], load_ema: bool,
                                                               tmp_path: Path) -> None:
    base = latent_model(unet_config=locate(FirstLayer) | {"params": {"channels": 4}}, use_ema=True)
    for buffer in base.model_ema.buffers():
        buffer.data += 1
    torch.save({"state_dict": base.state_dict()}, tmp_path / "x.ckpt")
    model = latent_model(cls, unet_config=locate(FirstLayer), use_ema=True, ckpt_path=str(tmp_path / "x.ckpt"), **more)
    stored, got = (one.model.diffusion_model.input_blocks[0][0].weight for one in (base, model))
    assert torch.equal(got[:, :4], stored) and not got[:, 4:].any()
    average = model.model_ema.diffusion_modelinput_blocks00weight
    expected = stored + 1 if load_ema else stored
    assert torch.equal(average[:, :4], expected) and not average[:, 4:].any()


# Further channels


def test_inpainting_sees_mask_and_masked_image() -> None:
    model = recording_model(LatentInpaintDiffusion, finetune_keys=None, scale_factor=3.0)
    masks = torch.zeros(2, 8, 8, 1)
    masks[:, :4] = 1
    given = batch(mask=masks, masked_image=images().movedim(1, -1))
    z, c = model.get_input(given, "image")
    assert c["c_crossattn"][0].flatten().tolist() == [1.0, 3.0]
    assert c["c_concat"][0][:, 0].sum() == 2 * 8  # the upper half of 4 x 4
    torch.testing.assert_close(c["c_concat"][0][:, 1:], 1.5 * images())
    model.shared_step(given)[0].backward()
    assert model.model.diffusion_model.seen["x"].shape == (2, 7, 4, 4)
    shown = model.log_images(given, N=1, ddim_steps=2)
    assert {"samples", "masked_image", "diffusion_row"} <= set(shown) and "samples_inpainting" not in shown
    with pytest.raises(UserError, match="masked_image_key"):
        recording_model(LatentInpaintDiffusion, masked_image_key="other")


def test_depth_is_scaled_to_signed_numbers() -> None:
    model = recording_model(LatentDepth2ImageDiffusion, depth_stage_config=locate(Depth))
    given = batch(midas_in=torch.rand(2, 3, 9, 9))
    depth = model.get_input(given, "image")[1]["c_concat"][0]
    assert depth.shape == (2, 1, 4, 4)
    assert torch.equal(depth.amin((1, 2, 3)), -torch.ones(2)) and depth.amax() == pytest.approx(1, abs=0.02)
    assert model.log_images(given, ddim_steps=1)["depth"].shape == (2, 1, 9, 9)


def test_upscaling() -> None:
    model = recording_model(LatentUpscaleFinetuneDiffusion, reshuffle_patch_size=2)
    small = torch.arange(2 * 8 * 8.0).view(2, 8, 8, 1)
    channels = model.get_input(batch(lr=small), "image")[1]["c_concat"][0]
    assert torch.equal(channels[1], torch.stack([small[1, i:i + 4, j:j + 4, 0] for i in (0, 4) for j in (0, 4)]))
    model = recording_model(LatentUpscaleFinetuneDiffusion, low_scale_config=locate(LowScale), low_scale_key="lr",
                            conditioning_key="hybrid-adm")
    c = model.get_input(batch(lr=images().movedim(1, -1)), "image")[1]
    assert torch.equal(c["c_concat"][0], images() + 1) and c["c_adm"].tolist() == [0, 1]
    model = recording_model(LatentUpscaleDiffusion, low_scale_config=locate(LowScale), conditioning_key="hybrid-adm")
    given = batch(LR=images().movedim(1, -1))
    c = model.get_input(given, "image")[1]
    assert torch.equal(c["c_concat"][0], images() + 1) and c["c_adm"].tolist() == [0, 1]
    shown = model.log_images(given, ddim_steps=2, unconditional_guidance_scale=2.0, unconditional_guidance_label=["a"])
    assert {"x_lr", "samples", "samples_cfg_scale_2.00", "progressive_row"} <= set(shown)


def test_image_embeddings() -> None:
    params = {"embedder_config": locate(Embedder), "noise_aug_config": locate(NoiseAugmentation),
              "conditioning_key": "crossattn-adm", "embedding_key": "image"}
    model = recording_model(ImageEmbeddingConditionedLatentDiffusion, **params).eval()
    c = model.get_input(batch(), "image")[1]
    expected = torch.stack([2 * images().flatten(1).mean(1), torch.ones(2)], 1)
    torch.testing.assert_close(c["c_adm"], expected)
    shown = model.log_images(batch(), ddim_steps=2, unconditional_guidance_label=["a"])
    assert set(shown) == {"inputs", "reconstruction", "conditioning", "samples_cfg_scale_5.00"}
    dropped = recording_model(ImageEmbeddingConditionedLatentDiffusion, embedding_dropout=1.0, **params).train()
    assert not dropped.get_input(batch(), "image")[1]["c_adm"].any()


# Params of Stability AI's base class


def test_weights_are_repeated_to_fit() -> None:
    stored = torch.arange(6.0).view(2, 3, 1)
    assert torch.equal(repeat_to_fit(stored, stored), stored)
    got = repeat_to_fit(stored, torch.zeros(3, 4, 1))[..., 0]
    # Input channel 0 occurs twice, which counts as three; the others once, which counts as two.
    row = torch.tensor([0 / 3, 1 / 2, 2 / 2, 0 / 3])
    assert torch.allclose(got[0], row) and torch.equal(got[2], got[0])
    assert repeat_to_fit(torch.tensor([1.0, 2.0]), torch.zeros(3)).tolist() == [1, 2, 1]
    with pytest.raises(UserError, match="make_it_fit"):
        repeat_to_fit(stored, torch.zeros(2, 3, 2))


def test_training_drops_conditions_for_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = latent_model(ucg_training={"caption": {"p": 1.0, "val": None}}), []
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: seen.append(list(c)) or torch.zeros(2, 1, 1))
    model.training_step(batch(), 0)
    assert seen == [["", ""]]


def test_averages_start_again(tmp_path: Path) -> None:
    base = latent_model(use_ema=True)
    base.model_ema.num_updates += 5
    base.model_ema.diffusion_modelslope += 1
    torch.save({"state_dict": base.state_dict()}, tmp_path / "x.ckpt")
    path = str(tmp_path / "x.ckpt")
    kept, counted, reset = (latent_model(use_ema=True, ckpt_path=path, **more).model_ema for more in (
        {}, {"reset_num_ema_updates": True}, {"reset_ema": True}))
    assert [int(one.num_updates) for one in (kept, counted, reset)] == [5, 0, 0]
    assert [round(float(one.diffusion_modelslope), 3) for one in (kept, counted, reset)] == [1.7, 1.7, 0.7]
    with pytest.raises(UserError, match="need use_ema"):
        latent_model(reset_ema=True)


# Textual Inversion and DreamBooth


class Manager(nn.Module):
    """Stands for an embedding manager of the family's own."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(1))
        self.files: list[str] = []

    def embedding_parameters(self) -> Any:
        return self.parameters()

    def embedding_to_coarse_loss(self) -> Tensor:
        return (self.vector - 3).square()

    def save(self, path: str) -> None:
        self.files.append(path)

    def load(self, path: str) -> None:
        self.files.append(path)


class ManagedWords(Words):
    def encode(self, texts: list[str], embedding_manager: Manager | None = None) -> Tensor:
        return embedding_manager.vector * self(texts)


def managed_model(cls: type[LatentDiffusion] = LatentDiffusion, **params: Any) -> LatentDiffusion:
    config = {**locate(Manager), "params": {}}
    return latent_model(cls, cond_stage_config=locate(ManagedWords), personalization_config=config,
                        cond_stage_trainable=True, **params)


class OutsideModel(LatentDiffusion):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vector_at_construction = float(self.embedding_manager.vector.detach())


@pytest.mark.parametrize("cls", [LatentDiffusion, OutsideModel])
def test_only_vectors_are_trained(cls: type[LatentDiffusion]) -> None:
    model = managed_model(cls, embedding_reg_weight=0.5).train()
    assert not model.model.training and not model.cond_stage_model.training
    torch.manual_seed(0)
    loss, terms = model.shared_step(batch())
    loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {"embedding_manager.vector"}
    assert float(terms["train/loss_emb_reg"]) == 4
    assert float(terms["train/loss"]) == pytest.approx(float(terms["train/loss_simple"]) + 2)
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["params"] for group in groups] == [[model.embedding_manager.vector]]


def test_an_unfrozen_model_is_trained_as_well() -> None:
    model = managed_model(unfreeze_model=True, model_lr=1e-6)
    model.learning_rate = 0.1
    vectors, weights = model.configure_optimizers()["optimizer"].param_groups
    assert (vectors["lr"], weights["lr"]) == (0.1, 1e-6) and vectors["params"] == [model.embedding_manager.vector]
    assert set(map(id, weights["params"])) == {id(model.cond_stage_model.scale), id(model.model.diffusion_model.slope)}
    assert set(model.saved_weights(model.state_dict())) == set(model.state_dict())
    assert [len(group["params"]) for group in model.configure_opt_model().param_groups] == [1, 2]
    assert len(model.configure_opt_embedding().param_groups) == 1
    assert not model.model.diffusion_model.slope.requires_grad


def test_with_images_of_the_super_category_no_vectors_are_trained() -> None:
    model = managed_model(unfreeze_model=True, reg_weight=1.0)
    assert model.embedding_manager is None and model.is_personalized
    assert len(model.configure_optimizers()["optimizer"].param_groups[0]["params"]) == 2


def test_vectors_are_written_beside_the_checkpoints(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    model = managed_model()
    model.load_state_dict(model.state_dict())  # as public scripts load a base model
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[saver], enable_progress_bar=False,
                         enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(model, torch.utils.data.DataLoader([batch()], batch_size=None))
    assert {Path(path).name for path in model.embedding_manager.files} == {"embeddings.pt", "embeddings_gs-1.pt"}
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert set(saved) == {"embedding_manager.vector"}


def test_vectors_need_an_encoder_of_prompts() -> None:
    with pytest.raises(UserError, match="personalization_config: needs a model that encodes prompts"):
        latent_model(cond_stage_config="__is_unconditional__", personalization_config=locate(Manager))


def test_logged_images_of_textual_inversion() -> None:
    model = managed_model(timesteps=5, first_stage_config=locate(Halving))
    model.get_unconditional_conditioning = lambda count, label: torch.zeros(count, 1, 1)
    shown = model.log_images(batch(), ddim_steps=2, quantize_denoised=False)
    assert set(shown) == {"inputs", "reconstruction", "conditioning", "samples", "samples_scaled"}


def test_return_keys_and_rows_of_the_log() -> None:
    model = latent_model(timesteps=30, log_every_t=10)
    assert set(model.log_images(batch(), ddim_steps=1, return_keys=["samples", "none"])) == {"samples"}
    model.decode_first_stage = lambda z, **_: z
    row = model._get_denoise_row_from_list([images(), images(), images()])
    assert row.shape == (3, 2 * (4 + 2) + 2, 3 * (4 + 2) + 2)  # two images, three states, two pixels between them
    torch.testing.assert_close(row[:, 2:6, 8:12], images()[0])
    assert len(model.noised_states(images())) == 4  # t = 0, 10, 20 and 29
    colors = model.to_rgb(torch.rand(2, 9, 4, 4))
    assert colors.shape == (2, 3, 4, 4) and (colors.min(), colors.max()) == (-1, 1)
