"""The methods that Perfusion is compared with: what each trains, by which loss, and what its file restores."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_concepts import WORD, RepeatedBatch, attach_trainer, load_photos, train_method, write_photos
from torch import Tensor

from ldm.common.errors import UserError
from ldm.common.files import load_metadata, load_tensors
from ldm.concepts.settings import override_settings
from ldm.concepts.storage import load_concepts, read_concepts, save_concepts
from ldm.inference.encoding import build_prompt_encoder, encode_prompts
from ldm.personalization.finetuning import FinetuningMethod
from ldm.util import instantiate_from_config

CATEGORY = "teddy bear"
PROMPTS = [template.replace("{}", WORD) for template in tiny_models.TEMPLATES]
TARGETS = {"textual-inversion": "textual_inversion.TextualInversion",
           "custom-diffusion": "custom_diffusion.CustomDiffusion", "dreambooth": "dreambooth.DreamBooth"}
TRAINS_UNET = ("custom-diffusion", "dreambooth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a base model and two photos."""
    path = tmp_path_factory.mktemp("baselines")
    tiny_models.write_weights(path)
    write_photos(path)
    return path


def unprepared(folder: Path, method: str, **params: Any) -> FinetuningMethod:
    prior = {"prior_count": 3, "prior_steps": 2} if method in TRAINS_UNET else {}
    given = {"super_category": CATEGORY, "placeholder": WORD, "ckpt_path": str(folder / "base.ckpt"), **prior, **params}
    return instantiate_from_config(tiny_models.latent_diffusion_config(folder, TARGETS[method], **given))


def prepared(folder: Path, method: str, **params: Any) -> FinetuningMethod:
    model = attach_trainer(unprepared(folder, method, **params), load_photos(folder), root=str(folder / "run"))
    model.setup("fit")
    model.configure_optimizers()
    return model.train()


def perturbed(model: FinetuningMethod, seed: int = 3, by: float = 0.1) -> FinetuningMethod:
    """Move the parameters, as some training would, and return the model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return model


def batch() -> dict[str, Any]:
    return {"caption": PROMPTS, "index": torch.tensor([0, 1]), "flipped": torch.tensor([False, True])}


def cross_attention(model: FinetuningMethod) -> set[str]:
    return {f"{name}.{part}.weight" for name in model.text_layers for part in ("to_k", "to_v")}


def trained_by_the_paper(model: FinetuningMethod, method: str) -> set[str]:
    """Return the names, in the whole model, of the parameters that the method's paper trains."""
    weights = {"textual-inversion": set(), "custom-diffusion": cross_attention(model),
               "dreambooth": {name for name, _ in model.model.diffusion_model.named_parameters()}}[method]
    word = set() if method == "dreambooth" else {"concepts.0.vectors"}
    return word | {f"model.diffusion_model.{name}" for name in weights}


def fit(folder: Path, root: Path, method: str, steps: int, resumed: Path | None = None) -> FinetuningMethod:
    return train_method(unprepared(folder, method), RepeatedBatch(folder, batch()), root, steps, resumed)


# What is trained


@pytest.mark.slow
@pytest.mark.parametrize("method", TARGETS)
def test_only_the_parameters_of_the_paper_are_trained(folder: Path, tmp_path: Path, method: str) -> None:
    model = prepared(folder, method)
    model.training_step(batch(), 0).backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert gradients == trained_by_the_paper(model, method)
    fresh, after = unprepared(folder, method).state_dict(), fit(folder, tmp_path / "run", method, 2)
    changed = {name for name, value in after.state_dict().items()
               if name in fresh and not torch.equal(value, fresh[name])}
    assert changed == trained_by_the_paper(model, method) - {"concepts.0.vectors"}
    assert float(after.concepts[0].distance()) > 0 or method == "dreambooth"
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == trained_by_the_paper(model, method) | {"concepts.0.vectors"}
    learned = load_concepts(tmp_path / "run" / "concept.safetensors")[0]
    assert learned.steps == 2 and learned.parameter_count == sum(p.numel() for p in model.trained_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINS_UNET)
