"""Scripts in the manner of the LDM family's users run on this package, and give what the family's formulas give."""
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ldm_users import (
    attention_hook,
    class_conditional,
    edit_image,
    expectations,
    image_to_image,
    inpainting,
    own_embedding,
    sigma_denoiser,
    text_to_image,
    training,
    unconditional,
)
from ldm_users.loading import load_model
from ldm_users.user_configs import CLASSES, write_checkpoint, write_user_files
from torch import Tensor

PROMPTS = ["a red ball", "two small boats on a lake"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that builds and loads a kind of model, once."""
    models: dict[str, Any] = {}

    def load(kind: str) -> Any:
        if kind not in models:
            config = write_user_files(tmp_path_factory.mktemp(kind), kind)
            models[kind] = load_model(config, write_checkpoint(config))
        return models[kind]

    return load


def text_network(model: Any, prompts: list[str], scale: float) -> expectations.Network:
    cond, uncond = (model.get_learned_conditioning(texts) for texts in (prompts, [""] * len(prompts)))
    return expectations.guided(model, cond, uncond, scale)


# Seven is a number of steps that does not divide 1000: the family then makes eight.
@torch.no_grad()
@pytest.mark.parametrize(("sampler", "steps", "eta", "fixed_start"), [
    ("ddim", 4, 0.0, False), ("ddim", 7, 0.0, False), ("ddim", 4, 1.0, True), ("plms", 7, 0.0, True),
    ("plms", 5, 0.0, False), ("dpm", 5, 0.0, False)])
def test_text_to_image(loaded: Any, sampler: str, steps: int, eta: float, fixed_start: bool) -> None:
    model = loaded("text")
    torch.manual_seed(5)
    batches = text_to_image.generate(model, PROMPTS, sampler, steps, 3.0, eta, 2, fixed_start)
    torch.manual_seed(5)
    start = torch.randn(2, 4, 8, 8) if fixed_start else None
    for images in batches:
        x, eps = torch.randn(2, 4, 8, 8) if start is None else start, text_network(model, PROMPTS, 3.0)
        if sampler == "dpm":
            latents = expectations.dpm_solver(model, eps, x, steps)
        elif sampler == "plms":
            latents = expectations.plms(model, eps, x, expectations.ddim_steps(steps))
        else:
            latents = expectations.ddim(model, eps, x, expectations.ddim_steps(steps), eta)
        torch.testing.assert_close(images, ((expectations.decoded(model, latents.float()) + 1) / 2).clamp(0, 1),
                                   **CLOSE)


@torch.no_grad()
def test_image_to_image(loaded: Any) -> None:
    model, image = loaded("text"), torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(6)
    latents = image_to_image.redraw(model, image, PROMPTS, strength=0.5, steps=8, scale=2.0)
    torch.manual_seed(6)
    steps = expectations.ddim_steps(8)
    start = expectations.encoded(model, image)
    noisy = expectations.noised(model, start, torch.tensor([steps[4]] * 2), torch.randn_like(start))
    torch.testing.assert_close(
        latents, expectations.ddim(model, text_network(model, PROMPTS, 2.0), noisy, steps[:4]).float(), **CLOSE)


@torch.no_grad()
def test_class_conditional(loaded: Any) -> None:
    model = loaded("classes")
    torch.manual_seed(7)
    found = class_conditional.sample_classes(model, [1, 3], none=CLASSES - 1, steps=4)
    torch.manual_seed(7)
    table = model.cond_stage_model.embedding.weight
    for label, latents in zip([1, 3], found, strict=True):
        cond, uncond = (table[index].expand(2, 1, -1) for index in (label, CLASSES - 1))
        eps = expectations.guided(model, cond, uncond, 3.0)
        expected = expectations.ddim(model, eps, torch.randn(2, 4, 8, 8), expectations.ddim_steps(4))
        torch.testing.assert_close(latents, expected.float(), **CLOSE)


@torch.no_grad()
def test_inpainting(loaded: Any) -> None:
    model = loaded("inpainting")
    image, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[..., 4:12, 6:] = 1
    torch.manual_seed(8)
    filled = inpainting.fill(model, image, mask, steps=4)
    torch.manual_seed(8)
    stage = model.first_stage_model
    seen = stage.quant_conv(stage.encoder(2 * (1 - mask) * image - 1))
    small = F.interpolate(2 * mask - 1, size=(8, 8))
    eps = expectations.guided(model, None, concat=torch.cat([seen, small], 1))
    latents = expectations.ddim(model, eps, torch.randn(2, 4, 8, 8), expectations.ddim_steps(4)).float()
    codes = stage.quantize.embedding.weight
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 4), codes).argmin(1)
    quantized = codes[nearest].view(2, 8, 8, 4).permute(0, 3, 1, 2)
    drawn = ((stage.decoder(stage.post_quant_conv(quantized)) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(filled, (1 - mask) * image + mask * drawn, rtol=1e-4, atol=5e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 5])
def test_unconditional_samples_use_the_averages(loaded: Any, steps: int | None) -> None:
    model = loaded("unconditional")
    averaged = copy.deepcopy(model)
    for name, parameter in averaged.model.named_parameters():
        parameter.mul_(0.9)
        model.model_ema.get_buffer(name.replace(".", "")).copy_(parameter)
    torch.manual_seed(9)
    latents, kept = unconditional.sample(model, 2, steps)
    torch.manual_seed(9)
    eps, start = expectations.guided(averaged, None), torch.randn(2, 4, 8, 8)
    expected = (expectations.markov_chain(averaged, eps, start) if steps is None else
                expectations.ddim(averaged, eps, start, expectations.ddim_steps(steps, 20), 1.0))
    torch.testing.assert_close(latents, expected.float(), **CLOSE)
    assert len(kept) == (5 if steps is None else 3)


def test_learned_word(loaded: Any, tmp_path: Path) -> None:
    model = loaded("words")
    ids = model.cond_stage_model.tokenizer(["dog"])["input_ids"]
    token = int(torch.as_tensor(ids).flatten()[1])
    table = model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight.detach()
    own_embedding.write_embedding(tmp_path / "dog.pt", "*", table[token][None].clone())
    found = own_embedding.encode_with(model, tmp_path / "dog.pt", ["a photo of *", "a cat"])
    torch.testing.assert_close(found, model.get_learned_conditioning(["a photo of dog", "a cat"]), **CLOSE)
    own_embedding.write_embedding(tmp_path / "other.pt", "*", table[token][None] * 0.3)
    other = own_embedding.encode_with(model, tmp_path / "other.pt", ["a photo of *", "a cat"])
    torch.testing.assert_close(other[1], found[1], **CLOSE)
    assert not torch.allclose(other[0], found[0], atol=1e-2)


@torch.no_grad()
def test_sigma_denoiser(loaded: Any) -> None:
    model = loaded("text")
    denoiser = sigma_denoiser.SigmaDenoiser(model)
    sigmas = torch.tensor([12.0, 3.3, 0.7, 0.0])
    cond, x = model.get_learned_conditioning(PROMPTS), torch.randn(2, 4, 8, 8) * sigmas[0]
    found = sigma_denoiser.euler(denoiser, x, sigmas, cond=cond)
    eps = expectations.guided(model, cond)
    expected = expectations.euler(lambda z, sigma: expectations.denoised(model, eps, z, sigma), x, sigmas.tolist())
    torch.testing.assert_close(found, expected.float(), **CLOSE)


@torch.no_grad()
def test_edit_image(loaded: Any) -> None:
    model, image, sigmas = loaded("hybrid"), torch.rand(1, 3, 16, 16) * 2 - 1, torch.tensor([9.0, 2.0, 0.4, 0.0])
    torch.manual_seed(11)
    found = edit_image.edit(model, image, "make it blue", sigmas, 4.0, 1.5)
    torch.manual_seed(11)
    stage = model.first_stage_model
    picture = stage.quant_conv(stage.encoder(image)).chunk(2, 1)[0]
    text, none = (model.get_learned_conditioning([words]) for words in ("make it blue", ""))
    networks = [expectations.guided(model, words, concat=seen) for words, seen in
                ((text, picture), (none, picture), (none, torch.zeros_like(picture)))]

    def denoise(z: Tensor, sigma: float) -> Tensor:
        full, seen, nothing = (expectations.denoised(model, eps, z, sigma) for eps in networks)
        return nothing + 4.0 * (full - seen) + 1.5 * (seen - nothing)

    expected = expectations.euler(denoise, torch.randn(1, 4, 8, 8) * sigmas[0], sigmas.tolist())
    torch.testing.assert_close(found, expected.float(), **CLOSE)


@torch.no_grad()
def test_attention_hook(loaded: Any) -> None:
    model = loaded("text")
    cond, x, t = model.get_learned_conditioning(PROMPTS), torch.randn(2, 4, 8, 8), torch.tensor([20, 700])
    plain, maps = model.apply_model(x, t, cond), {}
    unet = model.model.diffusion_model
    with attention_hook.recorded(unet, maps):
        patched = model.apply_model(x, t, cond)
    assert len(maps) == sum(name.endswith("attn2") for name, _ in unet.named_modules()) > 3
    assert all(found.shape[-1] == cond.shape[1] for found in maps.values())
    torch.testing.assert_close(patched, plain, **CLOSE)
    torch.testing.assert_close(model.apply_model(x, t, cond), plain)


def test_training(tmp_path: Path) -> None:
    config = write_user_files(tmp_path)
    path = write_checkpoint(config)
    config = write_user_files(tmp_path, ckpt_path=str(path))
    reference = load_model(config)
    model, steps = training.train(config, 2)
    images = training.Photos(16).photos.permute(0, 3, 1, 2)
    captions = [f"photo {index}" for index in range(4)]
    optimizer = torch.optim.AdamW(reference.model.parameters(), lr=1e-3)
    for index, logged in enumerate(steps):
        # the family's order of random numbers: posterior, timesteps, noise
        torch.manual_seed(index)
        batch = slice(2 * index, 2 * index + 2)
        with torch.no_grad():
            x0 = expectations.encoded(reference, images[batch])
            cond = reference.get_learned_conditioning(captions[batch])
        t, noise = torch.randint(0, 1000, (2,)), torch.randn_like(x0)
        eps = expectations.guided(reference, cond)(expectations.noised(reference, x0, t, noise), t)
        error = (eps - noise).square().mean([1, 2, 3])
        simple, bound = float(error.detach().mean()), float((reference.lvlb_weights[t] * error.detach()).mean())
        assert logged["train/loss_simple"] == pytest.approx(simple, rel=1e-4)
        assert logged["train/loss"] == pytest.approx(simple, rel=1e-4)
        assert logged["train/loss_vlb"] == pytest.approx(bound, rel=1e-4)
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    # Adam amplifies rounding errors of the smallest gradients, so that single weights may differ by a step of 1e-3
    differences = torch.cat([(model.model.get_parameter(name) - parameter).abs().flatten()
                             for name, parameter in reference.model.named_parameters()])
    assert differences.mean() < 1e-5
