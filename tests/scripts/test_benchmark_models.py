"""The benchmark compares what it claims to: equal shapes, steps that train the right weights, runs that start."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sdxl
import torch
from helpers import tiny_models
from omegaconf import OmegaConf
from transformers import CLIPSegConfig

from ldm.checkpoints.load import load_model
from ldm.cli.training import parse_training_options
from ldm.common.errors import UserError
from ldm.concepts.concept_file import load_perfusion_concepts
from ldm.modules.covariance import encoder_fingerprint
from ldm.modules.covariance_files import load_covariance
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.training.config import read_config
from ldm.util import count_params, instantiate_from_config
from scripts.benchmarks import baselines, device, many_concepts, parts, sampling, sdxl_step, training_step
from scripts.benchmarks.clock import StepClock
from scripts.benchmarks.common import BenchmarkSettings, ModelShape
from scripts.benchmarks.device import memory_of
from scripts.benchmarks.perfusion_step import PerfusionStep
from scripts.benchmarks.whole_concept import RunFiles, read_clock, training_command, write_run_files

PROJECT = Path(__file__).resolve().parents[2]
METHODS = ["Perfusion", "Perfusion, checkpointing", "frozen U-Net alone", *baselines.METHODS]


@pytest.fixture
def settings(tmp_path: Path) -> BenchmarkSettings:
    """The settings of a tiny model, with one round."""
    data = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": {
        "target": "ldm.data.personalized.PersonalizedBase",
        "params": {"data_root": "photos", "size": 16, "placeholder_token": "${model.params.placeholder}",
                   "templates": list(tiny_models.TEMPLATES)}}}}
    perfusion = tiny_models.latent_diffusion_config(tmp_path, "perfusion.Perfusion", super_category="teddy bear",
                                                    placeholder="<toy>")
    for name, content in {"train": {"model": perfusion, "data": data},
                          "inference": {"model": tiny_models.latent_diffusion_config(tmp_path)}}.items():
        OmegaConf.save(OmegaConf.create(content), tmp_path / f"{name}.yaml")
    shape = ModelShape("mini", str(tmp_path / "train.yaml"), str(tmp_path / "inference.yaml"), 16, 16, steps=2,
                       quick_steps=2, batches=(2,), quick_batches=(2,), segmenter="models/mini/segmenter",
                       has_goals=False)
    return BenchmarkSettings(torch.device("cpu"), tmp_path / "made", shape, rounds=1, quick=True)


def build_components(perfusion: PerfusionStep, settings: BenchmarkSettings) -> baselines.DiffusersComponents:
    params = OmegaConf.to_container(OmegaConf.load(settings.shape.train_config).model.params)
    return baselines.DiffusersComponents(params, perfusion.model.cond_stage_model.transformer.config, settings.device)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["perfusion.yaml", "perfusion-sd-v1.yaml", "perfusion-sd-v2.yaml",
                                    "perfusion-sd-xl.yaml"])
def test_unet_of_diffusers_has_the_same_size(config: str) -> None:
    from diffusers import UNet2DConditionModel

    unet = OmegaConf.to_container(OmegaConf.load(PROJECT / "configs" / config).model.params.unet_config)
    with torch.device("meta"):
        ours, theirs = instantiate_from_config(unet), UNet2DConditionModel(**baselines.unet_settings(unet["params"]))
    assert count_params(ours) == count_params(theirs)


def test_first_stage_of_diffusers_has_the_same_size() -> None:
    from diffusers import AutoencoderKL

    stage = OmegaConf.load(PROJECT / "configs/perfusion-sd-v1.yaml").model.params.first_stage_config
    with torch.device("meta"):
        ours = instantiate_from_config(stage)
        theirs = AutoencoderKL(**baselines.first_stage_settings(stage.params.ddconfig))
    assert count_params(ours) == count_params(theirs)


@pytest.mark.slow
def test_every_method_has_rows(settings: BenchmarkSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.MATRIX_SIDE, "cpu", 256)
    rows = {row.name: row for row in training_step.measure(settings)}
    for name in METHODS:
        assert rows[f"step of {name}, batch 2, 16 px"].value > 0
        assert 0 < rows[f"share of the matrix rate, {name}, batch 2, 16 px"].value < 100
    assert rows["Perfusion / frozen U-Net alone, batch 2, 16 px"].value > 0
    assert all(row.goal is None for row in rows.values())


@pytest.mark.slow
def test_a_missing_package_leaves_its_method_out(settings: BenchmarkSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = baselines.importlib.util.find_spec
    monkeypatch.setattr(baselines.importlib.util, "find_spec",
                        lambda name: None if name == "peft" else find_spec(name))
    components = build_components(PerfusionStep(settings), settings)
    methods = dict(baselines.build_methods(components, free=10**12))
    lora = methods["peft's LoRA, rank 4"]
    assert isinstance(lora, UserError) and "pip install" in str(lora)
    assert isinstance(methods["diffusers' Textual Inversion"], baselines.DiffusersTextualInversion)
    assert "GB" in str(dict(baselines.build_methods(components, free=10**5))[baselines.FULL])


@pytest.mark.slow
def test_each_method_trains_its_weights_only(settings: BenchmarkSettings) -> None:
    perfusion = PerfusionStep(settings)
    components = build_components(perfusion, settings)
    batch = components.batch(2, 16, 16)
    inversion, lora, full = (build(components) for build in baselines.METHODS.values())
    assert memory_of([inversion.unet, lora.unet]) < 1.2 * memory_of([components.unet])  # they share its weights

    lora.step(batch)
    trained = {name for name, weight in lora.unet.named_parameters() if weight.requires_grad}
    blocks = len(perfusion.model.text_layers)  # each has two attentions of four projections, each with an A and a B
    assert len(trained) == blocks * 2 * 4 * 2 and all("lora_" in name for name in trained)

    table = inversion.table.detach().clone()
    inversion.step(batch)
    changed = (inversion.table != table).any(1)
    assert changed.sum() == 1 and changed[-1]

    weights = {name: weight.clone() for name, weight in full.unet.state_dict().items()}
    full.step(batch)
    assert all((weight != weights[name]).any() for name, weight in full.unet.state_dict().items())

    before = [parameter.detach().clone() for parameter in perfusion.model.trained_parameters()]
    frozen = {name: weight.clone() for name, weight in perfusion.unet.state_dict().items()}
    perfusion.step(perfusion.batch(2))
    after = perfusion.model.trained_parameters()
    assert all((new != old).any() for new, old in zip(after, before, strict=True))
    assert all(torch.equal(weight, frozen[name]) for name, weight in perfusion.unet.state_dict().items())


@pytest.mark.slow
def test_sampling_has_rows_for_each_count(settings: BenchmarkSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "COUNTS", (0, 1, 2))
    rows = [row.name for row in sampling.measure(settings)]
    assert len(rows) == 3 + 3 + 2 and "an image, 2 loaded / none, 2 steps, 16 px" in rows
    (with_concepts, without, ratio) = many_concepts.measure_one_batch(settings)
    assert with_concepts.value > 0 and without.value > 0 and ratio.unit == "x"


@pytest.mark.slow
def test_parts_write_files_and_have_rows(settings: BenchmarkSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "CONCEPTS", (2, 3))
    monkeypatch.setattr(parts, "QUICK_CAPTIONS", 20)
    monkeypatch.setattr(parts, "QUICK_PHOTOS", 2)
    rows = list(parts.measure(settings))
    assert [row.met for row in rows if row.unit == "KB"] == [True, True, True]
    assert all(row.value is not None and row.value >= 0 for row in rows) and len(rows) == 3 + 3 * 2 + 1 + 2
    assert len(load_perfusion_concepts(settings.folder / "concepts" / "merged_3.safetensors")) == 3


@pytest.mark.slow
def test_files_of_a_run_can_be_loaded(settings: BenchmarkSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config_class = CLIPSegConfig
    monkeypatch.setattr(parts, "CLIPSegConfig", lambda **params: config_class(
        text_config={**small, "num_hidden_layers": 2},
        vision_config={**small, "num_hidden_layers": 4, "image_size": 32}, projection_dim=32, extract_layers=[1, 2, 3],
        decoder_num_attention_heads=2, decoder_intermediate_size=32, **{**params, "reduce_dim": 32}))
    random_segmenter = replace(settings, shape=replace(settings.shape, segmenter=None))
    files = write_run_files(random_segmenter)
    model = load_model(OmegaConf.load(settings.shape.inference_config), files.checkpoint)
    assert load_covariance(files.covariance, encoder_fingerprint(model.cond_stage_model)).shape == (16, 16)
    assert all(weight.any() for weight in model.model.parameters())
    segmenter = ZeroShotSegmenter.from_path(files.segmenter)
    assert segmenter.preprocessing == parts.build_segmenter(random_segmenter).preprocessing


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "concepts"), [("sd", 1), ("mini", 1), ("mini", 3)])
def test_main_accepts_the_training_commands(shape: str, concepts: int, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benchmarks.common import SHAPES

    monkeypatch.chdir(PROJECT)
    settings = BenchmarkSettings(torch.device("cpu"), tmp_path, SHAPES[shape], quick=True)
    files = RunFiles()
    if shape == "sd":
        files = RunFiles(tmp_path / "base", tmp_path / "covariance", tmp_path / "segmenter")
    python, script, *arguments = map(str, training_command(settings, files, "run", concepts))
    config: Any = read_config(parse_training_options(arguments))
    assert script == "main.py" and config.data.params.train.params.size == settings.side
    assert config.model.params.unet_config.params.use_checkpoint is False
    if concepts > 1:
        assert len(config.data.params.train.params.data_root) == concepts and config.data.params.concepts_per_batch == 4
    if shape == "sd":
        assert config.model.params.ckpt_path == str(files.checkpoint)
        assert config.model.params.image_size == settings.side // 8
    clock: StepClock = instantiate_from_config(config.lightning.callbacks.clock)
    clock.on_fit_start()
    clock.on_train_batch_start()
    clock.on_train_end()
    times = read_clock(settings, "run")
    assert 0 < times["ready"] <= times["starts"][0]


@pytest.mark.slow
def test_steps_of_an_sdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "SIZE_FEATURES", sdxl.FEATURES)
    config = OmegaConf.load(PROJECT / "configs" / "perfusion-sd-xl.yaml")
    small = sdxl.small_config().model.params
    for name in ("image_size", "unet_config", "first_stage_config", "cond_stage_config"):
        config.model.params[name] = small[name]
    config.model.params.super_category = "cat"
    config.data.params.train.params.data_root = "photos"
    OmegaConf.save(config, tmp_path / "train.yaml")
    shape = ModelShape("small", str(tmp_path / "train.yaml"), "", sdxl.SIDE, sdxl.SIDE, has_goals=False)
    settings = BenchmarkSettings(torch.device("cpu"), tmp_path / "made", shape, rounds=1, quick=True)
    rows = {row.name: row.value for row in sdxl_step.measure(settings)}
    names = ("Perfusion", "Perfusion, a word that stays", "the frozen U-Net alone", "peft's LoRA, rank 4, no encoders")
    for name in names:
        assert rows[f"step of {name}, batch 1, 16 px"] > 0
