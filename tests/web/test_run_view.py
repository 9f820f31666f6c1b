"""Runs as the page shows them: texts of users stay texts."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ldm.web.run_folder import RunFolder, RunSettings, RunState
from ldm.web.run_progress import RunProgress
from ldm.web.run_view import describe_run, previews_of, status_of, thumbnail_of, title_of

HTML = "<img src=x onerror=alert(1)>"
SETTINGS = RunSettings(HTML, "teddy bear", "<script>", "configs/perfusion.yaml")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "photos").mkdir()
    folder = RunFolder(tmp_path)
    folder.write_settings(SETTINGS)
    return folder


def test_html_is_escaped(run: RunFolder) -> None:
    run.log_file.write_text(f"error: {HTML}\n")
    shown = status_of(run, RunState.FAILED, RunProgress(step=3, steps=10))
    assert "<img" not in shown and "<script" not in shown
    assert shown.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert 'value="3" max="10"' in shown


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s left"), (600, "10 min left")])
def test_the_time_left_is_shown_while_it_trains(run: RunFolder, seconds: float, text: str) -> None:
    assert text in status_of(run, RunState.RUNNING, RunProgress(1, 10, seconds_left=seconds))
    assert "left" not in status_of(run, RunState.STOPPED, RunProgress(1, 10, seconds_left=seconds))


def test_previews_are_an_image_with_a_text(tmp_path: Path) -> None:
    assert previews_of(RunProgress()) == ""
    sheet = tmp_path / 'a"b.png'
    sheet.touch()
    shown = previews_of(RunProgress(previews=sheet))
    assert 'alt="The photos' in shown and "a%22b.png" in shown


def test_a_damaged_run_has_its_folder_as_title(run: RunFolder) -> None:
    (run.path / "run.json").write_text("[]")
    assert title_of(run) == run.name
    assert describe_run(run, RunState.DRAFT) == "not started"
    assert run.name in status_of(run, RunState.DRAFT, RunProgress())


@pytest.mark.slow  # imports torch and all that builds models
def test_thumbnails_are_small_and_made_once(run: RunFolder) -> None:
    assert isinstance(thumbnail_of(run), Image.Image)  # no photo yet
    run.write_settings(replace(SETTINGS, title="x"))
    Image.new("RGB", (900, 600), "red").save(run.photos / "photo.png")
    path = Path(thumbnail_of(run))
    assert Image.open(path).size == (160, 160)
    (run.photos / "photo.png").unlink()
    assert thumbnail_of(run) == str(path)
