"""Mistakes of users, and hostile files: one line that names the mistake and the remedy, status 2, nothing written."""
from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.training_setup import BASE, ROOT, run_main
from PIL import Image

import merge_embeddings
from ldm.checkpoints.load import load_model
from ldm.common.errors import one_line_errors
from ldm.common.files import load_tensors, save_tensors
from ldm.concepts.concept import Concept
from ldm.concepts.concept_file import save_perfusion_concepts
from ldm.concepts.fingerprint import base_fingerprint
from ldm.inference.model_config import read_model_config
from ldm.modules.attention import name_text_layers
from ldm.modules.covariance_files import save_covariance
from ldm.training.log_folder import log_folder

TEDDY = ROOT / "models" / "mini" / "examples" / "teddy"
MINI = "models/mini/model.safetensors"
Refusal = Callable[..., str]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_of_bad_input", ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


MAIN = one_line_errors(run_main)
TXT2IMG = script("txt2img").main
COVARIANCE = script("compute_covariance").main
MERGE = merge_embeddings.main


class Hostile:
    """An object whose pickle contains a command that unpickling would run."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def half_of(path: Path, source: Path) -> None:
    content = source.read_bytes()
    path.write_bytes(content[:len(content) // 2])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, configs, checkpoints and concepts to give to the commands."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("empty", "texts", "fakes", "cut", "tiny", "mixed", "few_masks", "black_masks"):
        (folder / name).mkdir()
    (folder / "texts" / "notes.txt").write_text("no photo")
    (folder / "fakes" / "a.png").write_text("no photo")
    half_of(folder / "cut" / "a.png", TEDDY / "0.png")
    Image.new("RGB", (3, 3)).save(folder / "tiny" / "a.png")
    for name in ("fakes", "cut", "tiny"):
        (folder / "mixed" / f"{name}.png").write_bytes((folder / name / "a.png").read_bytes())
    (folder / "mixed" / "good.png").write_bytes((TEDDY / "0.png").read_bytes())
    Image.new("L", (64, 64), "white").save(folder / "few_masks" / "0.png")
    for photo in TEDDY.iterdir():
        Image.new("L", (64, 64)).save(folder / "black_masks" / photo.name)
    (folder / "file").write_text("text")
    _configs(folder)
    _checkpoints(folder)
    _concepts(folder)
    return folder


def _configs(folder: Path) -> None:
    texts = {"list": "- 1\n- 2", "word": "hello", "nothing": "", "no_yaml": "a: [1\nb: }",
             "no_model": "data: {target: x}",
             "no_keys": "model: hello\ndata: {target: x}", "dangling": "model: {target: '${nope}'}\ndata: {target: x}"}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "bytes.yaml").write_bytes(bytes(range(256)))
    save_covariance(folder / "covariance.safetensors", torch.eye(128), source="x", captions=1, tokens="words",
                    encoder="0" * 64)
    mini = (ROOT / "configs" / "perfusion.yaml").read_text()
    foreign = mini.replace("models/mini/covariance.safetensors", str(folder / "covariance.safetensors"))
    (folder / "foreign_covariance.yaml").write_text(foreign)
    (folder / "unknown_key.yaml").write_text(mini.replace("    bias:", "    foo: 1\n    bias:"))


def _checkpoints(folder: Path) -> None:
    half_of(folder / "cut.safetensors", ROOT / MINI)
    torch.save({"state_dict": {"a": torch.zeros(9)}, "x": Hostile(folder / "proof")}, folder / "hostile.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Hostile(folder / "proof")))
    save_tensors(folder / "odd.safetensors", {"a": torch.zeros(1), "b": torch.zeros(1)}, {})
    torch.save({"state_dict": {"a": torch.zeros(9)}}, folder / "weights.ckpt")
    weights, hostile = ((folder / f"{name}.ckpt").read_bytes() for name in ("weights", "hostile"))
    runs = {"run_cut": weights[:400], "run_void": b"", "run_text": b"text" * 99, "run_weights": weights,
            "run_hostile": hostile}
    for name, content in runs.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        (folder / name / "checkpoints" / "last.ckpt").write_bytes(content)


def _concepts(folder: Path) -> None:
    layers = name_text_layers(load_model(read_model_config(ROOT / "configs" / "perfusion.yaml"), ROOT / MINI
                                         ).model.diffusion_model)
    width = next(iter(layers.values())).to_v.in_features
    good = Concept("<my-teddy>", "teddy bear", torch.randn(1, width), torch.randn(width), torch.randn(width),
                   {name: torch.randn(layer.to_v.out_features) for name, layer in layers.items()},
                   base=base_fingerprint(layers))
    narrow = torch.randn(width // 2)
    for name, concept in {
        "good": good, "foreign": replace(good, base="0" * 64, base_samples="AAA8AA==", placeholder="<x>"),
        "odd_word": replace(good, embedding=narrow[None], word_parts={}),
        "odd_input": replace(good, target_input=narrow, super_input=narrow),
        "odd_layers": replace(good, target_outputs_v={"elsewhere": narrow}),
    }.items():
        save_perfusion_concepts(folder / f"{name}.concept", [concept])
    save_perfusion_concepts(folder / "concept.safetensors", [good])
    tensors, metadata = load_tensors(folder / "good.concept")
    metadata["perfusion"]["format_version"] = 5
    save_tensors(folder / "newer.concept", tensors, metadata)
    half_of(folder / "cut.concept", folder / "good.concept")
    (folder / "void.concept").write_bytes(b"")
    (folder / "folder.concept").mkdir()


@pytest.fixture
def refusal(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
            caplog: pytest.LogCaptureFixture) -> Refusal:
    """A function that runs a main function with arguments and returns the one line that it prints.

    `{here}` and `{out}` in the arguments stand for the folders of inputs and of outputs.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    caplog.set_level("INFO")

    def run(main: Callable[[list[str]], None], *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([argument.format(here=here, out=tmp_path / "out") for argument in arguments])
        printed = capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records if record.name.startswith("ldm")]
        logged = [message for message in logged if not message.startswith("warning: this model")]  # about sizes
        assert stopped.value.code == 2
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert not printed.out and not logged
        assert not (tmp_path / "out").exists()
        return printed.err

    return run


