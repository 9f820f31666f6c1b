"""Tests of the tool that runs public scripts, on a made-up repository: the public ones are not needed."""
from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from omegaconf import OmegaConf
from public_scripts.checkpoints import TinyModel, photo, shrink, text
from public_scripts.compare import Row, compare_outcomes, compare_run, image_difference, number_difference
from public_scripts.launcher import run_cell, run_notebook
from public_scripts.run import Outcome, PublicRun, Workplace, earlier_outcome, last_error
from public_scripts.table import markdown_table, text_line
from public_scripts.towers import WIDTH
from run_public_scripts import all_runs, main

ROOT = Path(__file__).resolve().parents[2]
# A repository with an `ldm` of its own, which does what ours does, and a script in the manner of the family's users.
OWN_LDM = {"ldm/util.py": """
import importlib

def instantiate_from_config(config):
    module, name = config["target"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config["params"])
"""}
SCRIPT = """
import json, os, sys
import ldm.util
import numpy, torch
from omegaconf import OmegaConf
from PIL import Image
from ldm.util import instantiate_from_config

layer = instantiate_from_config(OmegaConf.load(sys.argv[1]).model).cuda()
layer.load_state_dict(layer.state_dict())
values = layer(torch.randn(8, 8, 3, device="cuda"))
pixels = (values.detach().cpu().clamp(0, 1) * 255).byte().numpy()
os.makedirs("out", exist_ok=True)
Image.fromarray(pixels).save("out/0.png")
with open("numbers.json", "w") as file:
    json.dump({"mean": values.mean().item()}, file)
print(ldm.util.__file__)
"""
FAILING = "import ldm.util\nraise ValueError('as planned')"
CONFIG = "model: {base_learning_rate: 1.0, target: torch.nn.Linear, params: {in_features: 3, out_features: 3}}"


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """Return the made-up repository, and a folder for runs."""
    files = {**OWN_LDM, "scripts/draw.py": SCRIPT, "scripts/fail.py": FAILING}
    for name, content in files.items():
        target = tmp_path / "public" / "someone--fork" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return Workplace(tmp_path / "public", tmp_path / "work")


def draw(**changes: object) -> PublicRun:
    return PublicRun(**{"name": "draw", "repository": "someone--fork", "script": "scripts/draw.py",
                        "arguments": ("config.yaml",), "inputs": {"config.yaml": text(CONFIG)}, "clip_width": 0,
                        **changes})


@pytest.mark.slow
def test_a_script_runs_on_both_packages(place: Workplace) -> None:
    row = compare_run(draw(), place)
    assert (row.ours, row.original, row.max_difference, row.number_difference, row.agrees) == (True, True, 0, 0, True)
    logs = {name: (place.folder / "draw" / name / "log.txt").read_text().strip() for name in ("ours", "original")}
    assert logs["original"].splitlines()[-1] == str(place.path_in("someone--fork/ldm/util.py"))
    assert Path(logs["ours"].splitlines()[-1]).resolve() == ROOT / "ldm" / "util.py"
    # The original's outcome is used again, so a change of it shows as a difference of ours.
    ours, original = (Outcome(place.folder / "draw" / name, "") for name in ("ours", "original"))
    assert earlier_outcome(draw(), place) == original and earlier_outcome(draw(arguments=()), place) is None
    (original.folder / "numbers.json").write_text('{"mean": 7.0}')
    compared = compare_outcomes(draw(), ours, original, [])
    assert not compared["agrees"] and compared["max_difference"] == 0 and compared["number_difference"] > 0.5


@pytest.mark.slow
def test_an_error_is_shown_with_its_place(place: Workplace) -> None:
    row = compare_run(draw(script="scripts/fail.py", original_fails="by design"), place)
    assert (row.ours, row.original, row.agrees) == (False, None, False)
    assert "ValueError: as planned" in row.remark and "scripts/fail.py:2" in row.remark and "by design" in row.remark


def test_a_folder_without_repositories_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert str(tmp_path) in printed.err and "CompVis--stable-diffusion" in printed.err


def test_runs_have_names_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [run.name for run in all_runs()]
    assert len(names) == len(set(names)) and not any(" " in name for name in names)
    assert main([str(tmp_path), "--list", "--only", "sd-txt2img-plms"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["sd-txt2img-plms"]


def test_repositories_are_found_by_their_bare_names(tmp_path: Path) -> None:
    (tmp_path / "stable-diffusion").mkdir()
    place = Workplace(tmp_path, tmp_path / "work")
    assert place.path_in("CompVis--stable-diffusion/scripts") == tmp_path / "stable-diffusion" / "scripts"
    with pytest.raises(LookupError, match="needs CompVis--latent-diffusion"):
        place.path_in("CompVis--latent-diffusion/scripts")


def test_public_configs_are_shrunk_and_keep_their_structure(tmp_path: Path) -> None:
    public = OmegaConf.load(ROOT / "configs" / "latent-diffusion" / "cin256-v2.yaml")
    params = shrink(public, TinyModel("config", ()), tmp_path).model.params
    assert params.unet_config.params.model_channels == 32
    assert params.unet_config.params.context_dim == params.cond_stage_config.params.embed_dim == WIDTH
    given = public.model.params
    assert len(params.unet_config.params.channel_mult) == len(given.unet_config.params.channel_mult)
    assert params.linear_end == given.linear_end
    assert given.unet_config.params.model_channels == 192  # the given config stays as it is


def test_cells_of_a_notebook_share_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = ['{"cell_type": "code", "source": ["!pip install x\\n", "from PIL import Image\\n", "side = 4"]}',
             '{"cell_type": "markdown", "source": ["Words"]}',
             '{"cell_type": "code", "source": ["Image.new(\'L\', (side, side))"]}']
    (tmp_path / "notebook.ipynb").write_text('{"cells": [' + ", ".join(cells) + "]}")
    run_notebook(tmp_path / "notebook.ipynb")
    assert (tmp_path / "cell-2.png").is_file()
    assert run_cell("x = 2\nx + 1", {}) == 3


def test_images_and_numbers_are_compared(tmp_path: Path) -> None:
    place = Workplace(tmp_path, tmp_path)
    for name, size, seed in (("one", 8, 0), ("same", 8, 0), ("other", 8, 1), ("larger", 9, 0)):
        photo(size, size, seed)(place, tmp_path / f"{name}.png")
    one = tmp_path / "one.png"
    assert image_difference(one, tmp_path / "same.png").max() == 0
    assert image_difference(one, tmp_path / "other.png").max() > 2
    assert image_difference(one, tmp_path / "larger.png").min() == 255
    first = {"loss": numpy.array([1.0, 2.0])}
    assert number_difference(first, {"loss": numpy.array([1.0, 2.5])}) == pytest.approx(0.2)
    assert number_difference(first, {"loss": numpy.array([1.0])}) == float("inf")


def test_the_error_of_a_log_is_its_last_line_with_a_place() -> None:
    log = 'Traceback\n  File "/a/b/c/d.py", line 3, in main\n  File "/x/site-packages/e.py", line 9, in f\nKeyError: 1'
    assert last_error(log) == "KeyError: 1 (b/c/d.py:3)"
    assert last_error("") == "no output"


def test_a_row_is_printed_as_text_and_as_markdown() -> None:
    row = Row("draw", True, None, 1.0, 0.25, None, True, "original needs a hub")
    assert text_line(row).split()[:2] == ["ok", "draw"]
    assert markdown_table([row]).splitlines()[-1] == "| draw | yes | - | 1 (0.25) | original needs a hub |"
