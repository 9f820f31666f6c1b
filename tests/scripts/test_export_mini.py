"""What `scripts/export_mini.py` makes of training runs: files that load, small, with a record of the run."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mini_runs import log_folder
from oracles import randomise
from tiny_clips import OPEN_TOWERS, SIDE, TOWER, tiny_openclip, tiny_trainer
from tiny_models import latent_diffusion
from transformers import CLIPModel

from evaluation.recognise import Recogniser
from ldm.checkpoint import read_state_dict
from ldm.data.scenes import SceneDataset
from ldm.files import save_tensors
from ldm.models.clip import clip_pixels
from ldm.modules.covariance import load_covariance
from ldm.modules.encoders.modules import TOKENIZER, FrozenCLIPEmbedder
from ldm.modules.encoders.vocabulary import load_pretrained
from ldm.util import instantiate_from_config
from scripts import export_mini
from scripts.export_mini import captions_of_the_world

FIRST = "first_stage_model."
CLIP = {"target": "ldm.models.clip.CLIPTrainer", "params": {
    "tokenizer": str(TOKENIZER), "text_config": TOWER, "projection_dim": 8, "max_length": 32,
    "vision_config": {**TOWER, "image_size": SIDE, "patch_size": 8}}}
OPEN_CLIP = {"target": "ldm.models.openclip.OpenCLIPTrainer", "params": {
    "tokenizer": str(TOKENIZER), "max_length": 32, **OPEN_TOWERS}}


@pytest.fixture(scope="module", autouse=True)
def few_captions() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        captions = captions_of_the_world(50)
        patch.setattr(export_mini, "captions_of_the_world", lambda: captions)
        yield captions


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both CLIPs, exported from runs of theirs."""
    folder = tmp_path_factory.mktemp("models")
    made = {"clip": (CLIP, tiny_trainer(0, max_length=32)), "evaluation_clip": (OPEN_CLIP, tiny_openclip(1, 32))}
    for steps, (part, (config, trainer)) in enumerate(made.items(), 7):
        run = log_folder(folder / "logs" / f"today_{part}", config, trainer.state_dict(), steps=steps)
        export_mini.main([part, str(run), "--outdir", str(folder)])
    return folder


def test_captions_are_those_of_the_scenes() -> None:
    scenes = SceneDataset(seed=2)
    assert captions_of_the_world(3) == tuple(sorted({scenes[index]["caption"] for index in range(3)}))


def test_a_clip_survives_but_for_words_that_it_never_read(exported: Path, few_captions: tuple[str, ...]) -> None:
    before, after = tiny_trainer(0, max_length=32), load_pretrained(CLIPModel, exported / "clip")
    assert (exported / "clip" / "model.safetensors").stat().st_size < 60_000
    tokens = before.tokens(few_captions[:4])
    with torch.no_grad():
        expected = before.clip.eval().text_model(tokens).pooler_output
        found = after.eval().text_model(tokens).pooler_output
    assert torch.allclose(found, expected, atol=5e-3)
    assert Recogniser.from_path(exported / "clip").embed_texts(["a cat"]).shape == (1, 8)
    size = json.loads((exported / "clip" / "preprocessor_config.json").read_text())["size"]
    assert size == {"height": SIDE, "width": SIDE}


def test_the_evaluations_clip_is_one_of_open_clips(exported: Path, few_captions: tuple[str, ...]) -> None:
    folder = exported / "evaluation_clip"
    before, after = tiny_openclip(1, 32).eval(), Recogniser.from_path(folder)
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        texts = before.text_directions(list(few_captions[:4]))
        images = F.normalize(before.image_features(clip_pixels(pictures)), dim=-1)
    assert torch.allclose(after.embed_texts(few_captions[:4]), texts, atol=5e-3)
    assert torch.allclose(after.embed_images(pictures), images, atol=5e-3)
    assert (folder / "model.safetensors").stat().st_size < 250_000


def test_the_text_tower_of_the_first_clip_is_what_conditions(exported: Path) -> None:
    tower = FrozenCLIPEmbedder(str(exported / "parts" / "text_encoder"), max_length=32)
    whole = load_pretrained(CLIPModel, exported / "clip").text_model.state_dict()
    assert torch.equal(tower.token_table, whole["embeddings.token_embedding.weight"])
    assert (exported / "text_encoder" / "config.json").is_file()


def test_the_whole_model_has_the_decoder_that_was_trained_on(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(exported, folder)
    (folder / "training.json").unlink()
    config = latent_diffusion(tmp_path, use_ema=False)
    config["params"]["cond_stage_config"]["params"] = {"version": str(folder / "parts" / "text_encoder"),
                                                       "max_length": 32}
    model = randomise(instantiate_from_config(config), 3)
    stage = {key.removeprefix(FIRST): value for key, value in model.state_dict().items() if key.startswith(FIRST)}
    save_tensors(folder / "parts" / "autoencoder.safetensors", stage, {})
    text2img = log_folder(tmp_path / "text2img", config, model.state_dict())

    better = {key: value + 1 if key.startswith("decoder.") else value for key, value in stage.items()}
    decoder = log_folder(tmp_path / "decoder", config, better)
    export_mini.main(["decoder", str(decoder), "--outdir", str(folder)])
    export_mini.main(["text2img", str(text2img), "--outdir", str(folder)])
    export_mini.main(["covariance", "--outdir", str(folder)])

    shipped = read_state_dict(folder / "model.safetensors")
    for key, value in model.state_dict().items():
        expected = better[key.removeprefix(FIRST)] if key.startswith(FIRST) else value
        if "token_embedding" not in key and "." in key:
            assert torch.allclose(shipped[key].float(), expected, atol=5e-3), key
    assert load_covariance(folder / "covariance.safetensors").shape == (16, 16)

    other = log_folder(tmp_path / "other", config, {key: value + 1 for key, value in stage.items()})
    with pytest.raises(SystemExit):
        export_mini.main(["decoder", str(other), "--outdir", str(folder)])
    assert all(torch.equal(value, better[key]) for key, value in
               read_state_dict(folder / "parts" / "autoencoder.safetensors").items())


def test_each_export_says_how_its_part_was_trained(exported: Path) -> None:
    records = json.loads((exported / "training.json").read_text())
    assert {part: (entry["run"], entry["steps"]) for part, entry in records.items()} == {
        "clip": ("today_clip", 7), "evaluation_clip": ("today_evaluation_clip", 8)}


@pytest.mark.parametrize(("arguments", "said"), [
    (["clip"], "name the log folder"), (["covariance"], "export that of a run first"),
    (["clip", "nowhere"], "no log folder of a training run"), (["unet", "run"], "invalid choice")])
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], said: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export_mini.main([*arguments, "--outdir", str(tmp_path / "models")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