def command_line(arguments: object) -> str:
    return " ".join(arguments) if isinstance(arguments, tuple) else str(arguments)


CONFIGS = [
    ((), "no config: give one with --base"),
    (("--base", "{here}/none.yaml"), "no such file"),
    (("--base", "{here}"), "is a folder, not a config"),
    *((("--base", f"{{here}}/{name}.yaml"), message) for name, message in (
        ("list", "keys with values"), ("word", "unknown key hello"), ("nothing", "no section model"),
        ("no_yaml", "not readable as a config"), ("bytes", "not readable"), ("no_model", "no section model"),
        ("no_keys", "no section model"), ("dangling", "nope"), ("unknown_key", "does not know foo"))),
]
UNKNOWN_KEYS = [
    "foo=1", "model.foo=1", "model.params.foo=1", "model.params.unet_config.foo=1",
    "model.params.unet_config.params.foo=1", "model.params.first_stage_config.params.ddconfig.foo=1",
    "model.params.cond_stage_config.params.foo=1", "data.foo=1", "data.params.foo=1", "data.params.train.foo=1",
    "data.params.train.params.foo=1", "lightning.foo=1", "lightning.trainer.foo=1", "lightning.modelcheckpoint.foo=1",
    "lightning.callbacks.previews.foo=1", "lightning.callbacks.previews.params.foo=1",
]
OVERRIDES = [
    ("model", "neither a flag"), ("a.b=[1", "not readable"), ("model.target=nope.Nope", "nope.Nope"),
    ("model.target=builtins.dict", "model.target must name a LightningModule, not a dict"),
    ("data.target=builtins.dict", "data.target must name a LightningDataModule, not a dict"),
    ("model.params=", "model.params"), ("model.params.unet_config=", "unet_config must be keys with values"),
    ("model.params.bias=abc", "bias must be a finite number, not 'abc'"), ("model.params.bias=.nan", "bias"),
    ("model.params.temperature=0", "temperature 0"), ("model.params.value_lr=-1", "value_lr -1"),
    ("model.params.target_input_decay=2", "target_input_decay 2"), ("model.params.locking=x", "local, trained"),
    ("model.params.seed=x", "seed must be a whole number or null"), ("model.params.timesteps=0", "timesteps 0"),
    ("model.params.covariance=none.safetensors", "compute_covariance.py"),
    ("model.params.unet_config.params.model_channels=97", "97"),
    ("data.params.batch_size=0", "batch_size 0"), ("data.params.batch_size=x", "batch_size must be a whole number"),
    ("data.params.batch_size=9999999", "lower data.params.batch_size"), ("data.params.num_workers=-1", "num_workers"),
    ("data.params.train.params.size=x", "size must be a whole number"), ("data.params.train.params.size=0", "size"),
    ("data.params.train.params.repeats=0", "repeats"), ("data.params.train.params.flip_p=2", "flip_p"),
    ("data.params.train.params.templates=[abc]", "'abc'"),
    ("lightning.seed=x", "lightning.seed"), ("lightning.callbacks=3", "lightning.callbacks"),
    ("lightning.trainer=3", "lightning.trainer"), ("lightning.trainer.max_steps=x", "max_steps"),
    ("lightning.trainer.max_steps=0", "max_steps 0"), ("lightning.trainer.accumulate_grad_batches=0", "accumulate"),
    ("lightning.trainer.max_epochs=x", "max_epochs"), ("lightning.modelcheckpoint.every_n_train_steps=-3", "-3"),
    ("lightning.callbacks.previews.params.prompts=[]", "0 prompts"), ("model.base_learning_rate=x", "base_learning"),
]
FLAGS = [
    (("--data_rot", "photos"), "--data_rot: no such flag; do you mean --data_root?"),
    (("--max_steps", "x"), "'x' is not a whole number"),
    (("--max_steps", "0"), "1 or more"), (("--max_steps", "-5"), "0 or more"), (("-s", "-1"), "0 or more"),
    (("-s", "99999999999"), "less than 4294967296"), (("-t", "perhaps"), "true or false"),
    (("--precision", "nonsense"), "precision must be one of"), (("--accelerator", "nonsense"), "'nonsense'"),
    (("--devices", "0"), "devices"), (("--devices", "nonsense"), "devices"), (("-n", "../x"), "--name ../x"),
    (("-l", "{here}/file"), "--logdir"), (("-l", "{here}/file/logs"), "is not a folder"),
    (("--placeholder", "two words"), "'two words': must be a word without white space"),
    (("--placeholder", ""), "placeholder"), (("--masks", "{here}/none"), "no such folder"),
    (("--masks", "{here}/empty"), "no images"), (("--masks", "{here}/few_masks"), "no mask for 1.png"),
    (("--masks", "{here}/black_masks"), "paint the subject white"),
]
PHOTOS = [
    ("{here}/none", "no such folder"), ("{here}/empty", "no images"), ("{here}/texts", "no images"),
    ("", "no images"), ("{here}/file", "no such folder"),
    ("{here}/fakes", "a.png: cannot be read (not an image: a text file)"),
    ("{here}/cut", "a.png: cannot be read"), ("{here}/tiny", "a.png: 3x3 is too small"),
]
BASES = [
    ("{here}/none.ckpt", "no such file"), ("{here}/file", "no checkpoint"),
    ("{here}", "name a file in it, such as"), ("{here}/empty", "no diffusers folder"),
    *((f"{{here}}/{name}", "is a concept of this project, not a base model; give it with")
      for name in ("good.concept", "concept.safetensors")),
    ("{here}/cut.safetensors", "copy or make it again"), ("{here}/hostile.ckpt", "asks for posix.system"),
    ("{here}/pickle.ckpt", "not run"), ("{here}/odd.safetensors", "2 keys unexpected (a, b), 0 keys of another shape"),
    ("{here}/odd.safetensors", "keys missing (model.diffusion_model."),
]
FOUND_IN_SETUP = [  # after Lightning has started, with the base model loaded
    (("--init_word", ""), "no super-category"), (("--init_word", " "), "no super-category"),
    (("--init_word", "🧸"), "does not know the word 🧸; give another"), (("--init_word", "!!!"), "no word in it"),
    (("--init_word", "\u200b"), "no word in it"), (("--init_word", "qzxvk"), "does not know the word qzxvk"),
    (("--init_word", "<my-teddy>"), "contains a placeholder"), (("--init_word", "teddy " * 60), "shorten it"),
    (("--placeholder", "photo"), "is an ordinary word of the training prompts"),
    (("model.params.ckpt_path=null",), "--actual_resume"),
    (("data.params.train.params.size=50",), "photos of 50 pixels"), (("model.params.channels=3",), "channels 3"),
    (("model.params.image_size=9",), "multiples of 4"),
    (("model.params.covariance=README.md",), "README.md"), (("--devices", "2"), "trained on one device"),
    (("--base", "{here}/foreign_covariance.yaml"), "covariance of text encoder 000000000000"),
    (("model.params.segmenter=models/mini/none/at/all",), "segmenter models/mini/none/at/all: no such folder"),
]
RESUMED = [
    ("none", "no such log folder or checkpoint"), ("empty", "no checkpoint"), ("file", "cut off or no checkpoint"),
    ("run_cut", "cut off"), ("run_void", "cut off"), ("run_text", "is a text file"), ("run_hostile", "holds no state"),
    ("run_weights", "--actual_resume"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), CONFIGS, ids=command_line)
