"""The drawing script as a user runs it, on a tiny model: few times as a process, otherwise in this one to save time."""
from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from oracles import randomise
from PIL import Image
from transformers import CLIPTextConfig

from ldm import inference
from ldm.album import Album, read_note
from ldm.errors import UserError
from ldm.files import save_tensors
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules import covariance
from ldm.modules.attention import name_text_layers
from ldm.modules.concept import Concept, base_fingerprint, save_concepts
from ldm.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "txt2img.py"
WIDTH, LENGTH, START, END = 16, 16, 49406, 49407
PROMPT = "a photo of a <teddy> outside"
QUICK = ("--ddim_steps", "3", "--scale", "2", "--device", "cpu")
Draw = Callable[..., np.ndarray]
ROUNDING = 2  # of 255 levels: batches of another size round differently


@dataclass(frozen=True)
class World:
    """A tiny base model, its config and checkpoint, and two concepts in files."""

    folder: Path
    config: Path
    checkpoint: Path
    teddy: Path
    mug: Path


def model_config(text_encoder: Path) -> dict[str, object]:
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "attn_type": "none"}
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 1],
            "attention_resolutions": [1], "num_res_blocks": 1, "num_heads": 4, "use_spatial_transformer": True,
            "context_dim": WIDTH, "legacy": False}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "image_size": 8, "channels": 4, "conditioning_key": "crossattn", "parameterization": "v", "timesteps": 100,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {
            "version": str(text_encoder), "max_length": LENGTH}}}}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                   vocab_size=END + 1, max_position_embeddings=LENGTH, bos_token_id=START, eos_token_id=END,
                   pad_token_id=END).save_pretrained(folder / "text")
    config = model_config(folder / "text")
    checkpoint = folder / "base.safetensors"
    model = randomise(instantiate_from_config(config["model"]), scale=0.15).requires_grad_(False)
    save_tensors(checkpoint, {k: v for k, v in model.state_dict().items() if not k.startswith("model_ema.")}, {})
    config["model"]["params"]["ckpt_path"] = str(checkpoint)
    OmegaConf.save(OmegaConf.create(config), folder / "base.yaml")
    with pytest.MonkeyPatch.context() as patch:  # the full corpus takes a while even here
        patch.setattr(covariance, "default_captions", lambda *_: [f"a photo of a {w}" for w in ("dog", "mug", "hat")])
        covariance.cached_covariance(model.cond_stage_model, folder / "cache", progress=False)
    teddy = learned(model, "<teddy>", "teddy bear", seed=1)
    save_concepts(folder / "teddy.safetensors", [teddy], precision=None)
    save_concepts(folder / "mug.safetensors", [learned(model, "<mug>", "mug", seed=2)], precision=None)
    save_concepts(folder / "foreign.safetensors", [replace(teddy, base="0" * 64)], precision=None)
    return World(folder, folder / "base.yaml", checkpoint, folder / "teddy.safetensors", folder / "mug.safetensors")