def test_resuming_equals_not_stopping(folder: Path, tmp_path: Path, method: str) -> None:
    straight = fit(folder, tmp_path / "a", method, 3)
    fit(folder, tmp_path / "b", method, 2)
    fit(folder, tmp_path / "c", method, 3, tmp_path / "b" / "last.ckpt")
    ours, theirs = (load_tensors(tmp_path / run / "concept.safetensors")[0] for run in "ac")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert load_concepts(tmp_path / "c" / "concept.safetensors")[0].base == straight.base_model.fingerprint
    assert len(list((tmp_path / "prior").glob("*.safetensors"))) == 1  # the three share it


def test_words_and_weights_have_their_own_learning_rates(folder: Path) -> None:
    model = prepared(folder, "custom-diffusion", embedding_lr=0.5, weight_lr=0.25)
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.25]
    assert [len(group["params"]) for group in groups] == [1, len(cross_attention(model))]


# Words


def test_vectors_of_a_word_start_at_the_super_category(folder: Path) -> None:
    model = prepared(folder, "textual-inversion", vectors_per_word=3)
    encoder = model.cond_stage_model
    mean = encoder.token_table[encoder.word_pieces(CATEGORY)].mean(0)
    assert torch.allclose(model.concepts[0](), mean.expand(3, -1), atol=1e-6)
    with torch.no_grad():
        model.concepts[0].vectors.copy_(encoder.token_table[encoder.word_pieces("red cat hat")])
        expected = encoder([template.replace("{}", "red cat hat") for template in tiny_models.TEMPLATES])
        assert torch.allclose(model.prompt_context(PROMPTS).encoding, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINS_UNET)
def test_a_rare_word_precedes_the_super_category_or_a_new_word_replaces_it(folder: Path, method: str) -> None:
    with torch.no_grad():
        model = prepared(folder, method, rare_word="mug")
        expected = model.cond_stage_model([template.replace("{}", f"mug {CATEGORY}")
                                           for template in tiny_models.TEMPLATES])
        assert torch.allclose(model.prompt_context(PROMPTS).encoding, expected, atol=1e-5)
        alone = prepared(folder, method, rare_word=None, super_category="cat")
        expected = model.cond_stage_model([template.replace("{}", "cat") for template in tiny_models.TEMPLATES])
        assert torch.allclose(alone.prompt_context(PROMPTS).encoding, expected, atol=1e-5)


# The loss