def test_bad_configs(refusal: Refusal, arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(MAIN, *arguments, "-l", "{out}")


@pytest.mark.slow
@pytest.mark.parametrize("override", UNKNOWN_KEYS)
def test_unknown_keys(refusal: Refusal, override: str) -> None:
    line = refusal(MAIN, *BASE, "-l", "{out}", override)
    assert "unknown key foo" in line or "does not know foo; it knows" in line


@pytest.mark.slow
@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_bad_values_of_the_config(refusal: Refusal, override: str, message: str) -> None:
    assert message in refusal(MAIN, *BASE, "-l", "{out}", override)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), FLAGS, ids=command_line)
def test_bad_flags(refusal: Refusal, arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(MAIN, *BASE, "-l", "{out}", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu(refusal: Refusal) -> None:
    assert "No supported gpu" in refusal(MAIN, *BASE, "-l", "{out}", "--accelerator", "gpu")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "message"), PHOTOS)
def test_bad_folders_of_photos(refusal: Refusal, folder: str, message: str) -> None:
    assert message in refusal(MAIN, *BASE, "-l", "{out}", "--data_root", folder)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "message"), BASES)
def test_bad_base_models(refusal: Refusal, here: Path, path: str, message: str) -> None:
    assert message in refusal(MAIN, *BASE, "-l", "{out}", "--actual_resume", path)
    assert not (here / "proof").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), FOUND_IN_SETUP, ids=command_line)