def learned(model: torch.nn.Module, placeholder: str, super_category: str, seed: int) -> Concept:
    """A concept whose gate is wide open on its word in PROMPT, with target outputs that nobody can overlook."""
    draw = torch.Generator().manual_seed(seed)
    encoder, layers = model.cond_stage_model, name_text_layers(model.model.diffusion_model)
    embedding = torch.randn(1, WIDTH, generator=draw)
    tokens = encoder.tokenize([PROMPT.replace("<teddy>", placeholder)], [placeholder])
    target = encoder.encode_tokens(tokens, embedding)[tokens > END].squeeze(0)
    values = {name: 3 * torch.randn(len(layer.to_v.weight), generator=draw) for name, layer in layers.items()}
    return Concept(placeholder, super_category, embedding, target, torch.randn(WIDTH, generator=draw), values,
                   base=base_fingerprint(layers))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("txt2img", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def draw(script: ModuleType, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Runs the script in this process; returns the pictures of the run as (n, H, W, 3) integers."""
    monkeypatch.setenv("PERFUSION_CACHE", str(world.folder / "cache"))

    def run(*arguments: object, outdir: str = "out") -> np.ndarray:
        before = pictures(tmp_path / outdir)
        base = ("--config", world.config, "--outdir", tmp_path / outdir)
        script.main([str(argument) for argument in (*base, *QUICK, *arguments)])
        new = [path for path in pictures(tmp_path / outdir) if path not in before]
        return np.stack([np.asarray(Image.open(path), dtype=int) for path in new])

    return run


def pictures(outdir: Path) -> list[Path]:
    return sorted((outdir / "samples").glob("*.png"))


def process(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False,
                          cwd=ROOT, env={**os.environ, "PERFUSION_CACHE": str(cache)})


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """How many levels the two differ by at most."""
    return int(np.abs(one - other).max())


def test_as_a_process_it_draws_the_same_again_and_says_where(draw: Draw, world: World, tmp_path: Path) -> None:
    arguments = ("--config", world.config, "--concept", world.teddy, world.mug, "--prompt", PROMPT, "a <mug>",
                 "--n_samples", 2, "--seed", 5, "--bias", 0.7, "--temperature", 0.15, 0.2, *QUICK)
    result = process(*arguments, "--outdir", tmp_path / "out", cache=world.folder / "cache")
    assert result.returncode == 0, result.stderr
    written = pictures(tmp_path / "out")
    assert [path.name for path in written] == [f"0000{number}.png" for number in range(4)]
    assert f"4 pictures: {written[0]} to 00003.png" in result.stdout
    assert f"{tmp_path / 'out' / 'grid-0000.png'}" in result.stdout
    assert f"<mug>: the mug of {world.mug}, bias 0.7, temperature 0.2\n" in result.stderr
    assert read_note(written[1])["prompt"] == PROMPT and read_note(written[3])["seed"] == 6
    assert [c["temperature"] for c in read_note(written[0])["concepts"]] == [0.15, 0.2]
    first = np.stack([np.asarray(Image.open(path), dtype=int) for path in written])
    again = draw(*arguments)
    assert np.array_equal(first, again)
    assert len(pictures(tmp_path / "out")) == 8 and (tmp_path / "out" / "grid-0001.png").is_file()
    assert apart(first[0], first[1]) > 20 and apart(first[0], first[2]) > 20


def test_a_picture_depends_on_its_own_seed_only(draw: Draw) -> None:
    four = draw("--prompt", "a cat", "a dog", "--n_samples", 4, "--seed", 3)
    assert apart(four[:4], draw("--prompt", "a cat", "--n_iter", 2, "--n_samples", 2, "--seed", 3)) <= ROUNDING
    assert apart(four[6:7], draw("--prompt", "a dog", "--n_samples", 1, "--seed", 5)) <= ROUNDING
    assert apart(four, draw("--prompt", "a cat", "a dog", "--seed", 3, "--batch_size", 3)) <= ROUNDING
    assert apart(four[:4], four[4:]) > 20


def test_a_concept_changes_what_its_word_draws_and_settings_change_it(draw: Draw, world: World) -> None:
    concept = ("--concept", world.teddy, "--prompt", PROMPT, "--n_samples", 1)
    local = draw(*concept)
    assert apart(local, draw("--prompt", "a photo of a teddy outside", "--n_samples", 1)) > 20
    for setting in (("--bias", 1.5), ("--temperature", 1.0), ("--global_locking",), ("--plms",), ("--scale", 5),
                    ("--negative_prompt", "a mug"), ("--ddim_eta", 1), ("--embedding_path", world.mug)):
        assert apart(local, draw(*concept, *setting)) > ROUNDING, setting


def test_the_base_models_picture_is_the_samplers_own(draw: Draw, world: World) -> None:
    config = OmegaConf.load(world.config)
    model = instantiate_from_config(config.model).eval()
    generator = torch.Generator().manual_seed(9)
    latents, _ = DDIMSampler(model).sample(
        3, 1, (4, 8, 12), model.cond_stage_model(["a cat"]), verbose=False, generators=[generator],
        unconditional_guidance_scale=2.0, unconditional_conditioning=model.cond_stage_model([""]))
    expected = model.decode_first_stage(latents)[0].clamp(-1, 1).add(1).mul(127.5).round().movedim(0, -1).numpy()
    drawn = draw("--prompt", "a cat", "--n_samples", 1, "--seed", 9, "--H", 16, "--W", 24)
    assert drawn.shape == (1, 16, 24, 3) and expected.std() > 20
    assert apart(drawn[0], expected) <= ROUNDING
    assert apart(drawn, draw("--prompt", "a cat", "--n_samples", 1, "--seed", 9, "--W", 24, "--precision", "autocast",
                             "--ckpt", world.checkpoint)) <= 25


def test_equal_words_are_renamed_and_prompts_come_from_a_file(
    draw: Draw, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa <teddy>\n\n  a <teddy-2> \n", encoding="utf8")
    caplog.set_level("INFO")
    both = draw("--concept", world.teddy, "--concept", world.teddy, "--from-file", tmp_path / "prompts.txt",
                "--n_samples", 1)
    assert len(both) == 2 and apart(both[:1], both[1:]) <= 2 * ROUNDING  # the same concept under two names
    assert f"<teddy-2> stands for the <teddy> of {world.teddy}\n" in caplog.text
    assert f"<teddy-2>: the teddy bear of {world.teddy}, bias 0.75" in caplog.text
    assert [read_note(path)["prompt"] for path in pictures(tmp_path / "out")] == ["a <teddy>", "a <teddy-2>"]
    draw("--concept", world.teddy, "--prompt", "a cat", "--n_samples", 1)
    assert "<teddy> is loaded, but its word does not stand in the prompt" in caplog.text


MISTAKES: Sequence[tuple[tuple[str, ...], str]] = (
    (("--n_samples", "0"), "--n_samples: 0: must be 1 or more"),
    (("--n_samples", "two"), "'two' is no whole number"),
    (("--seed", "-1"), "-1: must be 0 or more"),
    (("--scale", "nan"), "nan: must be at least 0"),
    (("--ddim_eta", "1.5"), "must be at least 0 and at most 1"),
    (("--ddim_steps", "101"), "101 sampling steps: this model has 100"),
    (("--H", "30"), "height 30: this model draws multiples of 4 pixels; the nearest is 32"),
    (("--W", "2"), "width 2: .* the nearest is 4"),
    (("--concept", "{world}/teddy.safetensors", "--temperature", "0"), "0: must be above 0"),
    (("--concept", "{world}/teddy.safetensors", "--bias", "0.5", "0.6"), "2 values of bias for 1 concepts"),
    (("--concept", "{world}/base.safetensors"), "not a concept"),
    (("--concept", "{world}/foreign.safetensors"), "was trained on base model 000000000000"),
    (("--bias", "0.7"), "--bias acts on learned concepts; .*--concept"),
    (("--plms", "--ddim_eta", "0.5"), "PLMS adds no noise"),
    (("--scale", "1", "--negative_prompt", "ugly"), "--scale 1 is none"),
    (("--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
    (("--config", "{world}/text/config.json"), "describes no model"),
    (("--config", "{world}/base.safetensors"), "not readable as a config"),
    (("--ckpt", "nowhere.ckpt"), "--ckpt nowhere.ckpt: no such file"),
    (("--ckpt", "{world}/teddy.safetensors"), "does not fit this config"),
    (("--outdir", "{world}/base.yaml"), "base.yaml is no folder"),
    (("--from-file", "nowhere.txt"), "nowhere.txt: no such file"),
    (("--device", "abacus"), "no such device"),
    (("--prompt", "a <mug>"), "names <mug>, but no loaded concept .*--concept"),
    (("--negative_prompt", "<mug>"), "names <mug>"),
    (("--prompt", "word " * 15), "15 tokens, but the text encoder takes 14"),
    (("--prompts", "typo"), "unrecognized arguments: --prompts"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0])[-40:] for mistake in MISTAKES])
def test_mistakes_are_one_line_and_nothing_is_written(
    script: ModuleType, world: World, tmp_path: Path, arguments: tuple[str, ...], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERFUSION_CACHE", str(world.folder / "cache"))
    base = ("--prompt", "a cat", "--config", str(world.config), "--outdir", str(tmp_path / "out"), *QUICK)
    with pytest.raises(SystemExit) as stopped:
        script.main([*base, *(argument.format(world=world.folder) for argument in arguments)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_help_and_typing_mistakes_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = f"""if True:
        import runpy, sys
        sys.argv = ["txt2img.py", *sys.argv[1:]]
        try: runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        finally: assert "torch" not in sys.modules"""
    for arguments, status, said in ((["--help"], 0, "--global_locking"), (["--n_iter", "0"], 2, "must be 1 or more"),
                                    ([], 2, "nothing to draw")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                              cwd=ROOT)
        assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
        assert said in done.stdout + done.stderr


def test_sheets_of_an_album_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.album.ROWS", 2)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00041.png").touch()
    (tmp_path / "samples" / "mine.png").touch()
    album = Album(tmp_path, columns=2)
    for number in range(5):
        album.add(Image.new("RGB", (16, 16)), "a prompt", {"number": number, "word": "<émile>"})
    album.finish_sheet()
    album.finish_sheet()
    assert [path.name for path in album.pictures] == [f"000{number}.png" for number in range(42, 47)]
    assert [path.name for path in album.sheets] == ["grid-0000.png", "grid-0001.png"]
    assert read_note(album.pictures[4]) == {"number": 4, "word": "<émile>"}
    assert json.loads(Image.open(album.pictures[0]).text["perfusion"])["number"] == 0


def test_models_without_prompts_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.load(world.config)
    monkeypatch.setattr(inference, "load_model", lambda *_: torch.nn.Identity())
    with pytest.raises(UserError, match="LatentDiffusion of this config reads no prompts"):
        inference.load_base(config, None, "cpu")