def plain_loss(model: FinetuningMethod, z: Tensor, encoding: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of the predicted noise, by DDPM's formula."""
    level = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = level.sqrt() * z + (1 - level).sqrt() * noise
    return (model.model.diffusion_model(noisy, t, context=encoding) - noise).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("method", TARGETS)
def test_the_loss_adds_the_loss_on_the_prior(folder: Path, method: str) -> None:
    model = perturbed(prepared(folder, method, **({"prior_weight": 0.5} if method in TRAINS_UNET else {})))
    own, seen = model.per_sample_losses, []
    model.per_sample_losses = lambda *args: seen.append(args) or own(*args)
    loss = model.training_step(batch(), 0)
    (z, _, t, noise, _), *prior = seen
    expected = plain_loss(model, z, model.prompt_context(PROMPTS).encoding, t, noise)
    if method in TRAINS_UNET:
        ((other, context, times, extra),) = prior
        plain = model.cond_stage_model([template.replace("{}", CATEGORY) for template in tiny_models.TEMPLATES])
        chosen = [next(n for n, latent in enumerate(model._prior_latents) if torch.equal(latent, one)) for one in other]
        encoding = plain[[index % len(plain) for index in chosen]]
        assert torch.allclose(context.encoding, encoding) and not torch.equal(extra, noise)
        expected = expected + 0.5 * plain_loss(model, other, encoding, times, extra)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.slow
def test_the_base_model_generates_the_prior_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(folder, "custom-diffusion")
    monkeypatch.setattr(type(model), "_generate_prior", None)  # DreamBooth finds the images in the cache
    again = prepared(folder, "dreambooth")
    assert torch.equal(again._prior_latents, model._prior_latents) and model._prior_latents.shape == (3, 4, 8, 8)
    monkeypatch.undo()
    base = tiny_models.build_model(folder, use_ema=False).eval()
    prompt = [tiny_models.TEMPLATES[1].replace("{}", CATEGORY)]
    images = base.sample_images(
        base.get_learned_conditioning(prompt), 1, 2, 6.0, base.get_learned_conditioning([""]),
        generators=[torch.Generator().manual_seed(1)])
    assert torch.allclose(model.decode_first_stage(model._prior_latents[1:2]).clamp(-1, 1), images, atol=1e-3)
    assert not hasattr(prepared(folder, "dreambooth", prior_weight=0.0), "_prior_latents")


def test_prompts_of_the_prior_have_the_right_article(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requested = unprepared(folder, "dreambooth"), []
    monkeypatch.setattr(type(model), "_load_or_generate_prior", lambda _, prompts: requested.extend(prompts))
    model.make_concept(load_photos(folder), "outside")
    assert requested == ["a photo of an outside", "the outside in a picture"]


# Files


@pytest.mark.slow
@pytest.mark.parametrize(("method", "params"), [
    ("textual-inversion", {}), ("textual-inversion", {"vectors_per_word": 3}), ("custom-diffusion", {}),
    ("dreambooth", {})])
def test_a_file_restores_what_was_learned(folder: Path, tmp_path: Path, method: str, params: dict[str, Any]) -> None:
    model = perturbed(prepared(folder, method, **params))
    path = save_concepts(tmp_path / "toy.safetensors", [model.export_concept()], torch.float32)
    assert load_metadata(path)["personalization"]["method"] == method
    base = tiny_models.build_model(folder, use_ema=False).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    context = encode_prompts(build_prompt_encoder(base, read_concepts([path])), PROMPTS).select(PROMPTS)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        got, expected = base.apply_model(x, t, context), model.apply_model(x, t, model.prompt_context(PROMPTS))
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
        plain = base.apply_model(x, t, base.get_learned_conditioning([CATEGORY] * 2))
        assert not torch.allclose(plain, expected, atol=1e-2 * float(expected.abs().max()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ldm.inference.encoding.PROMPTS_AT_A_TIME", 1)  # all share the same weights
            in_batches = encode_prompts(build_prompt_encoder(base, read_concepts([path])), PROMPTS).select(PROMPTS)
        assert torch.allclose(base.apply_model(x, t, in_batches), got, atol=1e-4 * float(got.abs().max()))
        during = encode_prompts(build_prompt_encoder(model, [model.export_concept()]), PROMPTS).select(PROMPTS)
        assert torch.allclose(model.apply_model(x, t, during), expected, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, list[Path]]:
    """Files of two concepts of each method."""
    files: dict[str, list[Path]] = {method: [] for method in TARGETS}
    for method, paths in files.items():
        for seed, (word, category) in enumerate(((WORD, CATEGORY), ("<other>", "mug"))):
            model = perturbed(prepared(folder, method, super_category=category), seed, by=0.5)
            model.placeholders = [word]
            paths.append(save_concepts(folder / f"{method}{seed}.safetensors", [model.export_concept()]))
    return files


@pytest.mark.slow
def test_one_prompt_can_have_words_of_two_files(folder: Path, files: dict[str, list[Path]]) -> None:
    base = tiny_models.build_model(folder, use_ema=False).eval()
    one, two = concepts = read_concepts(files["textual-inversion"])
    prompt = f"a {WORD} by a <other>"
    encoded = encode_prompts(build_prompt_encoder(base, concepts), [prompt]).select([prompt]).encoding
    encoder = base.cond_stage_model
    tokens = encoder.tokenize([prompt], [WORD, "<other>"])
    assert torch.allclose(encoded, encoder.encode_tokens(tokens, torch.cat([one.vectors, two.vectors])), atol=1e-5)


def test_merged_weights_map_both_words_and_change_little_else(folder: Path, files: dict[str, list[Path]]) -> None:
    """Lagrange's conditions of the constrained problem: the change times C lies in the span of the words."""
    base = tiny_models.build_model(folder, use_ema=False).eval()
    words = base.get_learned_conditioning(["a cat in a red box", "the dog and a cup", "a bear on a bike"])
    covariance = words.flatten(0, 1).mT.double() @ words.flatten(0, 1).double() + torch.eye(tiny_models.WIDTH)
    base.inverse_covariance = lambda: torch.linalg.inv(covariance).float()
    concepts = read_concepts(files["custom-diffusion"])
    merged = build_prompt_encoder(base, concepts).weights
    own = dict(base.model.diffusion_model.named_parameters())
    targets = torch.cat([concept.inputs for concept in concepts]).double()
    assert len(targets) == 3 + 2  # "sks teddy bear" and "sks mug"
    for name, weight in merged.items():
        outputs = torch.cat([concept.inputs @ concept.weights[name].mT for concept in concepts])
        error = (targets @ weight.double().mT - outputs).abs().max()
        assert float(error) < 1e-4 * float(outputs.abs().max()), name
        change = (weight - own[name].detach()).double()
        multipliers = torch.linalg.lstsq(targets.mT, covariance @ change.mT).solution
        residual = covariance @ change.mT - targets.mT @ multipliers
        assert float(residual.abs().max()) < 1e-2 * float((covariance @ change.mT).abs().max()), name


@pytest.mark.parametrize(("names", "settings", "message"), [
    (["textual-inversion0"], {"biases": [0.5]}, "--bias: .* by Textual Inversion and has none"),
    (["dreambooth0"], {"temperatures": [0.5]}, "--temperature: .* by DreamBooth"),
    (["dreambooth0", "dreambooth1"], {}, "DreamBooth changes weights of the U-Net that"),
    (["dreambooth0", "custom-diffusion1"], {}, "only concepts of one method"),
])
def test_settings_and_mixtures_that_do_not_apply_raise_a_user_error(
        folder: Path, files: dict[str, list[Path]], names: list[str], settings: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        override_settings(read_concepts([folder / f"{name}.safetensors" for name in names]), **settings)
    assert "\n" not in str(error.value)


def test_global_locking_and_other_base_models_raise_a_user_error(folder: Path, files: dict[str, list[Path]]) -> None:
    concepts = read_concepts(files["custom-diffusion"][:1])
    base = tiny_models.build_model(folder, use_ema=False)
    with pytest.raises(UserError, match="--global_locking"):
        encode_prompts(build_prompt_encoder(base, concepts), PROMPTS, global_locking=True)
    with pytest.raises(UserError, match="was trained on .*another model"):
        build_prompt_encoder(tiny_models.build_model(folder, seed=9, use_ema=False), concepts)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "params", "named"), [
    ("textual-inversion", {"vectors_per_word": 0}, "vectors_per_word 0"),
    ("textual-inversion", {"vectors_per_word": 14}, "takes 14"), ("dreambooth", {"weight_lr": 0.0}, "weight_lr"),
    ("custom-diffusion", {"prior_weight": -1.0}, "prior_weight"),
    ("custom-diffusion", {"super_category": None}, "--init_word"), ("dreambooth", {"bias": 0.5}, "does not know bias")])
def test_params_that_no_method_can_have(folder: Path, method: str, params: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        prepared(folder, method, **params)