def test_mistakes_that_only_the_model_can_find(refusal: Refusal, arguments: tuple[str, ...], message: str) -> None:
    masks = () if "segmenter" in arguments[0] else ("--masks", "none")
    quick = ("--max_steps", "1", "--accelerator", "cpu", *masks)
    assert message in refusal(MAIN, *BASE, "-l", "{out}", *quick, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory for batches of 16; lower data.params.batch_s"),
    (OSError(errno.ENOSPC, "No space left on device", "last.ckpt"),
     "last.ckpt: cannot be written (No space left on device)")])
def test_too_little_memory_or_disk_space(refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pytorch_lightning.Trainer.fit", fail)
    assert message in refusal(MAIN, *BASE, "-l", "{out}", "--accelerator", "cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("run", "message"), RESUMED)
def test_runs_that_cannot_be_resumed(refusal: Refusal, here: Path, run: str, message: str) -> None:
    before = sorted(here.rglob("*"))
    assert message in refusal(MAIN, *BASE, "--resume", f"{{here}}/{run}")
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
def test_unreadable_photos_are_named_and_the_others_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    MAIN([*BASE, "-t", "false", "-l", str(tmp_path / "logs"), "--data_root", str(here / "mixed")])
    line, = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert all(f"{name} (" in line for name in ("cut.png", "fakes.png", "tiny.png"))
    assert not (tmp_path / "logs").exists()


def test_folders_without_write_permission(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.common.paths.os.access", lambda *_: False)  # to root nothing is read-only
    for main, arguments in ((MAIN, (*BASE, "-l")), (TXT2IMG, ("--prompt", "a dog", "--outdir"))):
        assert "cannot be written to; choose another path" in refusal(main, *arguments, "{out}/deep")


def test_a_run_that_fails_early_removes_its_folder(tmp_path: Path) -> None:
    for path, started in (("new/deep/run", False), ("started/run", True)):
        with pytest.raises(KeyboardInterrupt), log_folder(tmp_path / path, lambda started=started: started) as folder:
            (folder / "file").write_text("")
            raise KeyboardInterrupt
        assert (tmp_path / path / "file").is_file() == started
    with log_folder(tmp_path / "only/looked/at", lambda: False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["started"]


def test_runs_that_start_together_get_their_own_folders(tmp_path: Path) -> None:
    with log_folder(tmp_path / "now_cat", lambda: True) as first, pytest.raises(KeyError), \
            log_folder(tmp_path / "now_cat", lambda: False) as second:
        (first / "concept").write_text("first")
        (second / "concept").write_text("second")
        raise KeyError
    assert second.name == "now_cat-2" and not second.exists()
    assert (tmp_path / "now_cat" / "concept").read_text() == "first"


CONCEPT = ("--concept", "{here}/good.concept")
GENERATION = [
    *((("--concept", f"{{here}}/{name}.concept", "--prompt", "a <my-teddy>"), message) for name, message in (
        ("none", "no such file"), ("folder", "is a folder"), ("void", "copy or make it again"),
        ("cut", "copy or make it again"), ("newer", "concept format 5, this version reads up to 4; update it"),
        ("odd_word", "does not fit this model"), ("odd_input", "does not fit this model"),
        ("odd_layers", "does not fit this model"))),
    (("--concept", "{here}/foreign.concept", "--prompt", "a <x>"),
     "which is another model; load the model it was trained on"),
    (("--concept", "{here}/file", "--prompt", "a <x>"), "safetensors file"),
    (("--concept", MINI, "--prompt", "a <x>"), "not a concept"),
    ((*CONCEPT, "--prompt", "a <my-cat>"), "no loaded concept has that word; loaded are <my-teddy>"),
    (("--prompt", "a <my-cat>"), "none is loaded, see --concept"),
    ((*CONCEPT, "--prompt", "a <my-teddy>" + " dog" * 60), "the text encoder takes 30; shorten it"),
    ((*CONCEPT, "--prompt", "a <my-teddy>", "--bias", "1", "2"), "2 values of bias for 1 concepts"),
    ((*CONCEPT, "--prompt", "a <my-teddy>", "--temperature", "0"), "must be above 0"),
    ((*CONCEPT, "--prompt", "a <my-teddy>", "--config", "{here}/foreign_covariance.yaml"), "covariance of"),
    (("--prompt", "a dog", "--config", "{here}/unknown_key.yaml"), "does not know foo"),
    (("--prompt", "a dog", "--config", "{here}/none.yaml"), "no such file"),
    (("--prompt", "a dog", "--config", "configs/perfusion-sd-v1.yaml"), "name its checkpoint with --ckpt"),
    (("--prompt", "a dog", "--ckpt", "{here}/odd.safetensors"), "keys missing"),
    (("--prompt", "a dog", "--ckpt", "{here}/hostile.ckpt"), "holds more than weights"),
    (("--prompt", "a dog", "--outdir", "{here}/file"), "is not a folder"), (("--promt", "a dog"), "--promt"),
]
OTHERS = [
    (MERGE, ("--manager_ckpts", "{here}/good.concept", "{here}/foreign.concept"), "only concepts of one base model"),
    (MERGE, ("--manager_ckpts", "{here}/good.concept", "{here}/cut.concept"), "cut.concept: not a complete"),
    (MERGE, ("--manager_ckpts", "{here}/newer.concept"), "concept format 5"),
    (MERGE, ("--manager_ckpts", MINI), "not a concept"), (MERGE, ("--manager_ckpt", MINI), "--manager_ckpts"),
    (MERGE, ("--manager_ckpts", "{here}/good.concept", "--placeholders", "a b"), "'a b': must be a word"),
    (COVARIANCE, ("--captions", "{here}/none.txt"), "none.txt: no such file"),
    (COVARIANCE, ("--captions", MINI), "not a UTF-8 text file"), (COVARIANCE, ("--limit", "0"), "1 or more"),
    (COVARIANCE, ("--captions", "{here}/file", "--ckpt", "{here}/odd.safetensors"), "keys missing"),
    (COVARIANCE, ("--output", "{here}"), "is a folder"), (COVARIANCE, ("--output", "{here}/file/x"), "is not a folder"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), GENERATION, ids=command_line)
def test_bad_input_of_generation(refusal: Refusal, here: Path, arguments: tuple[str, ...], message: str) -> None:
    few = ("--outdir", "{out}", "--ddim_steps", "2", "--n_samples", "1", "--device", "cpu")
    assert message in refusal(TXT2IMG, *few, *arguments)
    assert not (here / "proof").exists()


@pytest.mark.parametrize(("main", "arguments", "message"), OTHERS)
def test_bad_input_of_merging_and_covariances(refusal: Refusal, main: Callable[[list[str]], None],
                                              arguments: tuple[str, ...], message: str) -> None:
    first = ("--output_path", "{out}/x.safetensors") if main is MERGE else (
        "--config", "configs/perfusion.yaml", "--device", "cpu", "--output", "{out}/x.safetensors")
    assert message in refusal(main, *first, *arguments)


@pytest.mark.slow
def test_unused_concepts_and_unknown_words_are_warned_about(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    TXT2IMG(["--concept", str(here / "good.concept"), "--prompt", "a dog, qzxvk!", "--outdir", str(tmp_path),
             "--ddim_steps", "2", "--n_samples", "1", "--device", "cpu"])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["warning: concept <my-teddy> is loaded, but its word does not occur in the prompt",
                        "warning: this text encoder does not know qzxvk; images will not show it"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ("main.py", *BASE, "--data_root", "no/such/folder"),
    ("main.py", *BASE, "--max_steps", "1", "--init_word", "qzxvk", "--masks", "none"),
    ("scripts/txt2img.py", "--prompt", "a <my-cat>"),
], ids=command_line)
def test_bad_input_in_processes(command: tuple[str, ...], tmp_path: Path) -> None:
    folder = ("-l", tmp_path / "x") if command[0] == "main.py" else ("--outdir", tmp_path / "x")
    done = subprocess.run([sys.executable, *map(str, (*command, *folder))], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout and not (tmp_path / "x").exists()
