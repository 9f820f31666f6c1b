"""scripts/mini/export.py: the files that it makes of training runs load, are small, and name their run."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.mini_runs import write_log_folder
from helpers.oracles import randomize
from helpers.tiny_clips import OPEN_TOWERS, tiny_openclip
from helpers.tiny_models import latent_diffusion_config
from PIL import Image

from ldm.checkpoints.load import read_state_dict
from ldm.common.files import save_tensors
from ldm.data.mini.scenes import SceneDataset
from ldm.models.clip_encoder import ClipEncoder
from ldm.models.clip_images import normalize_for_clip
from ldm.models.open_clip_folder import load_openclip
from ldm.modules.covariance_files import load_covariance
from ldm.modules.encoders.modules import TOKENIZER, FrozenCLIPEmbedder
from ldm.modules.segmentation import ZeroShotSegmenter
from ldm.util import instantiate_from_config
from scripts.mini import export as export_mini
from scripts.mini.export import world_captions

CLIPS = ("clip", "evaluation_clip")
FIRST = "first_stage_model."
CLIP = {"target": "ldm.models.mini.openclip.OpenCLIPTrainer", "params": {
    "tokenizer": str(TOKENIZER), "max_length": 32, **OPEN_TOWERS}}


@pytest.fixture(scope="module", autouse=True)
def few_captions() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        captions = world_captions(50)
        patch.setattr(export_mini, "world_captions", lambda: captions)
        yield captions


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both CLIPs, exported from their runs."""
    folder = tmp_path_factory.mktemp("models")
    for seed, part in enumerate(CLIPS):
        weights = tiny_openclip(seed, 32).state_dict()
        run = write_log_folder(folder / "logs" / f"today_{part}", CLIP, weights, steps=7 + seed)
        export_mini.main([part, str(run), "--outdir", str(folder)])
    return folder


@pytest.mark.slow
def test_captions_are_those_of_the_scenes() -> None:
    scenes = SceneDataset(seed=2)
    assert world_captions(3) == tuple(sorted({scenes[index]["caption"] for index in range(3)}))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(CLIPS)))
def test_an_exported_clip_is_the_same_for_words_of_the_captions(
        exported: Path, few_captions: tuple[str, ...], seed: int) -> None:
    folder = exported / CLIPS[seed]
    before, after = tiny_openclip(seed, 32).eval(), ClipEncoder.from_path(folder)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        texts = before.embed_texts(list(few_captions[:4]))
        embeddings = F.normalize(before.image_features(normalize_for_clip(images)), dim=-1)
    assert torch.allclose(after.embed_texts(few_captions[:4]), texts, atol=5e-3)
    assert torch.allclose(after.embed_images(images), embeddings, atol=5e-3)
    assert (folder / "model.safetensors").stat().st_size < 250_000


def test_the_exported_text_tower_is_that_of_the_first_clip(exported: Path, few_captions: tuple[str, ...]) -> None:
    tower = FrozenCLIPEmbedder(str(exported / "parts" / "text_encoder"), max_length=32)
    clip, captions = load_openclip(exported / "clip"), list(few_captions[:4])
    encoded = tower.encode(captions)
    tokens = torch.tensor(tower.tokenizer(captions, padding="max_length", max_length=32)["input_ids"])
    with torch.no_grad():
        expected = clip.ln_final(clip.transformer(clip.token_embedding(tokens) + clip.positional_embedding,
                                                  attn_mask=clip.attn_mask))
    assert torch.allclose(encoded, expected, atol=1e-2)
    assert encoded.std() > 0.5


@pytest.mark.slow
def test_an_exported_segmenter_is_the_same(exported: Path, few_captions: tuple[str, ...]) -> None:
    config = {"target": "ldm.models.mini.segmenter.SegmenterTrainer",
              "params": {"clip": str(exported / "clip"), "widths": [32, 32, 32, 32, 64]}}
    trainer = randomize(instantiate_from_config(config), 4).eval()
    run = write_log_folder(exported / "logs" / "today_segmenter", config, trainer.state_dict(), steps=9)
    export_mini.main(["segmenter", str(run), "--outdir", str(exported)])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        both = trainer.logits(torch.cat([image, image.flip(-1)]), ["cat", "cat"])
        expected = ((both[:1] + both[1:].flip(-1)) / 2).sigmoid()
    found = ZeroShotSegmenter.from_path(exported / "segmenter").segment([Image.fromarray(pixels)], "cat")
    assert torch.allclose(found, expected, atol=5e-3) and expected.std() > 0.03


@pytest.mark.slow
def test_the_exported_model_has_the_further_trained_decoder(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(exported, folder)
    (folder / "training.json").unlink()
    config = latent_diffusion_config(tmp_path, use_ema=False)
    config["params"]["cond_stage_config"]["params"] = {"version": str(folder / "parts" / "text_encoder"),
                                                       "max_length": 32}
    model = randomize(instantiate_from_config(config), 3)
    stage = {key.removeprefix(FIRST): value for key, value in model.state_dict().items() if key.startswith(FIRST)}
    save_tensors(folder / "parts" / "autoencoder.safetensors", stage, {})
    text2img = write_log_folder(tmp_path / "text2img", config, model.state_dict())

    better = {key: value + 1 if key.startswith("decoder.") else value for key, value in stage.items()}
    decoder = write_log_folder(tmp_path / "decoder", config, better)
    export_mini.main(["decoder", str(decoder), "--outdir", str(folder)])
    export_mini.main(["text2img", str(text2img), "--outdir", str(folder)])
    export_mini.main(["covariance", "--outdir", str(folder)])

    shipped = read_state_dict(folder / "model.safetensors")
    for key, value in model.state_dict().items():
        expected = better[key.removeprefix(FIRST)] if key.startswith(FIRST) else value
        if "token_embedding" not in key and "." in key:
            assert torch.allclose(shipped[key].float(), expected, atol=5e-3), key
    assert load_covariance(folder / "covariance.safetensors").shape == (16, 16)

    other = write_log_folder(tmp_path / "other", config, {key: value + 1 for key, value in stage.items()})
    with pytest.raises(SystemExit):
        export_mini.main(["decoder", str(other), "--outdir", str(folder)])
    assert all(torch.equal(value, better[key]) for key, value in
               read_state_dict(folder / "parts" / "autoencoder.safetensors").items())


def test_each_export_records_its_run(exported: Path) -> None:
    records = json.loads((exported / "training.json").read_text())
    assert {part: (entry["run"], entry["steps"]) for part, entry in records.items() if part in CLIPS} == {
        "clip": ("today_clip", 7), "evaluation_clip": ("today_evaluation_clip", 8)}


@pytest.mark.parametrize(("arguments", "message"), [
    (["clip"], "name the log folder"), (["covariance"], "export that of a run first"),
    (["clip", "nowhere"], "no log folder of a training run"), (["unet", "run"], "invalid choice")])
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export_mini.main([*arguments, "--outdir", str(tmp_path / "models")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
