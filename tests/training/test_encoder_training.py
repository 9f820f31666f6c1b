"""A concept encoder for a model of the user's: images by the model itself, training, and a folder that loads."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import tiny_models
from helpers.model_files import load_main
from helpers.tiny_clips import write_segmenter
from omegaconf import OmegaConf
from PIL import Image

from ldm.common.errors import UserError
from ldm.common.files import save_tensors
from ldm.concepts.fingerprint import BaseModel
from ldm.data import look_prompts
from ldm.data.generated_subjects import GeneratedSubjects, find_subjects
from ldm.data.look_prompts import look_prompt
from ldm.inference.pipeline import PerfusionPipeline
from ldm.models.clip_images import CLIP_MEAN, CLIP_STD
from ldm.models.concept_encoder import load_concept_encoder
from ldm.modules.attention import name_text_layers
from ldm.modules.noun_encodings import mean_encoding
from ldm.training import encoder_images

COUNT = 40
SHORT_KINDS = ("cat", "dog", "cup", "hat", "car", "fox", "bear", "book", "ball", "bell", "cake", "chair", "clock",
               "apple", "shoe", "lamp", "horse", "house", "train", "tree", "vase", "drum", "frog", "tiger")
main = load_main("train_encoder")
Command = Callable[..., list[str]]


def write_vit(folder: Path) -> Path:
    """Write a CLIP of open_clip whose image tower is a transformer of four layers; return its folder."""
    torch.manual_seed(0)
    settings = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 4, "width": 16, "head_width": 8,
                                               "patch_size": 4},
                "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}}
    save_tensors(folder / "model.safetensors", open_clip.CLIP(**settings).state_dict(), {"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": settings, "preprocess_cfg": {"mean": CLIP_MEAN, "std": CLIP_STD}}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base model, a segmenter, and a config of the training for both. Prompts are short, as the model takes them."""
    path = tmp_path_factory.mktemp("encoder")
    tiny_models.write_weights(path)
    model = tiny_models.latent_diffusion_config(path)
    OmegaConf.save(OmegaConf.create({"model": model}), path / "base.yaml")
    write_segmenter(path / "segmenter")
    training = OmegaConf.load(Path(__file__).resolve().parents[2] / "configs" / "encoder-sd-v1.yaml")
    training.model.base_learning_rate = 1e-3
    training.model.params.update(width=8, scheduler_config=None)
    training.model.params.templates = ["a photo of a {}"]
    training.data.params.update(batch_size=8, num_workers=0)
    training.lightning.trainer.val_check_interval = 2
    OmegaConf.save(training, path / "training.yaml")
    write_vit(path / "vit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look_prompts, "LOOK_KINDS", SHORT_KINDS)
        patch.setattr(look_prompts, "BACKGROUNDS", ("", "at night"))
        yield path


@pytest.fixture(scope="module")
def command(folder: Path) -> Command:
    """Return a function that makes a command line; further arguments come last."""
    def make(*arguments: object) -> list[str]:
        return list(map(str, [
            "--config", folder / "base.yaml", "--ckpt", folder / "base.ckpt", "--segmenter", folder / "segmenter",
            "--tower", folder / "vit", "--training", folder / "training.yaml", "--images", COUNT, "--steps", 1,
            "--scale", 1, "--batch_size", 20, "--device", "cpu", *arguments]))
    return make


@pytest.fixture(scope="module")
def trained(folder: Path, command: Command) -> Path:
    """The folder of an encoder after an interruption: half of its images were there already."""
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_images, "save_subject", interrupted_after(COUNT // 2))
        with pytest.raises(SystemExit):  # "stopped by Ctrl-C; finished files are kept"
            main(command("--out", out, "--max_steps", 4))
    assert list(find_subjects(out / "images")) == list(range(COUNT // 2))
    first = find_subjects(out / "images")[0]
    time = first.stat().st_mtime_ns
    main(command("--out", out, "--max_steps", 4))
    assert first.stat().st_mtime_ns == time
    return out


def interrupted_after(count: int) -> Callable[..., Path]:
    saved = []
    save = encoder_images.save_subject

    def stop(*arguments: object) -> Path:
        if len(saved) == count:
            raise KeyboardInterrupt
        saved.append(save(*arguments))
        return saved[-1]
    return stop


@pytest.mark.slow
def test_images_are_those_of_the_prompts_in_any_number_of_sessions(folder: Path, trained: Path) -> None:
    files = find_subjects(trained / "images")
    assert list(files) == list(range(COUNT))
    pipeline = PerfusionPipeline.from_config(folder / "base.yaml", folder / "base.ckpt", "cpu")
    for index in (3, COUNT - 1):
        subject = look_prompt(23, index)
        assert files[index].name == f"{index:06d} - {subject.look or 'plain'} - {subject.kind}.webp"
        settings = {"num_inference_steps": 1, "guidance_scale": 1, "sampler": "dpm"}
        image = pipeline(subject.text, seed=23 + index, **settings).images[0]
        with Image.open(files[index]) as stored:
            pixels = [np.asarray(one.convert("L"), dtype=float) for one in (stored, image)]
        assert np.corrcoef(*(one.flatten() for one in pixels))[0, 1] > 0.9  # WebP compresses images of noise badly


@pytest.mark.slow
def test_the_encoder_loads_and_predicts_for_its_base_alone(folder: Path, trained: Path) -> None:
    base = tiny_models.build_model(folder, use_ema=False).eval()
    layers = name_text_layers(base.model.diffusion_model)
    encoder = load_concept_encoder(trained, base=BaseModel.of(layers).fingerprint)
    _, super_input = mean_encoding(base.cond_stage_model, "cat", encoder.settings.templates)
    dataset = GeneratedSubjects(str(trained / "images"))
    shown = [dataset[index] for index in range(len(dataset))]
    move = encoder.predict([item["image"] for item in shown], [item["mask"][0] for item in shown], super_input)
    assert move.shape == super_input.shape and move.isfinite().all() and float(move.norm()) > 0
    assert encoder.nearest_look(base.cond_stage_model, "cat", move) in encoder.settings.looks
    assert encoder.head.config == {"features": 16 * 6 + 8 + 64, "context_width": tiny_models.WIDTH, "width": 8}
    with pytest.raises(UserError, match="another base model"):
        load_concept_encoder(trained, base="0" * 16)


@pytest.mark.slow
def test_what_would_spoil_an_encoder_is_refused(folder: Path, trained: Path, command: Command,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "config.json").rename(folder / "config.json")
    try:
        assert "with num_inference_steps 1, not 2" in error_of(command("--out", trained, "--steps", 2), capsys)
        tiny_models.write_weights(folder, seed=5, name="other.ckpt")
        other = command("--out", trained, "--ckpt", folder / "other.ckpt")
        assert "by another base model" in error_of(other, capsys)
    finally:
        (folder / "config.json").rename(trained / "config.json")
    assert "holds an encoder already" in error_of(command("--out", trained), capsys)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("arguments", "named"), [
    (["--tower", "VIT-L-14/openai"], "--tower VIT-L-14/openai"), (["--training", "none.yaml"], "none.yaml: no such"),
    (["--ckpt", "none.ckpt"], "none.ckpt"), (["--images", "3"], "--images"), (["--segmenter", "no segmenter"], "no seg")
])
def test_mistakes_are_found_before_anything_is_loaded(folder: Path, command: Command, arguments: list[str], named: str,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert named in error_of(command("--out", folder / "new", *arguments), capsys)
    assert not (folder / "new").exists()


def test_held_out_kinds_are_not_trained_on(tmp_path: Path) -> None:
    for index in range(60):
        subject = look_prompt(1, index)
        name = f"{index:06d} - {subject.look or 'plain'} - {subject.kind}.webp"
        Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / name, "WEBP", exact=True)
    train, held_out = (GeneratedSubjects(str(tmp_path), held_out=value) for value in (False, True))
    assert len(train) + len(held_out) == 60 and len(held_out) > 0
    kinds = [{item["kind"] for item in map(dataset.__getitem__, range(len(dataset)))} for dataset in (train, held_out)]
    assert not kinds[0] & kinds[1]
    item = train[0]
    assert item["image"].shape == (3, 4, 4) and float(item["mask"].mean()) == pytest.approx(128 / 255)
    train.with_pixels = False
    assert train[7] == {"index": 7}


def test_prompts_name_a_look_and_a_kind() -> None:
    subjects = [look_prompt(0, index) for index in range(300)]
    assert subjects[3] == look_prompt(0, 3) != look_prompt(1, 3)
    assert all(f"{subject.look} {subject.kind}".strip() in subject.text for subject in subjects)
    assert {"a photo of a ", "a photo of an"} == {subject.text[:13] for subject in subjects}
    assert 0 < sum(not subject.look for subject in subjects) < 40
