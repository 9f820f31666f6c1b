"""The flags of main.py, each tried in a run of two steps on the bundled model."""
from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import training_setup
from helpers.training_setup import QUICK, ROOT, PhotoRecorder, train_main
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.common.errors import UserError
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import load_perfusion_concepts

EXAMPLE = ROOT / "models" / "mini" / "examples" / "teddy"
KEEP_PHOTOS = "lightning.callbacks.keeper.target=helpers.training_setup.PhotoRecorder"


def concept_of(logdir: Path) -> Concept:
    (concept,) = load_perfusion_concepts(logdir / "concept.safetensors")
    return concept


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run without further flags."""
    return train_main(tmp_path_factory.mktemp("plain"), *QUICK)


@pytest.mark.slow
def test_the_seed_decides_the_concept(plain: Path, tmp_path: Path) -> None:
    again, other = train_main(tmp_path / "again", *QUICK, "-s", 23), train_main(tmp_path / "other", *QUICK, "-s", 24)
    one, same, another = ((logdir / "concept.safetensors").read_bytes() for logdir in (plain, again, other))
    assert one == same != another
    assert not torch.equal(concept_of(plain).target_input, concept_of(other).target_input)


@pytest.mark.slow
def test_a_name_and_a_folder(tmp_path: Path) -> None:
    logdir = train_main(tmp_path / "deep" / "runs", *QUICK, "-n", "mine", "-f", "_b", "-s", 5, "-t", "true")
    assert re.fullmatch(r"[\dT-]{19}_mine_b", logdir.name)
    (saved,) = (logdir / "configs").glob("*-lightning.yaml")
    assert OmegaConf.load(saved).lightning.seed == 5


@pytest.mark.slow
def test_a_callback_that_is_null_is_left_out(plain: Path, tmp_path: Path) -> None:
    logdir = train_main(tmp_path / "logs", *QUICK, "lightning.callbacks.previews=null")
    assert (plain / "images").is_dir() and not (logdir / "images").exists()
    assert (logdir / "concept.safetensors").read_bytes() == (plain / "concept.safetensors").read_bytes()


def test_a_run_that_does_not_train_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), training_setup.in_project_root():
        training_setup.run_main([*training_setup.BASE, "-l", str(tmp_path / "logs"), "-t", "false"])
    assert "model and data are ready" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_photo_and_a_super_category_of_several_words(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.open(EXAMPLE / "0.png").save(tmp_path / "photos" / "only.jpg")
    logdir = train_main(tmp_path / "logs", *QUICK, "--data_root", tmp_path / "photos", "--init_word",
                   "old brown teddy bear", "--placeholder", "bearkin", "model.params.inference_bias=0.6",
                   "model.params.temperature=0.2", KEEP_PHOTOS)
    concept = concept_of(logdir)
    assert (concept.super_category, concept.placeholder) == ("old brown teddy bear", "bearkin")
    assert (concept.bias, concept.temperature) == (0.6, 0.2)
    assert len(PhotoRecorder.photos.paths) == 1


def write_photos(folder: Path) -> None:
    """Write the same image, red above and blue below, in every file format, and two files that are no images."""
    folder.mkdir()
    upright = np.zeros((90, 60, 3), np.uint8)
    upright[:45, :, 0] = upright[45:, :, 2] = 255
    photo = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated right by 90 degrees, as phones save upright photos
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "a.JPG", exif=exif, quality=95)
    photo.save(folder / "b.webp", lossless=True)
    photo.convert("L").save(folder / "c.png")
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "d.png")
    (folder / "e.png").write_bytes((folder / "b.webp").read_bytes()[:50])
    (folder / "notes.txt").write_text("no image")


@pytest.mark.slow
def test_photos_of_every_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_photos(tmp_path / "photos")
    with caplog.at_level(logging.WARNING):
        logdir = train_main(tmp_path / "logs", *QUICK, "--data_root", tmp_path / "photos", KEEP_PHOTOS)
    assert [path.name for path in PhotoRecorder.photos.paths] == ["a.JPG", "b.webp", "c.png", "d.png"]
    assert "e.png" in caplog.text and "left out notes.txt (a text file)" in caplog.text
    turned, plain, grey, clear = (np.asarray(image, dtype=float) for image in PhotoRecorder.photos.images)
    assert plain.shape == (64, 64, 3) and np.abs(turned - plain).mean() < 6
    assert np.allclose(plain[8, 32], (255, 0, 0), atol=2) and np.allclose(plain[-8, 32], (0, 0, 255), atol=2)
    assert np.ptp(grey, axis=2).max() == 0 and clear.min() == 255
    assert len(list((logdir / "masks").iterdir())) == 4
    assert (logdir / "images" / "masks.png").is_file()


@pytest.mark.slow
def test_no_masks(plain: Path, tmp_path: Path) -> None:
    logdir = train_main(tmp_path / "logs", *QUICK, "--masks", "none", KEEP_PHOTOS)
    assert not PhotoRecorder.photos.has_masks
    assert not (logdir / "masks").exists() and not (logdir / "images" / "masks.png").exists()
    assert not torch.equal(concept_of(logdir).embedding, concept_of(plain).embedding)


@pytest.mark.slow
def test_masks_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for photo in EXAMPLE.glob("*.png"):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :32] = 255
        Image.fromarray(mask).save(tmp_path / "mine" / photo.name)
    logdir = train_main(tmp_path / "logs", *QUICK, "--masks", tmp_path / "mine", KEEP_PHOTOS)
    mask = PhotoRecorder.photos.mask(4)[0]
    assert mask[:, :32].min() == 1 and mask[:, 32:].max() == 0
    assert not (logdir / "masks").exists() and (logdir / "images" / "masks.png").is_file()


@pytest.mark.slow
def test_another_base_model(plain: Path, tmp_path: Path) -> None:
    weights = load_file(ROOT / "models" / "mini" / "model.safetensors")
    name = next(key for key in weights if key.endswith("attn2.to_v.weight"))
    save_file({**weights, name: weights[name] * 2}, tmp_path / "other.safetensors")
    logdir = train_main(tmp_path / "logs", *QUICK, "--actual_resume", tmp_path / "other.safetensors")
    assert concept_of(logdir).base != concept_of(plain).base
    (saved,) = (logdir / "configs").glob("*-project.yaml")
    assert OmegaConf.load(saved).model.params.ckpt_path == str(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_later_configs_override_earlier_ones_and_overrides_all(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: {params: {inference_bias: 0.5, temperature: 0.3}}\nlightning: {trainer: {max_steps: 1}}\n")
    arguments = [*QUICK[2:], "model.params.temperature=0.4"]
    with training_setup.in_project_root():
        training_setup.run_main([*training_setup.BASE, str(tmp_path / "mine.yaml"), "-l", str(tmp_path / "logs"),
                                 *arguments])
    (logdir,) = (tmp_path / "logs").iterdir()
    concept = concept_of(logdir)
    assert (concept.bias, concept.temperature, concept.steps) == (0.5, 0.4, 1)
    assert logdir.name.endswith("_mine")


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (["--data_root", "nowhere"], "nowhere"), (["--data_root", "{empty}"], "no images"),
    (["--init_word", ""], "--init_word"), (["--masks", "{empty}"], "{empty}"),
    (["--actual_resume", "nowhere.ckpt"], "nowhere.ckpt: no such file"),
    (["model.params.ckpt_path=null"], "--actual_resume"), (["model.params.learning=1"], "learning"),
    (["lightning.trainer.steps=1"], "steps"), (["modle.params.bias=1"], "modle"), (["--stpes", "3"], "--stpes"),
    (["--base", "nowhere.yaml"], "nowhere.yaml: no such file"),
])
def test_mistakes_leave_nothing_behind(tmp_path: Path, arguments: list[str], message: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError) as error:
        train_main(tmp_path / "logs", *QUICK, *(argument.format(empty=empty) for argument in arguments))
    assert re.search(message.format(empty=empty), str(error.value)) and "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists()
